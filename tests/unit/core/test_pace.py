"""Prompt tokens beside sequences that were promised a TPOT."""

from __future__ import annotations

import pytest

from bucketserve.core.pace import MIN_TOKENS, StepPace
from bucketserve.core.types import StepSample

FIXED_S, TOKEN_S = 0.010, 0.001


def worker(*steps: int) -> StepPace:
    """One that has measured steps with so many prompt tokens beside one decode."""
    pace = StepPace()
    for tokens in steps:
        sample = StepSample(
            prefill_tokens=tokens,
            prefill_attention=0,
            decode_sequences=1,
            decode_context_tokens=100,
            duration_s=FIXED_S + TOKEN_S * tokens,
        )
        pace.learn(sample)
    return pace


def tokens(pace: StepPace, *promised: tuple[float, float, int], now_s: float = 0.0) -> int:
    return pace.prompt_tokens(promised, num_decoding=1, context_tokens=100, prompt_end=0, now_s=now_s)


KNOWN = (*[0, 64, 128, 256, 512] * 20,)


def test_without_a_promise_there_is_no_limit() -> None:
    assert tokens(worker(*KNOWN)) == 0


def test_a_step_ends_when_the_next_token_is_due() -> None:
    # Its second token is due 50 ms after its first: 10 ms for the decode, 1 ms for each prompt token.
    assert tokens(worker(*KNOWN), (0.050, 0.0, 1)) == pytest.approx(40, abs=3)
    assert tokens(worker(*KNOWN), (0.200, 0.0, 1), (0.050, 0.0, 1)) == pytest.approx(40, abs=3)


def test_who_is_ahead_lends_up_to_one_target_more() -> None:
    assert tokens(worker(*KNOWN), (0.050, 0.0, 2), now_s=0.020) == pytest.approx(70, abs=4)
    assert tokens(worker(*KNOWN), (0.050, 0.0, 9), now_s=0.020) == pytest.approx(90, abs=5)


def test_who_is_late_gets_steps_of_its_target_and_prompts_go_on() -> None:
    assert tokens(worker(*KNOWN), (0.050, 0.0, 2), now_s=9.0) == pytest.approx(40, abs=3)
    assert tokens(worker(*KNOWN), (0.012, 0.0, 2), now_s=9.0) == MIN_TOKENS


def test_a_promise_that_decodes_alone_would_break_limits_nobody() -> None:
    assert tokens(worker(*KNOWN), (0.005, 0.0, 1)) == 0


def test_what_was_never_measured_is_approached_in_steps() -> None:
    # Nothing is known of prompts but twenty tokens: the first chunk of a long document is not a leap in the dark.
    assert tokens(worker(20), (5.0, 0.0, 1)) == 40
    assert tokens(worker(20, 40), (5.0, 0.0, 1)) == 80
    assert tokens(StepPace(), (5.0, 0.0, 1)) == MIN_TOKENS
