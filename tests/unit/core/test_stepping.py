"""What a step computes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketserve.core.stepping import STEP_TOKENS, PrefillPiece, cpu_step_tokens, plan_prefill
from bucketserve.core.types import RequestId


def pieces(waiting: list[int], **more: int | bool) -> list[tuple[int, int]]:
    """(index, tokens) of each piece."""
    options = {"num_decoding": 0, "max_step_tokens": 100, "max_chunk_tokens": 0, "is_shared": False, **more}
    planned = plan_prefill([(RequestId(str(i)), tokens) for i, tokens in enumerate(waiting)], **options)
    return [(int(piece.request_id), piece.num_tokens) for piece in planned]


def test_in_order_the_step_is_filled_from_the_front() -> None:
    assert pieces([70, 50, 10]) == [(0, 70), (1, 30)]


def test_decodes_take_their_place_first_and_chunks_bound_what_comes_beside_them() -> None:
    assert pieces([200], num_decoding=10) == [(0, 90)]
    assert pieces([200], num_decoding=10, max_chunk_tokens=30) == [(0, 30)]
    assert pieces([200], max_chunk_tokens=30) == [(0, 100)]


def test_a_step_full_of_decodes_still_computes_a_prompt_token() -> None:
    assert pieces([5, 5], num_decoding=100) == [(0, 1)]
    assert pieces([5, 5], num_decoding=100, is_shared=True) == [(0, 1)]


def test_shared_the_shortest_go_beside_the_first() -> None:
    assert dict(pieces([1000, 300, 7, 20], is_shared=True)) == {0: 50, 2: 7, 3: 20, 1: 23}


def test_shared_the_first_takes_what_the_others_leave() -> None:
    assert dict(pieces([1000, 7], is_shared=True)) == {0: 93, 1: 7}
    assert pieces([1000], is_shared=True) == [(0, 100)]


@given(
    st.lists(st.integers(1, 300), max_size=12),
    st.integers(0, 120),
    st.integers(1, 200),
    st.integers(0, 60),
    st.booleans(),
)
def test_no_more_than_asked_for_no_more_than_fits_and_nothing_idle(
    waiting: list[int], decoding: int, most: int, chunk: int, is_shared: bool
) -> None:
    planned = pieces(waiting, num_decoding=decoding, max_step_tokens=most, max_chunk_tokens=chunk, is_shared=is_shared)
    assert len({index for index, _ in planned}) == len(planned)
    assert all(0 < tokens <= waiting[index] for index, tokens in planned)
    budget = max(most - decoding, 1)
    if decoding and chunk:
        budget = min(budget, chunk)
    assert sum(tokens for _, tokens in planned) == min(budget, sum(waiting))
    if waiting:
        # Whoever is first gets on in every step, by at least half of it.
        assert dict(planned)[0] >= min(waiting[0], (budget + 1) // 2)


def test_a_piece_says_whose_it_is() -> None:
    assert plan_prefill([(RequestId("a"), 3)], num_decoding=0, max_step_tokens=8, max_chunk_tokens=0) == [
        PrefillPiece(RequestId("a"), 3)
    ]


@pytest.mark.parametrize(
    ("token_s", "most_tokens", "tokens"),
    [
        (1e-6, STEP_TOKENS, 2048),
        (5e-4, STEP_TOKENS, 1024),
        (1e-3, STEP_TOKENS, 512),
        (3e-3, STEP_TOKENS, 256),
        (1.0, STEP_TOKENS, 256),
        (1e-6, 1000, 512),
        (1e-6, 10, 256),
        (1e-6, float("inf"), 2048),
    ],
)
def test_a_step_on_a_cpu_takes_about_half_a_second_within_bounds(
    token_s: float, most_tokens: float, tokens: int
) -> None:
    assert cpu_step_tokens(token_s, most_tokens) == tokens
