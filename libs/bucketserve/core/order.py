"""Who goes first: one key per request, fixed at admission; the smallest goes first.

- Interactive: the latest moment at which it may start and still meet its TTFT (least slack first: since every request's
  slack shrinks at the same pace, the order of slacks is the order of these moments, and the key need not change), later
  by what it costs the others: the seconds of the cluster's KV memory that it takes, for each of those that wait. When
  few wait that is nothing; under load a request may be overtaken by a cheaper one that arrives later by no more than
  the difference of their costs. Without that, a few long outputs fill the memory and everyone behind them is late.
- Batch class: arrival + patience, earlier or later by its length (SJF, LJF).
- A tenant that is ahead of the others in tokens is later by its lead (core/tenants.py).

Ageing is built in: the key of a request is `arrival + bound` for a bound that is fixed at admission, so that a request
which arrives later than that never goes first. An interactive request that can't meet its target any more leaves the
lane of those that can (core/lanes.py); the order inside a lane is the same.
"""

from __future__ import annotations

from bucketserve.core.settings import BatchOrder, CoreSettings, QueueOrder
from bucketserve.core.types import Request, RequestClass

__all__ = ["latest_start_s", "order_key"]

MOST_COST_S = 60.0
"""How far a request may be behind others because it is costly: after a burst that could be many minutes."""
TOKEN_S = 0.002
"""SJF/LJF: how much later or earlier a prompt token makes a batch-class request count."""


def order_key(
    request: Request, settings: CoreSettings, *, prefill_s: float = 0.0, cost_s: float = 0.0, lead_s: float = 0.0
) -> float:
    """Returns the key, a time in seconds on the core's clock; never before the request's arrival.

    Args:
        request: the request.
        settings: the order asked for.
        prefill_s: its predicted prefill alone.
        cost_s: the delay that it means to all who wait: seconds of the whole cluster's KV memory that it takes, times
            their number.
        lead_s: how far its tenant is ahead of the others.
    """
    if settings.queue_order is QueueOrder.FCFS:
        return request.arrival_s
    if request.request_class is RequestClass.INTERACTIVE:
        slack_s = latest_start_s(request, settings, prefill_s) - request.arrival_s
        return request.arrival_s + slack_s + min(settings.cost_weight * cost_s, MOST_COST_S) + lead_s
    length_s = request.prefill_tokens * TOKEN_S
    sign = -1.0 if settings.batch_order is BatchOrder.LJF else 1.0
    # LJF brings long ones forward, but never before their arrival.
    return request.arrival_s + max(settings.batch_patience_s + sign * length_s, 0.0) + lead_s


def latest_start_s(request: Request, settings: CoreSettings, prefill_s: float) -> float:
    """Returns when an interactive request must start to meet its TTFT; never before its arrival."""
    target_s = request.ttft_slo_s if request.ttft_slo_s is not None else settings.default_ttft_s
    return request.arrival_s + max(target_s - prefill_s, 0.0)
