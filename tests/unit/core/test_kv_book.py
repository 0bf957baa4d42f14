"""The KV that a worker's sequences will need."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from bucketserve.core.kv_book import KvBook
from bucketserve.core.outputs import OutputBook
from bucketserve.core.types import MAX_PREEMPTIONS, Request, RequestId
from tests.builders import a_request


class Outputs(OutputBook):
    """What a test says that outputs are like."""

    def __init__(self, first: int, longer_by: int = 1) -> None:
        super().__init__(0.5)
        self.first, self.longer_by = first, longer_by

    def expected(self, request: Request, generated: int = 0) -> int:
        likely = self.first if generated < self.first else generated + self.longer_by
        return min(likely, request.max_new_tokens)


def test_the_peak_is_where_the_first_of_two_ends() -> None:
    book = KvBook(Outputs(30))
    book.add(a_request("a", 100, 500))
    assert book.peak() == 130
    book.at_step(20)
    book.add(a_request("b", 40, 500))
    # At step 30: 130 of a, 50 of b. Later only b is there, with 70 at the most.
    assert book.peak() == 180
    book.at_step(29)
    assert (book.tokens(RequestId("a")), book.tokens(RequestId("b"))) == (129, 49)
    book.remove(RequestId("a"))
    assert book.peak() == 70
    book.remove(RequestId("b"))
    assert book.peak() == 0


def test_a_sequence_that_outlives_its_estimate_gets_the_one_that_is_likely_now() -> None:
    book = KvBook(Outputs(10, longer_by=5))
    book.add(a_request("a", 100, 500))
    for step, peak in ((9, 110), (10, 115), (14, 115), (15, 120), (40, 145), (41, 145)):
        book.at_step(step)
        assert book.peak() == peak, step


def test_one_that_may_generate_no_more_counts_until_its_end_is_reported() -> None:
    book = KvBook(Outputs(10, longer_by=5))
    book.add(a_request("a", 100, 12))
    book.at_step(12)
    assert book.peak() == 113
    book.at_step(13)
    assert book.peak() == 114
    book.remove(RequestId("a"))
    assert book.peak() == 0


def test_an_output_that_begins_later_ends_later() -> None:
    book = KvBook(Outputs(30))
    book.add(a_request("a", 100, 500))
    book.at_step(20)
    book.begins(RequestId("a"))
    assert (book.tokens(RequestId("a")), book.peak()) == (100, 130)
    book.at_step(49)
    assert (book.tokens(RequestId("a")), book.peak()) == (129, 130)
    # Of one that isn't here, or holds what it holds, nothing begins.
    book.hold(a_request("b"), 50)
    book.begins(RequestId("b"))
    book.begins(RequestId("nobody"))
    assert book.peak() == 180


def test_what_is_held_counts_whatever_comes_and_who_may_not_be_let_go_has_all_it_may_use() -> None:
    book = KvBook(Outputs(5))
    book.hold(a_request("held", 70, 900), 70)
    book.add(a_request("stays", 100, 200, num_preemptions=MAX_PREEMPTIONS))
    book.add(a_request("grows", 10, 200, num_preemptions=MAX_PREEMPTIONS - 1))
    assert book.peak() == 70 + 300 + 15
    book.at_step(200)
    assert (book.tokens(RequestId("held")), book.tokens(RequestId("stays"))) == (70, 300)
    book.remove(RequestId("grows"))
    assert book.peak() == 370


def test_what_is_added_again_is_there_once() -> None:
    book = KvBook(Outputs(5))
    for _ in range(100):
        book.add(a_request("a", 10, 50))
        book.hold(a_request("b", 10, 50), 20)
    book.add(a_request("b", 10, 50))
    assert book.peak() == 30
    assert (len(book._lines), len(book._by_id)) == (2, 2)
    for name in "ab":
        book.remove(RequestId(name))
        book.remove(RequestId(name))
    assert (book.peak(), book._lines, book._by_id) == (0, [], {})


def test_it_holds_nothing_of_those_that_have_left() -> None:
    book = KvBook(Outputs(20, longer_by=7))
    for step in range(5000):
        book.at_step(step)
        book.add(a_request(f"r{step}", 10, 100))
        book.begins(RequestId(f"r{step - 2}"))
        book.remove(RequestId(f"r{step - 30}"))
        book.peak()
    assert len(book._lines) == len(book._by_id) == 30


# --- against a simulation of every step ---------------------------------------------------------------------------


@dataclass
class Sequence:
    request: Request
    joined: int
    end: int


shapes = st.tuples(st.integers(1, 60), st.integers(1, 40))
moves = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 12), st.just(0)),
    st.tuples(st.just("add"), *[st.integers(1, 60), st.integers(1, 40)]),
    st.tuples(st.just("hold"), st.integers(1, 60), st.just(0)),
    st.tuples(st.just("begins"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("remove"), st.integers(0, 9), st.just(0)),
)


@given(st.integers(1, 20), st.integers(1, 9), st.lists(moves, min_size=1, max_size=30))
@settings(max_examples=300)
def test_the_peak_is_the_most_that_any_later_step_needs(first: int, longer_by: int, script: list[tuple]) -> None:
    outputs = Outputs(first, longer_by)
    book, step = KvBook(outputs), 0
    growing: dict[RequestId, Sequence] = {}
    held: dict[RequestId, int] = {}
    for number, (move, x, y) in enumerate(script):
        names = [*growing, *held]
        if move == "step":
            step += x
            book.at_step(step)
        elif move == "add":
            request = a_request(f"r{number}", x, y)
            growing[request.request_id] = Sequence(request, step, step + outputs.expected(request))
            book.add(request)
        elif move == "hold":
            request = a_request(f"r{number}", x)
            held[request.request_id] = x
            book.hold(request, x)
        elif names and move == "begins":
            name = names[x % len(names)]
            if sequence := growing.get(name):
                sequence.end += step - sequence.joined
                sequence.joined = step
            book.begins(name)
        elif names and move == "remove":
            name = names[x % len(names)]
            growing.pop(name, None)
            held.pop(name, None)
            book.remove(name)
        for sequence in growing.values():
            if sequence.end <= step:
                likely = sequence.joined + outputs.expected(sequence.request, step - sequence.joined)
                sequence.end = max(likely, step + 1)
        last = max((sequence.end for sequence in growing.values()), default=step)
        needs = [
            sum(s.request.prompt_tokens + at - s.joined for s in growing.values() if s.end >= at)
            for at in range(step, last + 1)
        ]
        assert book.peak() == sum(held.values()) + max(needs)
