"""How a worker composes one forward pass: decodes ride along, prompts fill the rest in chunks.

Used by the engines and by the simulator's workers, so that a step means the same in both. Chunked prefill beside
running decodes follows Sarathi-Serve (arXiv 2403.02310); the budget comes from the scheduler and from the TPOT
targets of what decodes (core/pace.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TypeVar

from bucketserve.core.types import RequestId

__all__ = [
    "CPU_STEP_TOKENS",
    "MAX_SEQUENCES",
    "STEP_TOKENS",
    "PrefillPiece",
    "by_turn",
    "cpu_step_tokens",
    "plan_prefill",
]

T = TypeVar("T")

MAX_SEQUENCES = 256
"""Sequences that a worker runs at once unless it is told otherwise, simulated ones as well."""
STEP_TOKENS = 2048
"""Most tokens of any kind in one of its steps."""
CPU_STEP_TOKENS = 256
"""The same on a CPU, at least."""
CPU_STEP_S = 0.5
"""A CPU is nearly as fast with steps of 256 tokens as with 2,048, and whoever comes waits for one to end: its size is
what takes about this long, within bounds."""


@dataclass(frozen=True, slots=True)
class PrefillPiece:
    """Prompt tokens of one sequence to compute in this step."""

    request_id: RequestId
    num_tokens: int


def cpu_step_tokens(token_s: float, most_tokens: float = STEP_TOKENS) -> int:
    """Returns the most tokens of a step, a power of two, so that it takes about CPU_STEP_S on a CPU.

    Args:
        token_s: seconds that a prompt token takes.
        most_tokens: for how many there is memory.
    """
    tokens = CPU_STEP_TOKENS
    while 2 * tokens <= min(most_tokens, STEP_TOKENS) and 1.5 * tokens * token_s < CPU_STEP_S:
        tokens *= 2
    return tokens


def by_turn(waiting: Sequence[T], remaining: Callable[[T], int]) -> list[T]:
    """Returns prompts in the order in which a shared step gives them tokens: the first that came, then the shortest.

    Args:
        waiting: in the order in which they came.
        remaining: prompt tokens of one that are still to compute.
    """
    return [*waiting[:1], *sorted(waiting[1:], key=remaining)]


def plan_prefill(
    waiting: Iterable[tuple[RequestId, int]],
    *,
    num_decoding: int,
    max_step_tokens: int,
    max_chunk_tokens: int,
    is_shared: bool = True,
) -> list[PrefillPiece]:
    """Returns the prompt pieces for the next step.

    Args:
        waiting: sequences whose prompt isn't complete, in order, with the prompt tokens still to compute.
        num_decoding: sequences that decode one token each in the same step.
        max_step_tokens: most tokens of any kind in one step (bounds activation memory); at least 1.
        max_chunk_tokens: most prompt tokens while num_decoding > 0; 0 for no limit of its own.
        is_shared: whether the first in order gets only half of the step while others wait; the rest goes to the
            shortest. Else everything goes in order.

    Shared, a short prompt does not wait until long ones that came before it are computed, and a long one takes at most
    twice as long for the short ones that come after it.

    Every step computes at least one prompt token if any is waiting, so that prompts never starve behind decodes.
    """
    budget = max(max_step_tokens - num_decoding, 1)
    if num_decoding and max_chunk_tokens:
        budget = min(budget, max_chunk_tokens)
    queue = list(waiting)
    given: dict[RequestId, int] = {}
    if is_shared and len(queue) > 1:
        (first, remaining), *others = by_turn(queue, itemgetter(1))
        given[first] = min(remaining, (budget + 1) // 2)
        budget -= given[first]
        # What the others leave goes to the first again.
        queue = [*others, (first, remaining - given[first])]
    for request_id, remaining in queue:
        if budget <= 0:
            break
        num_tokens = min(remaining, budget)
        if num_tokens:
            given[request_id] = given.get(request_id, 0) + num_tokens
        budget -= num_tokens
    return [PrefillPiece(request_id, num_tokens) for request_id, num_tokens in given.items()]
