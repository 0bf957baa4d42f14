"""Pages of KV: who finds them, that each token is looked at once, and which are given up first."""

from __future__ import annotations

import pytest
import torch

from bucketserve.core.errors import EngineError
from bucketserve.engine.kv_memory import PAGE_TOKENS, KvLayout, KvMemory
from bucketserve.engine.kv_space import KvSpace, KvTable

pytestmark = pytest.mark.engine
SALT = b"tenant"


class Token(int):
    """A token id that counts comparisons with others."""

    num_compared = 0

    def __eq__(self, other: object) -> bool:
        Token.num_compared += 1
        return int(self) == other

    __hash__ = int.__hash__


def space(num_pages: int, *, keeps_prefixes: bool = True) -> KvSpace:
    memory = KvMemory([KvLayout(1, 1, 1)], num_pages * PAGE_TOKENS, torch.float32, torch.device("cpu"))
    return KvSpace(memory, keeps_prefixes=keeps_prefixes)


def tokens_of(num_pages: int, first: int = 0) -> list[int]:
    return [Token(i) for i in range(first, first + num_pages * PAGE_TOKENS)]


def compute(under_test: KvSpace, tokens: list[int], salt: bytes = SALT) -> KvTable:
    """Takes pages for a prompt as an engine does, and lets others find them."""
    table = under_test.take(len(tokens), salt, under_test.find(tokens, salt))
    under_test.publish(table, tokens)
    under_test.check_integrity()
    return table


def give_up(under_test: KvSpace, number: int) -> None:
    """Lets so many pages that are kept be given up."""
    free = under_test.num_free_pages - under_test.num_kept_pages
    under_test.release(under_test.take((free + number) * PAGE_TOKENS, SALT))


def compared(num_pages: int) -> int:
    """Comparisons when a sequence of that length comes a second time, and ends."""
    under_test = space(4 * num_pages)
    compute(under_test, tokens_of(num_pages))
    Token.num_compared = 0
    second = compute(under_test, tokens_of(num_pages))
    assert second.num_full == num_pages
    under_test.release(second, tokens_of(num_pages))
    return Token.num_compared


def test_work_grows_with_the_prompt_and_not_with_its_square() -> None:
    small, large = compared(50), compared(400)
    assert small > 0
    assert large < 2 * 8 * small


def test_prefixes_of_many_lengths_share_the_work_and_the_memory() -> None:
    """A stair of prompts, each a page longer: whoever comes with the longest looks at each token once."""
    number = 60
    under_test = space(number)
    for steps in range(1, number):
        compute(under_test, tokens_of(steps))
    assert under_test.num_free_pages == 1
    tokens = tokens_of(number)
    Token.num_compared = 0
    assert len(under_test.find(tokens, SALT)) == number - 1
    assert Token.num_compared <= 2 * len(tokens)


def test_equal_hashes_are_not_equal_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Token, "__hash__", lambda self: 1)
    under_test = space(10)
    compute(under_test, tokens_of(2))
    assert len(under_test.find([*tokens_of(1), *tokens_of(1, 100)], SALT)) == 1
    assert under_test.find(tokens_of(2, 1), SALT) == []


def test_a_page_is_found_after_the_same_ones_of_the_same_salt_only() -> None:
    under_test = space(10)
    compute(under_test, tokens_of(3))
    assert under_test.find(tokens_of(3), b"") == []
    assert under_test.find(tokens_of(3), b"other") == []
    assert under_test.find(tokens_of(1, PAGE_TOKENS), SALT) == []
    assert under_test.find([*tokens_of(1), *tokens_of(1, 2 * PAGE_TOKENS)], SALT) == under_test.find(tokens_of(1), SALT)
    # A salt has pages of its own.
    other = compute(under_test, tokens_of(3), b"other")
    assert list(other.pages) == under_test.find(tokens_of(3), b"other")
    assert under_test.num_free_pages == 4


def test_only_full_pages_are_found() -> None:
    under_test = space(10)
    tokens = tokens_of(3)
    table = under_test.take(len(tokens), SALT)
    under_test.publish(table, tokens[:-1])
    assert under_test.find(tokens, SALT) == list(table.pages[:2])
    under_test.publish(table, tokens)
    assert under_test.find(tokens[:-1], SALT) == list(table.pages[:2])
    assert under_test.find(tokens, SALT) == list(table.pages)
    under_test.check_integrity()


def test_what_two_computed_beside_each_other_is_there_once_afterwards() -> None:
    under_test = space(10)
    tokens = [*tokens_of(2), 7, 8]
    first, second = under_test.take(len(tokens), SALT), under_test.take(len(tokens), SALT)
    assert under_test.num_free_pages == 4
    under_test.publish(first, tokens)
    under_test.publish(second, tokens)
    under_test.check_integrity()
    assert under_test.num_free_pages == 6
    assert first.pages[:2] == second.pages[:2]
    # What is not full yet is everybody's own.
    assert first.pages[2] != second.pages[2]
    under_test.release(first, tokens)
    assert under_test.find(tokens, SALT) == list(second.pages[:2])
    under_test.check_integrity()


