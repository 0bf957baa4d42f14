"""Algorithm 1 and formulas 1 to 6 of the BucketServe paper (arXiv 2507.17120), as published.

Kept for comparison: what is wrong with it (one-sided split test, one count for all buckets, no hysteresis) is part of
the comparison. Formula 4 is not an optimum of formula 3; it is here as printed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bucketserve.core.types import Bucket

__all__ = [
    "THETA",
    "algorithm_1",
    "expected_waste_relative",
    "expected_waste_tokens",
    "kv_bytes",
    "n_max",
    "safe_memory",
    "upper_bound",
    "waste_ratio",
]

THETA = 0.5
"""A bucket splits when more than this share of it lies below its middle."""


def kv_bytes(num_layers: int, num_heads: int, head_dim: int, max_tokens: int, bytes_per_value: int, batch: int) -> int:
    """Formula 1: KV memory of a padded batch, in bytes."""
    return 2 * num_layers * num_heads * head_dim * max_tokens * bytes_per_value * batch


def waste_ratio(lengths: Sequence[int]) -> float:
    """Formula 2: (S_max - S_avg) / S_max of a batch padded to its longest member."""
    longest = max(lengths)
    return (longest - sum(lengths) / len(lengths)) / longest


def expected_waste_relative(lengths: Sequence[int], edges: Sequence[int]) -> float:
    """Formula 3, per-request reading: mean over requests of 1 - S / U_b.

    Args:
        lengths: a sample of prompt lengths, each below the last edge.
        edges: upper edges of the buckets, exclusive, ascending; a bucket's bound U_b is its longest length, edge - 1.
    """
    return sum(1 - length / _bound(length, edges) for length in lengths) / len(lengths)


def expected_waste_tokens(lengths: Sequence[int], edges: Sequence[int]) -> float:
    """Formula 3, padded-token reading: 1 - sum of S / sum of U_b."""
    return 1 - sum(lengths) / sum(_bound(length, edges) for length in lengths)


def upper_bound(lengths: Sequence[int]) -> float:
    """Formula 4: the conditional expectation of the lengths in a bucket."""
    return sum(lengths) / len(lengths)


def safe_memory(free: int, reserve: float = 0.1) -> int:
    """Formula 5: M_safe = (1 - reserve) x M_remain, in the unit of `free`."""
    return int(free * (1 - reserve))


def n_max(safe_tokens: int, longest_tokens: int) -> int:
    """Formula 6 with S_max for every request: the most requests whose KV fits; at least 1."""
    return max(safe_tokens // max(longest_tokens, 1), 1)


def algorithm_1(
    edges: Sequence[int],
    max_requests: int,
    theta: float,
    count: Callable[[Bucket], int],
    count_below: Callable[[Bucket, int], int],
) -> tuple[int, ...]:
    """Returns the new upper edges.

    Fewer than max_requests (N_max) waiting: one bucket. Otherwise each bucket with more than N_max requests, of which
    more than theta lie below its middle, is split there; one level per call, as in the paper's loop.
    """
    low, buckets = 0, []
    for high in edges:
        buckets.append(Bucket(low, high))
        low = high
    if sum(count(bucket) for bucket in buckets) < max_requests:
        return (edges[-1],)
    new: list[int] = []
    for bucket in buckets:
        number, middle = count(bucket), (bucket.low + bucket.high) // 2
        if number > max_requests and bucket.low < middle and count_below(bucket, middle) / number > theta:
            new.append(middle)
        new.append(bucket.high)
    return tuple(new)


def _bound(length: int, edges: Sequence[int]) -> int:
    return next(edge for edge in edges if length < edge) - 1
