"""Who goes first: one key per request, fixed at admission; the smallest goes first.

- Interactive: the latest moment at which it may start and still meet its TTFT (least slack first: since every request's
  slack shrinks at the same pace, the order of slacks is the order of these moments, and the key need not change).
- Batch class: arrival + patience, earlier or later by its length (SJF, LJF).

Ageing is built in: the key of a request is at most `arrival + spread` for a spread that the settings bound, so that a
request which arrives more than `spread` later never goes first. That is the starvation bound: once admitted, a request
is overtaken only by requests that arrive within `starvation_bound_s` of it.
"""

from __future__ import annotations

from bucketserve.core.settings import BatchOrder, CoreSettings
from bucketserve.core.types import Request, RequestClass

__all__ = ["order_key", "starvation_bound_s"]


def order_key(request: Request, settings: CoreSettings, predicted_prefill_s: float) -> float:
    """Returns the key, a time in seconds on the core's clock."""
    if request.request_class is RequestClass.INTERACTIVE:
        target_s = request.ttft_slo_s if request.ttft_slo_s is not None else settings.default_ttft_s
        return request.arrival_s + target_s - min(predicted_prefill_s, target_s)
    length_s = request.prefill_tokens * settings.batch_order_s_per_token
    if settings.batch_order is BatchOrder.FCFS:
        length_s = 0.0
    sign = -1.0 if settings.batch_order is BatchOrder.LJF else 1.0
    # LJF brings long ones forward, but never before their arrival.
    return request.arrival_s + max(settings.batch_patience_s + sign * length_s, 0.0)


def starvation_bound_s(request: Request, settings: CoreSettings) -> float:
    """Returns how much later than `request` another one may arrive and still go first, in seconds.

    The other one's key is at least its arrival (both classes: target minus at most the target; patience minus length is
    cut at 0), and this one's key is its arrival plus this bound.
    """
    return order_key(request, settings, 0.0) - request.arrival_s
