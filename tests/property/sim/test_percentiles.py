"""Percentiles are those of numpy's inverted distribution function, for every number of values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bucketserve.sim.percentiles import Percentiles, nearest_rank

values = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=300)


@given(values, st.integers(1, 100))
@example([1.0, 2.0], 50)
@example([float(i) for i in range(100)], 7)
@example([float(i) for i in range(10)], 90)
@example([float(i) for i in range(100)], 99)
def test_nearest_rank_is_the_inverted_distribution_function(seen: list[float], percent: int) -> None:
    reference = np.array(sorted(seen))[-(-percent * len(seen) // 100) - 1]
    assert nearest_rank(seen, percent) == reference
    # numpy computes the rank in floating point: it agrees wherever that is exact.
    if percent * len(seen) % 100:
        assert nearest_rank(seen, percent) == np.percentile(seen, percent, method="inverted_cdf")


@given(values)
def test_percentiles_of_a_sample(seen: list[float]) -> None:
    found = Percentiles.of(seen)
    assert [found.p50, found.p90, found.p99] == [
        pytest.approx(np.percentile(seen, percent, method="inverted_cdf")) for percent in (50, 90, 99)
    ]
    assert found.mean == pytest.approx(np.mean(seen), rel=1e-9, abs=1e-3)


def test_nothing_measured_is_zero() -> None:
    assert Percentiles.of([]) == Percentiles(0.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="no values"):
        nearest_rank([], 50)
