"""Padding that batches would cost an engine that pads, by both readings of the paper's formula 3."""

from __future__ import annotations

from dataclasses import dataclass

from bucketserve.core.types import Batch

__all__ = ["Waste", "WasteBook"]


@dataclass(frozen=True, slots=True)
class Waste:
    """Shares, 0 to 1."""

    relative: float
    """Mean over requests of 1 - S / bound."""
    padded_share: float
    """Padding / all padded tokens."""


class WasteBook:
    """Counts the batches that were dispatched."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._num_requests = 0
        self._relative = 0.0
        self._prefill_tokens = 0
        self._padded_tokens = 0

    def add(self, batch: Batch) -> None:
        """Notes a batch."""
        number = len(batch.request_ids)
        self._num_requests += number
        self._relative += number - batch.prefill_tokens * number / batch.padded_tokens
        self._prefill_tokens += batch.prefill_tokens
        self._padded_tokens += batch.padded_tokens

    def observed(self) -> Waste:
        """Returns the waste so far."""
        if not self._num_requests:
            return Waste(0.0, 0.0)
        return Waste(self._relative / self._num_requests, 1 - self._prefill_tokens / self._padded_tokens)
