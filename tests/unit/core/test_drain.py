"""The measured rate at which the queue empties."""

from __future__ import annotations

import random

import pytest

from bucketserve.core.drain import DrainRate

STEP_S, SIDE_BY_SIDE, TOKENS = 0.2, 8, 20
PER_S = SIDE_BY_SIDE * TOKENS / STEP_S


def serve(drain: DrainRate, from_s: float, num_requests: int) -> None:
    """Requests that run eight at a time and end together, give or take some milliseconds."""
    rng = random.Random(1)
    at_s = sorted(STEP_S * (1 + number // SIDE_BY_SIDE) + rng.uniform(0, 0.005) for number in range(num_requests))
    for each_s in at_s:
        drain.finished(TOKENS, from_s + each_s)


@pytest.mark.parametrize("num_requests", [16, 32, 96, 1000])
def test_what_ends_together_is_counted_with_the_time_it_took(num_requests: int) -> None:
    drain = DrainRate()
    serve(drain, 0.0, num_requests)
    assert drain.seconds_for(round(PER_S)) == pytest.approx(1.0, rel=0.1)


def test_time_in_which_nothing_waits_is_not_counted() -> None:
    drain = DrainRate()
    for hour in range(5):
        serve(drain, 3600.0 * hour, 40)
        drain.pause()
        # Now and then a request, each served at once.
        for second in range(60, 600, 30):
            drain.finished(TOKENS, 3600.0 * hour + second)
            drain.pause()
    assert drain.seconds_for(round(PER_S)) == pytest.approx(1.0, rel=0.05)


def test_it_follows_what_the_workers_can_do() -> None:
    drain = DrainRate()
    serve(drain, 0.0, 1000)
    # Half as fast from then on, for three time constants.
    for number in range(150):
        drain.finished(SIDE_BY_SIDE * TOKENS, 26.0 + 2 * STEP_S * number)
    assert drain.seconds_for(round(PER_S)) == pytest.approx(2.0, rel=0.1)


def test_nothing_waits_or_nothing_is_known() -> None:
    drain = DrainRate()
    assert drain.seconds_for(0) == 0.0
    assert drain.seconds_for(1_000_000) == 1.0
