"""How large steps and the KV budget are while memory is short, and how they come back."""

from __future__ import annotations

import time

import torch

__all__ = ["MemoryPressure", "is_out_of_memory"]

MIN_STEP_TOKENS = 16
LOWERED_BUDGET = 0.9
CALM_STEPS = 100
CALM_S = 10.0
"""Steps without a shortage, or time at whose end there is nothing to compute, after which the limits are raised again,
as far as one shortage lowered them."""


class MemoryPressure:
    """Lowers both limits, once for each step that ran out of memory, and raises them again when it was calm."""

    def __init__(self, max_step_tokens: int, budget_tokens: int) -> None:
        """Takes the limits that hold while memory suffices."""
        self._most = max_step_tokens, budget_tokens
        self.max_step_tokens = max_step_tokens
        self.budget_tokens = budget_tokens
        self.num_out_of_memory = 0
        self._num_calm = 0
        self._changed_s = time.monotonic()

    def note(self, *, ran_out: bool) -> None:
        """Takes how a step went."""
        step, _ = self._most
        if ran_out:
            self.num_out_of_memory += 1
            self._num_calm, self._changed_s = 0, time.monotonic()
            self.max_step_tokens = max(self.max_step_tokens // 2, min(MIN_STEP_TOKENS, step))
            self.budget_tokens = int(self.budget_tokens * LOWERED_BUDGET)
            return
        self._num_calm += 1
        if self._num_calm >= CALM_STEPS:
            self._raise()

    def idle(self) -> None:
        """Takes that there is nothing to compute, now."""
        if time.monotonic() - self._changed_s >= CALM_S:
            self._raise()

    def _raise(self) -> None:
        step, budget = self._most
        self._num_calm, self._changed_s = 0, time.monotonic()
        self.max_step_tokens = min(self.max_step_tokens * 2, step)
        self.budget_tokens = min(int(self.budget_tokens / LOWERED_BUDGET) + 1, budget)


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that memory could not be had: on CPU torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
