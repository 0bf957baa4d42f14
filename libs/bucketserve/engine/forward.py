"""One forward pass over a packed step: what the packed engine asks of its model."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from bucketserve.engine.attention import AttentionCall, Planner, Segment, Step, running_step
from bucketserve.engine.kv_memory import PAGE_TOKENS, KvMemory

__all__ = ["EagerForward", "Forward", "PackedTokens", "run_model"]


@dataclass(slots=True)
class PackedTokens:
    """The new tokens of a step, sequence after sequence."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    table: array[int] = field(default_factory=lambda: array("q"))
    """See attention.StepPlan."""
    last: list[int] = field(default_factory=list)
    """Those whose logits are wanted."""

    def add(self, ids: Sequence[int], start: int, pages: Sequence[int], *, wants_logits: bool) -> None:
        """Takes new tokens of one sequence, the first at position `start`, and its pages."""
        end = start + len(ids)
        self.segments.append(Segment(len(self.ids), len(ids), len(self.table) * PAGE_TOKENS, end))
        self.table.extend(pages)
        self.ids += ids
        self.positions += range(start, end)
        if wants_logits:
            self.last.append(len(self.ids) - 1)


class Forward(Protocol):
    """Runs a model over a packed step."""

    def __call__(self, tokens: PackedTokens) -> torch.Tensor | None:
        """Returns logits [rows, vocabulary] in float32 for tokens.last, or None if that is empty."""


class EagerForward:
    """See Forward; calls the model."""

    def __init__(self, model: Any, memory: KvMemory, calls: Mapping[int, AttentionCall], planner: Planner) -> None:
        """Takes a model whose attention is bucketserve.engine.attention, and what its layers ask of it."""
        self.model = model
        self._memory = memory
        self._calls = calls
        self._planner = planner
        self._device = memory.keys[0].device

    def __call__(self, tokens: PackedTokens) -> torch.Tensor | None:
        """See Forward."""
        plan = self._planner(self._memory, self._calls, tokens.segments, tokens.table)
        # At least one row is asked for.
        inputs = (tokens.ids, tokens.positions, tokens.last or [0])
        logits = run_model(self.model, plan, *(torch.tensor(each, device=self._device) for each in inputs))
        return logits.float() if tokens.last else None


def run_model(
    model: Any, plan: Step, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | int
) -> torch.Tensor:
    """Returns logits [rows, vocabulary]: they cost hidden x vocabulary each, so only those that are wanted.

    Args:
        model: whose attention is bucketserve.engine.attention.
        plan: what serves it.
        ids: [tokens].
        positions: [tokens] in their sequences.
        rows: the tokens whose logits are wanted, or how many of the last ones.
    """
    with running_step(plan):
        output = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows)
    logits: torch.Tensor = output.logits[0]
    return logits
