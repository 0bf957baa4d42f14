"""Who gets into the queue: bounds by requests and by tokens, per class and tenant, and early rejection.

A refusal says when to come back: when as many tokens as the request has will have left the queue, by the measured rate.
"""

from __future__ import annotations

from dataclasses import replace

from bucketserve.core.drain import DrainRate
from bucketserve.core.fleet import Fleet
from bucketserve.core.lanes import Lanes
from bucketserve.core.messages import RefuseReason
from bucketserve.core.settings import CoreSettings
from bucketserve.core.tenants import TenantBook
from bucketserve.core.types import Request, RequestClass

__all__ = ["Admission"]

MIN_RETRY_S, MAX_RETRY_S = 0.1, 60.0
PROMISE = 0.8
"""Share of its TTFT target within which a request must be predicted to start, if it wants to be refused otherwise.

Under overload the queue fills up to just this point: at 1 every error of the prediction would make someone late.
"""


class Admission:
    """Decides; changes nothing but its own counts."""

    def __init__(self, settings: CoreSettings, lanes: Lanes, fleet: Fleet, tenants: TenantBook) -> None:
        """Reads the queue and the workers."""
        self._settings = settings
        self._lanes = lanes
        self._fleet = fleet
        self._tenants = tenants
        self.drain = DrainRate()
        self._batch_requests = 0
        self._batch_tokens = 0

    def refusal(self, request: Request, now_s: float, *, may_wait: bool) -> tuple[RefuseReason, float] | None:
        """Returns why a request is refused and after how many seconds to try again; None if it is let in.

        may_wait: one that no worker here may serve is let in all the same.
        """
        reason = self._reason(request, now_s, may_wait)
        return None if reason is None else (reason, self._retry_after_s(request, reason, now_s))

    def entered(self, request: Request) -> None:
        """Notes a request in the queue."""
        if request.request_class is RequestClass.BATCH:
            self._batch_requests += 1
            self._batch_tokens += request.prefill_tokens

    def left(self, request: Request) -> None:
        """Notes that a request is not in the queue any more."""
        if request.request_class is RequestClass.BATCH:
            self._batch_requests -= 1
            self._batch_tokens -= request.prefill_tokens

    def retry_s(self) -> float:
        """Returns when to come back if it is not known what for to wait."""
        return min(max(self.drain.seconds_for(self._lanes.num_tokens), MIN_RETRY_S), MAX_RETRY_S)

    def _reason(self, request: Request, now_s: float, may_wait: bool) -> RefuseReason | None:
        settings, tokens = self._settings, request.prefill_tokens
        is_served = self._fleet.serves(request)
        if not is_served and not may_wait:
            if not self._fleet.serves(replace(request, needs_grammar=False, adapter="")):
                return RefuseReason.OTHER_TOKENIZER
            has_adapter = self._fleet.serves(replace(request, needs_grammar=False))
            return RefuseReason.NO_GRAMMARS if has_adapter else RefuseReason.NO_ADAPTER
        can_be_held = not is_served or self._fleet.could_hold(request)
        if request.reserved_tokens > self._lanes.context_tokens or not can_be_held:
            return RefuseReason.TOO_LARGE
        if len(self._lanes) >= settings.max_queued_requests:
            return RefuseReason.QUEUE_REQUESTS
        if self._lanes.num_tokens + tokens > settings.max_queued_tokens:
            return RefuseReason.QUEUE_TOKENS
        if request.request_class is RequestClass.BATCH:
            if self._batch_requests >= settings.max_queued_requests * settings.max_batch_share:
                return RefuseReason.QUEUE_REQUESTS
            if self._batch_tokens + tokens > settings.max_queued_tokens * settings.max_batch_share:
                return RefuseReason.QUEUE_TOKENS
        if settings.max_tenant_share < 1:
            number, waiting = self._tenants.waiting(request.tenant)
            if (
                number >= settings.max_queued_requests * settings.max_tenant_share
                or waiting + tokens > settings.max_queued_tokens * settings.max_tenant_share
            ):
                return RefuseReason.TENANT_QUOTA
        if not request.reject_if_unattainable or request.ttft_slo_s is None:
            return None
        is_late = now_s + self._start_in_s(request) > request.arrival_s + PROMISE * request.ttft_slo_s
        return RefuseReason.SLO_UNATTAINABLE if is_late else None

    def _start_in_s(self, request: Request) -> float:
        """Predicted time to the first token: what waits in time drains first, then its own prefill."""
        return self.drain.seconds_for(self._lanes.num_in_time_tokens) + self._fleet.times.prefill_s(
            request.prefill_tokens
        )

    def _retry_after_s(self, request: Request, reason: RefuseReason, now_s: float) -> float:
        if reason is RefuseReason.TOO_LARGE:
            return 0.0
        if reason is RefuseReason.SLO_UNATTAINABLE:
            late_s = now_s + self._start_in_s(request) - request.arrival_s - PROMISE * (request.ttft_slo_s or 0.0)
            return min(max(late_s, MIN_RETRY_S), MAX_RETRY_S)
        return min(max(self.drain.seconds_for(request.prefill_tokens), MIN_RETRY_S), MAX_RETRY_S)
