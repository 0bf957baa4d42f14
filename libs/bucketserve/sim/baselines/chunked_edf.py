"""Chunked prefill with priorities: what vLLM does with --scheduling-policy priority and a gateway that sets them.

Interactive before batch, then the earliest TTFT deadline first. The worker's loop keeps that order among its prompts,
and where running sequences outgrow the memory the one with the least priority is evicted.
"""

from __future__ import annotations

from dataclasses import replace

from bucketserve.core.types import Request, RequestClass
from bucketserve.sim.baselines.chunked import STEP_TOKENS, Chunked, Rank, chunked_mode
from bucketserve.sim.policy_spec import PolicySpec, together
from bucketserve.sim.sequence import SimSequence

__all__ = ["ChunkedEdf", "rival"]


class ChunkedEdf(Chunked):
    """One queue by class and deadline."""

    def rank(self, request: Request) -> Rank:
        """Class, then deadline; batch in order of arrival."""
        is_batch = request.request_class is RequestClass.BATCH
        return (float(is_batch), request.arrival_s + (request.ttft_slo_s or 0.0), request.request_id)


def _deadline(sequence: SimSequence, now_s: float) -> float:
    return sequence.due_s


def rival(step_tokens: int = STEP_TOKENS) -> PolicySpec:
    """Returns the policy with steps of that many tokens."""
    return PolicySpec(
        "chunked-edf",
        "chunked prefill with priorities, earliest deadline first (vLLM priority)",
        lambda _: ChunkedEdf(step_tokens),
        replace(chunked_mode(step_tokens), urgency=_deadline),
        together,
        sized=rival,
    )
