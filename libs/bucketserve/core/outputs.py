"""How long outputs are, learned from those that ended: what a client allows (max_tokens) is often several times that.

Outputs are counted by class and by length cell of the prompt, in cells half an octave wide, and old counts fade. A
request counts with a quantile of the outputs of its kind; one that has generated more than that already, with the
quantile among those that were longer still (LightLLM's Past-Future scheduler, arXiv 2507.10150).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate

from bucketserve.core.types import Request, RequestClass

__all__ = ["OutputBook"]

NUM_CELLS = 44
"""Of outputs: up to about four million tokens."""
BOUNDS = tuple(round(2 ** (cell / 2)) for cell in range(1, NUM_CELLS + 1))
"""Greatest output of each cell."""
FEW = 20
"""Below so many samples of a kind all kinds of its class are asked together; below that again nothing is known."""
UNKNOWN_SHARE = 0.25
"""Of what it may generate, for an interactive request of a kind of which nothing is known. Batch class counts in full:
a job begins all at once, and if it grows beyond what was thought, all of it is let go until nobody may be let go any
more (core/preemption.py), and nothing is left to give to others."""
MOST = 1_000
"""At so many samples of a kind its counts are halved: what outputs are like changes."""
SAVE_S = 10.0
"""Least time between two writes to the store."""


class _Counts:
    """Outputs of one kind by cell."""

    __slots__ = ("_behind", "by_cell", "total")

    def __init__(self, by_cell: Sequence[int] = ()) -> None:
        self.by_cell = [*by_cell, *[0] * (NUM_CELLS - len(by_cell))][:NUM_CELLS]
        self.total = sum(self.by_cell)
        self._behind: list[int] | None = None

    def add(self, cell: int) -> None:
        self.by_cell[cell] += 1
        self.total += 1
        if self.total >= MOST:
            self.by_cell = [number // 2 for number in self.by_cell]
            self.total = sum(self.by_cell)
        self._behind = None

    def quantile(self, share: float, generated: int) -> int | None:
        """Returns that quantile of the outputs longer than `generated`; None if none was."""
        if self._behind is None:
            self._behind = list(accumulate(self.by_cell))
        first = bisect_left(BOUNDS, generated + 1)
        shorter = self._behind[first - 1] if first else 0
        longer = self.total - shorter
        if not longer:
            return None
        return BOUNDS[bisect_left(self._behind, shorter + share * longer)]


class OutputBook:
    """What is known of the outputs of a model."""

    def __init__(self, share: float) -> None:
        """share: the quantile that requests count with, in (0, 1)."""
        self._share = share
        self._counts: dict[str, _Counts] = {}
        self._changed: set[str] = set()
        self._save_s = 0.0

    def restore(self, counts: Mapping[str, Sequence[int]]) -> None:
        """Takes over what a store holds."""
        for kind, by_cell in counts.items():
            self._counts[kind] = _Counts(by_cell)

    def ended(self, request: Request, output_tokens: int) -> None:
        """Learns from an output that is complete. Those of resumed attempts are parts, and say nothing."""
        if request.is_resumed or output_tokens < 1:
            return
        cell = bisect_left(BOUNDS, output_tokens)
        for kind in (_kind(request), request.request_class.value):
            self._counts.setdefault(kind, _Counts()).add(min(cell, NUM_CELLS - 1))
            self._changed.add(kind)

    def expected(self, request: Request, generated: int = 0) -> int:
        """Returns how many tokens a request is likely to generate, of which it has that many; at most what it may.

        One that is longer than any before counts with twice what it has; one that was let go before in full: it may be
        let go only once more.
        """
        most = likely = request.max_new_tokens
        if request.num_preemptions:
            return most
        if request.request_class is RequestClass.INTERACTIVE:
            likely = int(most * UNKNOWN_SHARE)
        for kind in (_kind(request), request.request_class.value):
            counts = self._counts.get(kind)
            if counts is not None and counts.total >= FEW:
                likely = counts.quantile(self._share, generated) or 0
                break
        return min(max(likely or 2 * generated, generated + 1), most)

    def to_save(self, now_s: float) -> Mapping[str, tuple[int, ...]]:
        """Returns what has changed since it was asked last, if that is a while ago."""
        if not self._changed or now_s < self._save_s:
            return {}
        self._save_s = now_s + SAVE_S
        changed = {kind: tuple(self._counts[kind].by_cell) for kind in sorted(self._changed)}
        self._changed.clear()
        return changed


def _kind(request: Request) -> str:
    """Returns the name of a request's class and of its prompt's length cell, an octave wide."""
    short = "b" if request.request_class is RequestClass.BATCH else "i"
    return f"{short}{request.prompt_tokens.bit_length()}"
