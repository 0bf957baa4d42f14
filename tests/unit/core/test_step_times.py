"""The fit of step times stays sane, whatever is measured for however long."""

from __future__ import annotations

import random

import pytest

from bucketserve.core.step_times import StepTimes
from bucketserve.core.types import StepSample


def sample(prompts: list[int], contexts: list[int], duration_s: float) -> StepSample:
    return StepSample(
        prefill_tokens=sum(prompts),
        prefill_attention=sum(length * length for length in prompts),
        decode_sequences=len(contexts),
        decode_context_tokens=sum(contexts),
        duration_s=duration_s,
    )


@pytest.mark.parametrize("seed", range(5))
def test_steps_of_microseconds_that_hardly_differ_do_not_make_it_run_away(seed: int) -> None:
    # A tiny engine, one-token prompts, now and then a step that another program interrupted.
    rng, times = random.Random(seed), StepTimes()
    for _ in range(20_000):
        prompts = [1] * rng.choice([0, 0, 1, 1, 2])
        contexts = [rng.randint(2, 30) for _ in range(rng.choice([0, 1, 1, 3]))]
        if not prompts and not contexts:
            continue
        slow = rng.uniform(0.8, 1.3) * (rng.uniform(10, 2000) if rng.random() < 0.02 else 1.0)
        times.learn(sample(prompts, contexts, (15e-6 + 2e-6 * len(contexts)) * slow))
        assert times.prefill_s(3) < 0.1
        assert times.decode_s(3, 60) < 0.1


def test_it_finds_the_coefficients_again() -> None:
    rng, times = random.Random(1), StepTimes()
    for _ in range(3000):
        prompts = [rng.randint(10, 800) for _ in range(rng.randint(0, 3))]
        contexts = [rng.randint(10, 1500) for _ in range(rng.randint(0, 20))]
        now = sample(prompts, contexts, 1.0)
        duration_s = (
            0.004
            + 2e-4 * now.prefill_tokens
            + 3e-8 * now.prefill_attention
            + 4e-7 * now.decode_context_tokens
            + 5e-4 * now.decode_sequences
        )
        times.learn(sample(prompts, contexts, duration_s * rng.uniform(0.95, 1.05)))
    assert times.prefill_s(500) == pytest.approx(0.004 + 0.1 + 0.0075, rel=0.05)
    assert times.decode_s(16, 12_000) == pytest.approx(0.004 + 0.0048 + 0.008, rel=0.05)
    assert times.relative_error < 0.06
