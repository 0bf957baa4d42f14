"""The tree of prefixes: what it finds, and that it looks at each token once."""

from __future__ import annotations

import random

import pytest
import torch

from bucketserve.engine import kv_space
from bucketserve.engine.kv_memory import MOVED_TOKENS, KvLayout, KvMemory
from bucketserve.engine.kv_space import BLOCK_TOKENS, KvSpace

pytestmark = pytest.mark.engine


class Token(int):
    """A token id that counts comparisons with others."""

    num_compared = 0

    def __eq__(self, other: object) -> bool:
        Token.num_compared += 1
        return int(self) == other

    __hash__ = int.__hash__


def space(num_tokens: int) -> KvSpace:
    return KvSpace(KvMemory([KvLayout(1, 1, 1)], num_tokens, torch.float32, torch.device("cpu")), keeps_prefixes=True)


def compared(length: int) -> int:
    """Comparisons when a sequence of that length comes a second time, and ends."""
    under_test = space(4 * length)
    first = under_test.reserve(length)
    under_test.publish(first, [Token(i) for i in range(length)])
    Token.num_compared = 0
    second = under_test.reserve(length)
    assert under_test.reuse(second, [Token(i) for i in range(length)]) == length
    under_test.release(second, [Token(i) for i in range(length)])
    return Token.num_compared


def test_work_grows_with_the_prompt_and_not_with_its_square() -> None:
    small, large = compared(50 * BLOCK_TOKENS), compared(400 * BLOCK_TOKENS)
    assert small > 0
    assert large < 2 * 8 * small


def test_prefixes_of_many_lengths_share_the_work() -> None:
    """A stair of prompts, each a block longer: whoever comes with the longest looks at each token once."""
    blocks = 60
    under_test = space(BLOCK_TOKENS * blocks * blocks)
    tokens = [Token(i) for i in range(BLOCK_TOKENS * blocks)]
    for number in range(1, blocks):
        under_test.publish(under_test.reserve(number * BLOCK_TOKENS), [Token(i) for i in range(number * BLOCK_TOKENS)])
    Token.num_compared = 0
    assert under_test.reuse(under_test.reserve(len(tokens)), tokens) == (blocks - 1) * BLOCK_TOKENS
    assert Token.num_compared <= 2 * len(tokens)


def test_equal_hashes_are_not_equal_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Token, "__hash__", lambda self: 1)
    under_test = space(1000)
    under_test.publish(under_test.reserve(64), [Token(i) for i in range(64)])
    assert under_test.reuse(under_test.reserve(64), [Token(i) for i in (*range(32), *range(100, 132))]) == 32
    assert under_test.reuse(under_test.reserve(64), [Token(i) for i in range(1, 65)]) == 0


def test_against_a_plain_model_over_random_lives() -> None:
    """Whatever is reused is what some live range that began alike has, and nothing is found that is gone."""
    rng = random.Random(5)
    under_test = space(40 * BLOCK_TOKENS)
    keys, values = under_test.memory.keys[0], under_test.memory.values[0]
    prompts = [
        [*range(shared * BLOCK_TOKENS), *(1000 * i + j for j in range(rng.randrange(1, 200)))]
        for i, shared in enumerate(rng.choices(range(5), k=12), 1)
    ]
    held: list[tuple[kv_space.KvRange, list[int]]] = []
    num_reused = 0
    for _ in range(600):
        if held and rng.random() < 0.45:
            taken, tokens = held.pop(rng.randrange(len(held)))
            under_test.release(taken, tokens if rng.random() < 0.7 else ())
        else:
            tokens = rng.choice(prompts)
            taken = under_test.reserve(len(tokens))
            if taken is not None:
                number = under_test.reuse(taken, tokens[:-1])
                num_reused += number
                assert keys[0, taken.start : taken.start + number, 0].tolist() == tokens[:number]
                ids = torch.tensor(tokens, dtype=torch.float32)
                keys[0, taken.start : taken.start + len(tokens), 0] = ids
                values[0, taken.start : taken.start + len(tokens), 0] = -ids
                under_test.publish(taken, tokens)
                held.append((taken, tokens))
        under_test.check_integrity()
        for taken, tokens in held:
            assert keys[0, taken.start : taken.start + len(tokens), 0].tolist() == tokens
            assert values[0, taken.start : taken.start + len(tokens), 0].tolist() == [-token for token in tokens]
    assert num_reused > 1000
    assert under_test.memory.num_compactions > 0
    for taken, _ in held:
        under_test.release(taken)
    while under_test.num_kept_tokens:
        under_test._give_up(next(iter(under_test._kept)))
    assert not under_test._blocks


@pytest.mark.parametrize("gap", [1, 5, MOVED_TOKENS, 3 * MOVED_TOKENS])
def test_moving_together_takes_no_memory_and_keeps_what_overlaps(gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    length = 2 * MOVED_TOKENS + 7
    memory = KvMemory([KvLayout(2, 3, 4), KvLayout(1, 5, 5)], gap + length, torch.float32, torch.device("cpu"))
    wanted = []
    for arena in (*memory.keys, *memory.values):
        arena.copy_(torch.randn_like(arena))
        wanted.append(arena[:, gap:].clone())
    for name in ("clone", "contiguous"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("memory was taken"))
    assert memory.compact([(gap, length)]) == [0]
    for arena, before in zip((*memory.keys, *memory.values), wanted, strict=True):
        assert torch.equal(arena[:, :length], before)
