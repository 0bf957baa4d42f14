"""How a worker composes one forward pass: decodes ride along, prompts fill the rest in chunks.

Used by the engines and by the simulator's workers, so that a step means the same in both. Chunked prefill beside
running decodes follows Sarathi-Serve (arXiv 2403.02310); the budget comes from the scheduler, which knows the TPOT
targets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bucketserve.core.types import RequestId

__all__ = ["PrefillPiece", "plan_prefill"]


@dataclass(frozen=True, slots=True)
class PrefillPiece:
    """Prompt tokens of one sequence to compute in this step."""

    request_id: RequestId
    num_tokens: int


def plan_prefill(
    waiting: Iterable[tuple[RequestId, int]],
    *,
    num_decoding: int,
    max_step_tokens: int,
    max_chunk_tokens: int,
) -> list[PrefillPiece]:
    """Returns the prompt pieces for the next step, in order.

    Args:
        waiting: sequences whose prompt isn't complete, in order, with the prompt tokens still to compute.
        num_decoding: sequences that decode one token each in the same step.
        max_step_tokens: most tokens of any kind in one step (bounds activation memory); at least 1.
        max_chunk_tokens: most prompt tokens while num_decoding > 0; 0 for no limit of its own.

    Every step computes at least one prompt token if any is waiting, so that prompts never starve behind decodes.
    """
    budget = max(max_step_tokens - num_decoding, 1)
    if num_decoding and max_chunk_tokens:
        budget = min(budget, max_chunk_tokens)
    pieces: list[PrefillPiece] = []
    for request_id, remaining in waiting:
        if budget <= 0:
            break
        num_tokens = min(remaining, budget)
        pieces.append(PrefillPiece(request_id, num_tokens))
        budget -= num_tokens
    return pieces
