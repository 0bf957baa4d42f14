"""Tenants share by tokens that they use, not by requests: virtual token counters, as start tags.

Each tenant has a counter of weighted tokens; one that comes back after a pause starts at the least counter of those
that wait, or of who waited last if nobody does, so that nobody saves up (Virtual Token Counter, arXiv 2401.00588,
algorithm 2). Since keys are fixed at admission, the
lead of a tenant over the furthest behind of the others that wait becomes part of its request's key (start-time fair
queueing). A tenant alone has no lead. A request is charged with what its tenant's outputs are like when it enters, and
with what it really used when it ends; further attempts are free.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from bucketserve.core.types import Request, RequestId

__all__ = ["TenantBook"]

OUTPUT_WEIGHT = 2.0
"""An output token counts as this many prompt tokens, as in the paper named above."""
MEAN_WEIGHT = 0.1
"""Of the newest output in a tenant's mean."""


@dataclass(slots=True)
class _Tenant:
    counter: float
    num_waiting: int = 0
    waiting_tokens: int = 0
    num_open: int = 0
    mean_output: float | None = None


class TenantBook:
    """What each tenant has waiting and what it has had. Every method takes O(log n) of n tenants."""

    def __init__(self) -> None:
        """Knows nobody."""
        self._tenants: dict[str, _Tenant] = {}
        self._mean_output: float | None = None
        """Of all tenants, for those of which nothing is known."""
        self._last_counter = 0.0
        """Of the tenant that was the last to have something waiting, when it had no more."""
        self._charged: dict[RequestId, float] = {}
        """Of each open request that was charged."""
        self._behind: list[tuple[float, str]] = []
        """Tenants that wait, by counter; entries whose counter is not the present one are out of date."""
        self._ahead: list[tuple[float, str]] = []
        """Tenants that have nothing open, by counter: remembered until the others have caught up."""

    def __len__(self) -> int:
        """Number of tenants that are remembered."""
        return len(self._tenants)

    def waiting(self, tenant: str) -> tuple[int, int]:
        """Returns (requests, prefill tokens) of a tenant in the queue."""
        known = self._tenants.get(tenant)
        return (known.num_waiting, known.waiting_tokens) if known else (0, 0)

    def lead(self, tenant: str) -> float:
        """Returns how many weighted tokens a tenant is ahead of the furthest behind of the others that wait."""
        least = self._least(but_not=tenant)
        known = self._tenants.get(tenant)
        return max(known.counter - least, 0.0) if known is not None and least is not None else 0.0

    def entered(self, request: Request) -> None:
        """Notes a request in the queue and charges its tenant, once."""
        known = self._tenants.get(request.tenant)
        if known is None:
            known = self._tenants[request.tenant] = _Tenant(self._floor())
        elif not known.num_waiting:
            known.counter = max(known.counter, self._floor())
        known.num_waiting += 1
        known.waiting_tokens += request.prefill_tokens
        if request.request_id not in self._charged:
            known.num_open += 1
            self._charged[request.request_id] = charge = 0.0 if request.is_resumed else self._expected(request, known)
            known.counter += charge
        self._rank(request.tenant, known)

    def left(self, request: Request) -> None:
        """Notes that a request is not in the queue any more; it may come back."""
        known = self._tenants[request.tenant]
        known.num_waiting -= 1
        known.waiting_tokens -= request.prefill_tokens
        if not known.num_waiting:
            self._last_counter = known.counter

    def ended(self, request: Request, output_tokens: int | None, *, has_run: bool) -> None:
        """Charges a request that has ended with what it used.

        Args:
            request: which.
            output_tokens: tokens generated; None: not known, what it was charged with stays.
            has_run: whether it was at a worker; otherwise it used nothing.
        """
        charge = self._charged.pop(request.request_id, None)
        if charge is None:
            return
        known = self._tenants[request.tenant]
        known.num_open -= 1
        if output_tokens is not None and has_run:
            known.mean_output = _moved(known.mean_output, output_tokens)
            self._mean_output = _moved(self._mean_output, output_tokens)
        if not request.is_resumed and (output_tokens is not None or not has_run):
            used = request.prefill_tokens + OUTPUT_WEIGHT * (output_tokens or 0) if has_run else 0.0
            known.counter += used - charge
        self._rank(request.tenant, known)
        self._forget_overtaken()

    def _rank(self, tenant: str, known: _Tenant) -> None:
        ranking = self._behind if known.num_waiting else self._ahead
        if known.num_waiting or not known.num_open:
            heapq.heappush(ranking, (known.counter, tenant))
        if len(self._behind) > 64 + 4 * len(self._tenants):
            # Below entries that stay, those that are out of date would gather for ever.
            self._behind = [(t.counter, name) for name, t in self._tenants.items() if t.num_waiting]
            heapq.heapify(self._behind)
        if len(self._ahead) > 64 + 4 * len(self._tenants):
            self._ahead = [(t.counter, name) for name, t in self._tenants.items() if not t.num_open]
            heapq.heapify(self._ahead)

    def _least(self, but_not: str = "") -> float | None:
        """Returns the least counter of the tenants that wait, of all but one; None if there is none."""
        own: tuple[float, str] | None = None
        least: float | None = None
        while self._behind:
            counter, name = entry = self._behind[0]
            known = self._tenants.get(name)
            if known is None or not known.num_waiting or known.counter != counter:
                heapq.heappop(self._behind)
            elif name == but_not:
                own = heapq.heappop(self._behind)
            else:
                least = entry[0]
                break
        if own is not None:
            heapq.heappush(self._behind, own)
        return least

    def _floor(self) -> float:
        """Where a tenant starts that had nothing waiting."""
        least = self._least()
        return self._last_counter if least is None else least

    def _forget_overtaken(self) -> None:
        """Forgets tenants without a request that would start at the others' counter if they came back."""
        least = self._least()
        while self._ahead and (least is None or self._ahead[0][0] <= least):
            counter, name = heapq.heappop(self._ahead)
            known = self._tenants.get(name)
            if known is not None and not known.num_open and known.counter == counter:
                del self._tenants[name]

    def _expected(self, request: Request, known: _Tenant) -> float:
        """Returns what a request is likely to use: its output as its tenant's others, never more than it may have."""
        mean = self._mean_output if known.mean_output is None else known.mean_output
        output = request.max_new_tokens if mean is None else min(mean, request.max_new_tokens)
        return request.prefill_tokens + OUTPUT_WEIGHT * output


def _moved(mean: float | None, value: int) -> float:
    """Returns a mean after a further value."""
    return value if mean is None else mean + MEAN_WEIGHT * (value - mean)