def test_the_one_used_longest_ago_goes_first_and_of_one_its_end() -> None:
    under_test = space(9)
    prompts = [tokens_of(3, 1000 * i) for i in range(3)]
    for prompt in prompts:
        under_test.release(compute(under_test, prompt), prompt)
    assert (under_test.num_free_pages, under_test.num_kept_pages) == (9, 9)
    # The first is used again.
    under_test.release(compute(under_test, prompts[0]), prompts[0])
    found = []
    for _ in range(9):
        give_up(under_test, 1)
        under_test.check_integrity()
        found.append([len(under_test.find(prompt, SALT)) for prompt in prompts])
    assert found == [[3, 2, 3], [3, 1, 3], [3, 0, 3], [3, 0, 2], [3, 0, 1], [3, 0, 0], [2, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert not under_test._blocks


def test_a_sequence_s_pages_lie_side_by_side_where_they_can() -> None:
    under_test = space(8)
    prompts = [tokens_of(4, 1000 * i) for i in range(3)]
    tables = [compute(under_test, prompt) for prompt in prompts[:2]]
    assert [list(table.pages) for table in tables] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    under_test.release(tables[1], prompts[1])
    # In pages that were kept, of which the last one is given up first.
    assert list(compute(under_test, prompts[2]).pages) == [4, 5, 6, 7]
    # In pages that were free, in whatever order they became so.
    under_test = space(8)
    tables = [under_test.take(2 * PAGE_TOKENS, SALT) for _ in range(4)]
    for number in (2, 0, 1):
        under_test.release(tables[number])
    assert list(compute(under_test, prompts[0]).pages) == [0, 1, 2, 3]


def test_what_a_sequence_has_is_never_given_up() -> None:
    under_test = space(6)
    tokens = tokens_of(3)
    under_test.release(compute(under_test, tokens), tokens)
    table = compute(under_test, tokens[: 2 * PAGE_TOKENS])
    assert (under_test.num_free_pages, under_test.num_kept_pages) == (4, 1)
    assert under_test.free_after(6 * PAGE_TOKENS, list(table.pages)) == 0
    assert under_test.free_after(6 * PAGE_TOKENS + 1, list(table.pages)) == -1
    # Of pages that nobody has, to be taken from what is free.
    assert under_test.free_after(6 * PAGE_TOKENS, under_test.find(tokens, SALT)) == 0
    give_up(under_test, 1)
    assert under_test.find(tokens, SALT) == list(table.pages)
    with pytest.raises(EngineError, match="5 pages of KV are wanted and 4 are free"):
        under_test.grow(table, 7 * PAGE_TOKENS)
    under_test.check_integrity()


def test_nobody_finds_what_may_be_wrong_and_whoever_has_it_keeps_it() -> None:
    under_test = space(8)
    tokens = tokens_of(3)
    wrong = compute(under_test, tokens[: 2 * PAGE_TOKENS])
    other = compute(under_test, tokens[: 2 * PAGE_TOKENS])
    longer = compute(under_test, tokens)
    under_test.release(longer, tokens)
    assert len(under_test.find(tokens, SALT)) == 3
    under_test.discard(wrong)
    under_test.check_integrity()
    assert under_test.find(tokens, SALT) == []
    pages = list(other.pages)
    under_test.release(other, tokens[: 2 * PAGE_TOKENS])
    under_test.check_integrity()
    assert under_test.find(tokens, SALT) == []
    # What came after it is found neither after it nor after what is in its place now.
    stranger = tokens_of(2, 5000)
    table = compute(under_test, stranger)
    assert list(table.pages) == pages
    assert under_test.find([*stranger, *tokens[2 * PAGE_TOKENS :]], SALT) == pages
    give_up(under_test, 1)
    assert under_test.num_kept_pages == 0


def test_without_prefixes_nothing_is_found_or_kept() -> None:
    under_test = space(6, keeps_prefixes=False)
    tokens = tokens_of(3)
    table = compute(under_test, tokens)
    assert under_test.find(tokens, SALT) == []
    under_test.release(table, tokens)
    assert (under_test.num_free_pages, under_test.num_kept_pages) == (6, 0)
    under_test.check_integrity()


def test_integrity_is_not_taken_on_trust() -> None:
    under_test = space(6)
    first = compute(under_test, tokens_of(1))
    second = under_test.take(PAGE_TOKENS, SALT)
    second.pages[0], own = first.pages[0], second.pages[0]
    with pytest.raises(EngineError):
        under_test.check_integrity()
    second.pages[0] = own
    under_test.check_integrity()
    under_test._free.append(own)
    with pytest.raises(EngineError):
        under_test.check_integrity()
