"""What is known of how long outputs are."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from bucketserve.core.outputs import BOUNDS, FEW, MOST, NUM_CELLS, SAVE_S, UNKNOWN_SHARE, OutputBook
from bucketserve.core.types import RequestClass
from tests.builders import a_request

SHARE = 0.6
REQUEST = a_request(prompt_tokens=100, max_new_tokens=100_000)


def book(outputs: list[int], prompt_tokens: int = 100) -> OutputBook:
    under_test = OutputBook(SHARE)
    for tokens in outputs:
        under_test.ended(a_request(prompt_tokens=prompt_tokens), tokens)
    return under_test


def naive(outputs: list[int], generated: int = 0) -> int:
    """The quantile of those that were longer, of outputs rounded up to the end of their cell."""
    ends = sorted(min(bound for bound in BOUNDS if bound >= tokens) for tokens in outputs)
    first = min(bound for bound in BOUNDS if bound > generated)
    longer = [end for end in ends if end >= first]
    return next(end for i, end in enumerate(longer, start=1) if i >= SHARE * len(longer))


@pytest.mark.parametrize("seed", range(5))
def test_the_quantile_is_that_of_all_outputs_longer_than_what_is_there(seed: int) -> None:
    rng = random.Random(seed)
    outputs = [round(rng.lognormvariate(4, 1.2)) + 1 for _ in range(rng.randint(FEW, MOST // 2))]
    under_test = book(outputs)
    longest = min(bound for bound in BOUNDS if bound >= max(outputs))
    for generated in (0, 1, 7, 50, 51, 200, longest - 1):
        assert under_test.expected(REQUEST, generated) == max(naive(outputs, generated), generated + 1), generated


def test_cells_are_half_an_octave_wide_and_what_is_beyond_the_last_counts_there() -> None:
    assert all(low < high <= 2 * low for low, high in pairwise(BOUNDS))
    many = a_request(max_new_tokens=10**9)
    assert book([10**8] * FEW, prompt_tokens=10).expected(many) == BOUNDS[-1]


def test_longer_than_anything_was_is_twice_what_it_is_and_never_more_than_it_may() -> None:
    under_test = book([64] * FEW)
    assert under_test.expected(REQUEST, 64) == 128
    assert under_test.expected(REQUEST, 70_000) == REQUEST.max_new_tokens
    assert under_test.expected(a_request(prompt_tokens=100, max_new_tokens=20)) == 20
    assert under_test.expected(a_request(prompt_tokens=100, max_new_tokens=20), generated=19) == 20


def test_of_few_samples_those_of_the_class_count_and_of_fewer_none() -> None:
    under_test = book([8] * (FEW - 1))
    assert under_test.expected(REQUEST) == UNKNOWN_SHARE * REQUEST.max_new_tokens
    # One of another length: the class is known now, none of its kinds is.
    under_test.ended(a_request(prompt_tokens=5), 8)
    assert under_test.expected(REQUEST) == 8
    batch_class = a_request(request_class=RequestClass.BATCH, max_new_tokens=500)
    # Of batch class as well; a job begins all at once, and counts in full until then.
    assert under_test.expected(batch_class) == 500


def test_one_that_was_let_go_before_counts_in_full() -> None:
    under_test = book([8] * FEW)
    assert under_test.expected(a_request(max_new_tokens=500)) == 8
    assert under_test.expected(a_request(max_new_tokens=500, num_preemptions=1), generated=3) == 500


def test_kinds_are_apart_by_length_of_prompt_and_class() -> None:
    under_test = book([8] * FEW, prompt_tokens=100)
    for _ in range(FEW):
        under_test.ended(a_request(prompt_tokens=1000), 512)
        under_test.ended(a_request(prompt_tokens=1000, request_class=RequestClass.BATCH), 64)
    shapes = ((127, RequestClass.INTERACTIVE), (513, RequestClass.INTERACTIVE), (600, RequestClass.BATCH))
    requests = [a_request("r", n, 5000, request_class=request_class) for n, request_class in shapes]
    assert [under_test.expected(request) for request in requests] == [8, 512, 64]


def test_parts_of_outputs_say_nothing() -> None:
    under_test = OutputBook(SHARE)
    for _ in range(2 * FEW):
        under_test.ended(a_request("r.2", prompt_tokens=100, is_resumed=True), 8)
        under_test.ended(a_request(prompt_tokens=100), 0)
    assert under_test.expected(REQUEST) == UNKNOWN_SHARE * REQUEST.max_new_tokens
    assert under_test.to_save(0.0) == {}


def test_old_counts_fade() -> None:
    under_test = book([8] * 10 * MOST)
    for counts in under_test.to_save(0.0).values():
        assert sum(counts) < MOST
    # It was 8 ten thousand times; as many as a window has are enough to forget that.
    for _ in range(2 * MOST):
        under_test.ended(REQUEST, 512)
    assert under_test.expected(REQUEST) == 512


def test_what_is_saved_is_what_has_changed_and_not_more_often_than_it_may_be() -> None:
    under_test = book([8])
    assert set(under_test.to_save(100.0)) == {"i7", "interactive"}
    under_test.ended(a_request(prompt_tokens=5, request_class=RequestClass.BATCH), 8)
    assert under_test.to_save(100.0 + SAVE_S - 0.1) == {}
    assert set(under_test.to_save(100.0 + SAVE_S)) == {"b3", "batch"}
    assert under_test.to_save(1000.0) == {}


def test_what_is_saved_brings_the_same_expectations_to_the_next_leader() -> None:
    rng = random.Random(1)
    before = book([rng.randint(1, 5000) for _ in range(300)])
    after = OutputBook(SHARE)
    after.restore(before.to_save(0.0))
    assert [after.expected(REQUEST, n) for n in range(0, 5000, 7)] == [
        before.expected(REQUEST, n) for n in range(0, 5000, 7)
    ]
    # It has nothing to save that was not learned since.
    assert after.to_save(1.0) == {}
    # A store of another version may have fewer cells, or more.
    after.restore({"interactive": (1, 2), "i7": (1,) * (NUM_CELLS + 9)})
    after.ended(REQUEST, 8)
    assert {kind: len(counts) for kind, counts in after.to_save(1.0).items()} == {
        "i7": NUM_CELLS,
        "interactive": NUM_CELLS,
    }
