"""Percentiles by nearest rank: each is a value that occurred. The one way in which this project takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["Percentiles", "nearest_rank", "worst_tenth"]


def nearest_rank(values: Sequence[float], percent: int) -> float:
    """Returns the smallest value that at least `percent` (1 to 100) of all values do not exceed.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    # Exact: 0.07 * 100 is more than 7.
    return sorted(values)[math.ceil(Fraction(percent, 100) * len(values)) - 1]


def worst_tenth(values: Sequence[float]) -> float:
    """Returns the mean of the largest tenth of the values, at least of one; 0 if there are none."""
    if not values:
        return 0.0
    number = math.ceil(len(values) / 10)
    return math.fsum(sorted(values)[-number:]) / number


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds. All 0 where nothing was measured."""

    p50: float
    p90: float
    p99: float
    mean: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Returns the percentiles and the mean."""
        if not values:
            return cls(0.0, 0.0, 0.0, 0.0)
        p50, p90, p99 = (nearest_rank(values, percent) for percent in (50, 90, 99))
        return cls(p50, p90, p99, math.fsum(values) / len(values))
