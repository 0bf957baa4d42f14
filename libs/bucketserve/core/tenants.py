"""Tenants share by tokens, not by requests: virtual token counters, as start tags.

Each tenant has a counter of the tokens it asked for; one that comes back after a pause starts at the least counter of
those that wait, so that nobody saves up (Virtual Token Counter, arXiv 2401.00588). Since keys are fixed at admission,
the lead of a tenant over the furthest behind of the others that wait becomes part of its request's key (start-time fair
queueing). A tenant alone has no lead.
"""

from __future__ import annotations

from bucketserve.core.types import Request

__all__ = ["TenantBook"]

OUTPUT_WEIGHT = 2.0
"""An output token counts as this many prompt tokens, as in the paper named above."""


class TenantBook:
    """What each tenant has waiting and what it has had."""

    def __init__(self) -> None:
        """Knows nobody."""
        self._waiting_tokens: dict[str, int] = {}
        self._waiting_requests: dict[str, int] = {}
        self._counters: dict[str, float] = {}
        self._floor = 0.0

    def waiting(self, tenant: str) -> tuple[int, int]:
        """Returns (requests, prefill tokens) of a tenant in the queue."""
        return self._waiting_requests.get(tenant, 0), self._waiting_tokens.get(tenant, 0)

    def lead(self, tenant: str) -> float:
        """Returns how many weighted tokens a tenant is ahead of the furthest behind of the others that wait."""
        others = [self._counters[other] for other in self._waiting_requests if other != tenant]
        if not others:
            return 0.0
        return max(self._counters.get(tenant, 0.0) - min(others), 0.0)

    def entered(self, request: Request) -> None:
        """Notes a request in the queue and charges it to its tenant."""
        tenant = request.tenant
        if tenant not in self._waiting_requests:
            waiting = [self._counters[other] for other in self._waiting_requests]
            self._floor = min(waiting) if waiting else max(self._counters.values(), default=0.0)
            self._counters[tenant] = max(self._counters.get(tenant, 0.0), self._floor)
        self._counters[tenant] += request.prefill_tokens + OUTPUT_WEIGHT * request.max_new_tokens
        self._waiting_requests[tenant] = self._waiting_requests.get(tenant, 0) + 1
        self._waiting_tokens[tenant] = self._waiting_tokens.get(tenant, 0) + request.prefill_tokens

    def left(self, request: Request) -> None:
        """Notes that a request is not in the queue any more."""
        tenant = request.tenant
        self._waiting_requests[tenant] -= 1
        self._waiting_tokens[tenant] -= request.prefill_tokens
        if not self._waiting_requests[tenant]:
            del self._waiting_requests[tenant], self._waiting_tokens[tenant]
            if not self._waiting_requests:
                self._counters.clear()
