"""Bucket edges by exact dynamic programme over a decayed histogram of arriving lengths.

The paper says that the optimum is too expensive and bisects instead; on a binned histogram it costs milliseconds and is
needed every few seconds. The objective, additive over buckets, is what an engine that pads computes in vain when every
prompt is padded to the longest of its bucket. One that pads nothing loses nothing by it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from bucketserve.core.waste import Waste

__all__ = ["LengthHistogram", "best_edges", "edges_cost", "expected_waste"]

BUCKET_PENALTY = 0.02
"""A further bucket must save this share of the whole cost of one bucket: buckets split the supply of batches."""


FADED_SHARE = 1e-4
"""Lengths with less than this share of the weight are forgotten: a long one would count with its length for ever."""


class LengthHistogram:
    """Arriving lengths, binned, older ones fading with a half-life."""

    def __init__(self, context_tokens: int, half_life_s: float, bins_per_octave: int = 4) -> None:
        """Covers lengths 0 to context_tokens; half_life_s in seconds."""
        self._grid = sorted({round(2 ** (i / bins_per_octave)) for i in range(40 * bins_per_octave)})
        self.highs = [edge for edge in self._grid if 1 < edge <= context_tokens] + [context_tokens + 1]
        self._half_life_s = half_life_s
        self._since_s = 0.0
        self._weight = 1.0
        n = len(self.highs)
        self.counts = [0.0] * n
        self.tokens = [0.0] * n
        self.longest = [0] * n

    def extend(self, context_tokens: int) -> None:
        """Covers lengths up to context_tokens, which is more than before."""
        further = [edge for edge in self._grid if self.highs[-1] <= edge <= context_tokens]
        self.highs[-1:] = [*further, context_tokens + 1]
        for values in (self.counts, self.tokens):
            values.extend([0.0] * len(further))
        self.longest += [0] * len(further)

    def add(self, length: int, now_s: float) -> None:
        """Notes an arrival. Later arrivals weigh more, which is the same as older ones fading, but O(1)."""
        elapsed_s = now_s - self._since_s
        if elapsed_s > 20 * self._half_life_s:
            self._rescale(now_s)
            elapsed_s = 0.0
        weight = 2.0 ** (elapsed_s / self._half_life_s)
        i = bisect_right(self.highs, length)
        self.counts[i] += weight
        self.tokens[i] += weight * length
        self.longest[i] = max(self.longest[i], length)

    def _rescale(self, now_s: float) -> None:
        factor = 2.0 ** (-min((now_s - self._since_s) / self._half_life_s, 1000.0))
        for values in (self.counts, self.tokens):
            values[:] = [value * factor if value * factor > 1e-9 else 0.0 for value in values]
        self._since_s = now_s


def best_edges(histogram: LengthHistogram, *, max_buckets: int, min_share: float) -> tuple[tuple[int, ...], float]:
    """Returns (upper edges, cost) of the cheapest partition into at most max_buckets buckets.

    Every bucket holds at least min_share of the weight. Bins x bins x buckets steps; the last edge is the context
    length + 1.
    """
    prefix = _Prefix(histogram)
    n, total = len(histogram.highs), prefix.count[-1]
    if total <= 0:
        return (histogram.highs[-1],), 0.0
    least = min_share * total
    # Only the ends of bins in use can be edges worth having.
    ends = [0, *(i + 1 for i in prefix.used[:-1]), n]
    whole = prefix.cost(0, n)
    penalty = BUCKET_PENALTY * whole
    infinity = float("inf")
    best: list[list[float]] = [[infinity] * len(ends) for _ in range(max_buckets + 1)]
    cut: list[list[int]] = [[0] * len(ends) for _ in range(max_buckets + 1)]
    best[0][0] = 0.0
    for k in range(1, max_buckets + 1):
        for j in range(1, len(ends)):
            for i in range(j):
                if best[k - 1][i] == infinity or prefix.count[ends[j]] - prefix.count[ends[i]] < least:
                    continue
                value = best[k - 1][i] + prefix.cost(ends[i], ends[j]) + penalty
                if value < best[k][j]:
                    best[k][j], cut[k][j] = value, i
    k = min(range(1, max_buckets + 1), key=lambda k: best[k][-1])
    if best[k][-1] == infinity:
        return (histogram.highs[-1],), whole
    edges: list[int] = []
    j = len(ends) - 1
    for level in range(k, 0, -1):
        edges.append(histogram.highs[ends[j] - 1])
        j = cut[level][j]
    return tuple(reversed(edges)), best[k][-1]


def edges_cost(histogram: LengthHistogram, edges: Sequence[int]) -> float:
    """Returns the cost of given edges, comparable with best_edges; an edge inside a bin counts as the bin's end."""
    prefix = _Prefix(histogram)
    n = len(histogram.highs)
    penalty = BUCKET_PENALTY * prefix.cost(0, n)
    cost, start = 0.0, 0
    for edge in edges:
        end = min(bisect_right(histogram.highs, edge - 1) + 1, n)
        if end > start:
            cost += prefix.cost(start, end) + penalty
            start = end
    return cost


def expected_waste(histogram: LengthHistogram, edges: Sequence[int]) -> Waste:
    """Returns formula 3 in both readings over the histogram; a bin counts with its mean length."""
    total = sum(histogram.counts)
    if total <= 0:
        return Waste(0.0, 0.0)
    relative = tokens = padded = 0.0
    for count, length_sum in zip(histogram.counts, histogram.tokens, strict=True):
        if count > 0:
            mean = length_sum / count
            bound = next(edge for edge in edges if mean < edge) - 1 or 1
            relative += count * (1 - mean / bound)
            tokens, padded = tokens + length_sum, padded + count * bound
    return Waste(max(relative / total, 0.0), max(1 - tokens / padded, 0.0))


class _Prefix:
    """Prefix sums, for the cost of a range of bins in O(1)."""

    def __init__(self, histogram: LengthHistogram) -> None:
        least = FADED_SHARE * sum(histogram.counts)
        self.used = [i for i, count in enumerate(histogram.counts) if count > least]
        counts, tokens = ([0.0] * len(histogram.counts) for _ in range(2))
        # The longest length below each bin's end: in a range with requests it is the range's longest.
        longest = [0] * len(counts)
        for i in self.used:
            counts[i], tokens[i], longest[i] = histogram.counts[i], histogram.tokens[i], histogram.longest[i]
        self._longest = [0, *accumulate(longest, max)]
        self.count, self._tokens = _sums(counts), _sums(tokens)

    def cost(self, start: int, end: int) -> float:
        count = self.count[end] - self.count[start]
        if count <= 0:
            return 0.0
        return count * self._longest[end] - (self._tokens[end] - self._tokens[start])


def _sums(values: Sequence[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))
