"""Whom a worker lets go when its KV memory runs out: the same rule for the engines and the simulator's workers.

A sequence takes KV as it uses it, and the scheduler counts on outputs being as long as others were (core/outputs.py).
When they are longer, somebody has to go: batch class first, then whoever was never let go before, then whoever has the
fewest tokens to compute again. One that was let go twice is never let go again: it has its KV in full when it begins.
"""

from __future__ import annotations

from bucketserve.core.types import MAX_PREEMPTIONS

__all__ = ["SPARE_SHARE", "loss"]

SPARE_SHARE = 0.02
"""Of all KV: a prompt begins only if so much stays free, where those that run grow; else the next step would let some
go again (vLLM's watermark). A worker that is empty needs none."""


def loss(*, is_batch: bool, num_preemptions: int, num_tokens: int) -> tuple[bool, int, int] | None:
    """Returns what letting a sequence go costs: the least goes first. None: it may not be let go.

    Args:
        is_batch: whether it is of batch class.
        num_preemptions: how often it was let go before.
        num_tokens: prompt and output so far, which have to be computed again.
    """
    if num_preemptions >= MAX_PREEMPTIONS:
        return None
    return (not is_batch, num_preemptions, num_tokens)
