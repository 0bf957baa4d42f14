"""The queue: waiting requests in order, and the books of tenants and admission that go with them."""

from __future__ import annotations

from bucketserve.core.admission import Admission
from bucketserve.core.fleet import Fleet
from bucketserve.core.lanes import Lane, Lanes
from bucketserve.core.order import latest_start_s, order_key
from bucketserve.core.settings import CoreSettings, QueueOrder
from bucketserve.core.tenants import TenantBook
from bucketserve.core.types import Request, RequestClass, RequestId

__all__ = ["Queue"]

HEAD_S = 1e6
"""A resumed request comes before all of its lane that arrived less than this later: it is in the middle of a stream."""


class Queue:
    """Puts requests into their lane, at their place, and takes them out."""

    def __init__(
        self, settings: CoreSettings, lanes: Lanes, fleet: Fleet, tenants: TenantBook, admission: Admission
    ) -> None:
        """Keeps the three books in step; reads the workers."""
        self._settings = settings
        self._lanes = lanes
        self._fleet = fleet
        self._tenants = tenants
        self._admission = admission

    def enter(self, request: Request, prefill_s: float) -> None:
        """Queues a request whose prompt takes that many seconds to compute."""
        key, late_s = self._place(request, prefill_s)
        self._lanes.add(request, key, late_s)
        self._tenants.entered(request)
        self._admission.entered(request)

    def leave(self, request_id: RequestId) -> bool:
        """Takes a request out; False if it does not wait."""
        request = self._lanes.remove(request_id)
        if request is None:
            return False
        self._tenants.left(request)
        self._admission.left(request)
        return True

    def _place(self, request: Request, prefill_s: float) -> tuple[float, float | None]:
        """Returns a request's key in the order, and when it is late: never (infinity) or from the start (None)."""
        late_s: float | None = float("inf")
        if self._settings.queue_order is QueueOrder.SLACK and request.request_class is RequestClass.BATCH:
            late_s = None
        elif self._settings.queue_order is QueueOrder.SLACK and not request.is_resumed:
            late_s = latest_start_s(request, self._settings, prefill_s)
        if request.is_resumed:
            return request.arrival_s - HEAD_S, late_s
        lead_tokens = self._tenants.lead(request.tenant)
        key = order_key(
            request,
            self._settings,
            prefill_s=prefill_s,
            cost_s=self._cost_s(request, prefill_s),
            lead_s=self._admission.drain.seconds_for(round(lead_tokens)) if lead_tokens else 0.0,
        )
        return key, late_s

    def _cost_s(self, request: Request, prefill_s: float) -> float:
        """Returns the delay that a request means to those that wait, in seconds, summed over them.

        It takes the cluster's KV memory for tokens held x time held / all tokens, and everyone behind it waits as long.
        """
        if not self._fleet.kv_total_tokens:
            return 0.0
        output = self._fleet.outputs.expected(request)
        held_s = prefill_s + output * self._fleet.tpot_s
        memory_s = (request.prompt_tokens + output) * held_s / self._fleet.kv_total_tokens
        return memory_s * (1 + len(self._lanes.of(Lane.IN_TIME)))
