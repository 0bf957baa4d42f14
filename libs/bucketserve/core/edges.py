"""The buckets in force, and when they change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bucketserve.core.adaptive import LengthHistogram, best_edges, edges_cost, expected_waste
from bucketserve.core.lanes import Lanes
from bucketserve.core.paper import THETA, algorithm_1, n_max
from bucketserve.core.settings import CoreSettings, EdgeRule
from bucketserve.core.types import Bucket
from bucketserve.core.waste import Waste
from bucketserve.core.workers import WorkerState

__all__ = ["EdgeChooser"]

INITIAL_EDGES = (256, 1024, 4096, 16384)
"""Before anything has arrived: enough to keep short prompts from waiting for long ones."""
MIN_ARRIVALS = 32
"""Arrivals before the histogram is believed."""
HALF_LIFE_S = 30.0
"""Of an arrival in the histogram."""
LOOK_S = 0.25
"""Least time between two evaluations of the edges."""
COOLDOWN_S = 5.0
"""Adaptive: least time between two changes."""
GAIN = 0.1
"""Adaptive: least relative gain for a change (hysteresis)."""
MAX_BUCKETS = 8
MIN_SHARE = 0.05
"""Adaptive: least share of the arriving requests in a bucket."""


class EdgeChooser:
    """Owns the edges; the last one is always the context length + 1."""

    def __init__(self, settings: CoreSettings, context_tokens: int) -> None:
        """Starts with one bucket, or, adaptive, with round edges until arrivals have been seen."""
        self._settings = settings
        self._last_edge = context_tokens + 1
        self._histogram = LengthHistogram(context_tokens, HALF_LIFE_S)
        self._next_s = 0.0
        self._interval_s = LOOK_S
        self._changed_s = float("-inf")
        self._num_arrivals = 0
        first = INITIAL_EDGES if settings.edges is EdgeRule.ADAPTIVE else ()
        self.edges: tuple[int, ...] = (*(edge for edge in first if edge < self._last_edge - 1), self._last_edge)
        self.buckets: tuple[Bucket, ...] = _buckets(self.edges)

    def extend(self, context_tokens: int, waiting: Lanes) -> None:
        """Covers lengths up to context_tokens, which is more than before; the last bucket grows."""
        self._last_edge = context_tokens + 1
        self._histogram.extend(context_tokens)
        waiting.extend(context_tokens)
        self._set((*self.edges[:-1], self._last_edge), waiting)

    def restore(self, edges: Sequence[int], waiting: Lanes) -> None:
        """Takes edges over from a store."""
        kept = sorted({edge for edge in edges if 0 < edge < self._last_edge})
        self._set((*kept, self._last_edge), waiting)

    def arrived(self, length: int, now_s: float) -> None:
        """Notes an arrival's prefill length."""
        self._num_arrivals += 1
        self._histogram.add(length, now_s)

    def predicted_waste(self) -> Waste:
        """Returns the waste of prompts padded to their bucket's upper edge, over the lengths that arrive."""
        return expected_waste(self._histogram, self.edges)

    def update(self, waiting: Lanes, workers: Iterable[WorkerState], now_s: float) -> bool:
        """Looks at the edges if it is time to; returns whether they changed."""
        if now_s < self._next_s or self._settings.edges is EdgeRule.NONE:
            return False
        self._next_s = now_s + self._interval_s
        if self._settings.edges is EdgeRule.PAPER:
            edges = self._paper_edges(waiting, list(workers))
        else:
            edges = self._adaptive_edges(now_s)
        if edges == self.edges:
            return False
        self._set(edges, waiting)
        self._changed_s = now_s
        return True

    def _paper_edges(self, waiting: Lanes, workers: Sequence[WorkerState]) -> tuple[int, ...]:
        if not workers:
            return self.edges
        safe_tokens = max(worker.safe_tokens(self._settings.memory_reserve) for worker in workers)
        return algorithm_1(
            self.edges,
            n_max(safe_tokens, waiting.longest()),
            THETA,
            lambda bucket: waiting.count(bucket)[0],
            waiting.count_below,
        )

    def _adaptive_edges(self, now_s: float) -> tuple[int, ...]:
        if self._num_arrivals < MIN_ARRIVALS or now_s - self._changed_s < COOLDOWN_S:
            return self.edges
        edges, cost = best_edges(
            self._histogram,
            max_buckets=MAX_BUCKETS,
            min_share=MIN_SHARE,
        )
        present = edges_cost(self._histogram, self.edges)
        # Hysteresis: a change must be worth it, or edges would follow the noise of arrivals.
        if cost < present * (1 - GAIN):
            self._interval_s = LOOK_S
            return edges
        # Nothing to gain: look again later and later, so that the programme stays a small share of the time.
        self._interval_s = min(self._interval_s * 2, COOLDOWN_S)
        return self.edges

    def _set(self, edges: tuple[int, ...], waiting: Lanes) -> None:
        for edge in edges[:-1]:
            waiting.split_at(edge)
        self.edges = edges
        self.buckets = _buckets(edges)


def _buckets(edges: Sequence[int]) -> tuple[Bucket, ...]:
    return tuple(Bucket(low, high) for low, high in zip((0, *edges[:-1]), edges, strict=True))
