"""Whatever begins, grows, is let go, fails and comes again: every sequence keeps its KV, and nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bucketserve.engine.kv_memory import PAGE_TOKENS, KvLayout, KvMemory, num_pages
from bucketserve.engine.kv_space import KvSpace, KvTable

pytestmark = pytest.mark.engine
NUM_PAGES = 14
SALTS = (b"", b"a", b"b")
LENGTHS = (1, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1, 2 * PAGE_TOKENS, 3 * PAGE_TOKENS + 5, 5 * PAGE_TOKENS)
ACTIONS = ("begin", "begin", "begin", "grow", "grow", "publish", "end", "preempt", "fail", "keep nothing")


@dataclass(eq=False)
class Life:
    """A sequence and what its KV has to be."""

    table: KvTable
    tokens: list[int]
    salt: bytes


class World:
    """Sequences in a small memory. The KV of a token is the token, so that a mix-up shows."""

    def __init__(self) -> None:
        memory = KvMemory([KvLayout(1, 1, 1)], NUM_PAGES * PAGE_TOKENS, torch.float32, torch.device("cpu"))
        self.space = KvSpace(memory, keeps_prefixes=True)
        self.kv = memory.keys[0][0, :, 0]
        self.lives: list[Life] = []
        self.published: set[tuple[bytes, tuple[int, ...]]] = set()

    def read(self, pages: list[int], number: int) -> list[int]:
        return [int(t) for page in pages for t in self.kv[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]][:number]

    def write(self, life: Life, start: int) -> None:
        for position in range(start, len(life.tokens)):
            page = life.table.pages[position // PAGE_TOKENS]
            # Nobody else has it: not now, and not when he comes again.
            assert sum(page in other.table.pages for other in self.lives) == (life in self.lives)
            self.kv[page * PAGE_TOKENS + position % PAGE_TOKENS] = life.tokens[position]

    def begin(self, prompt: list[int], salt: bytes) -> None:
        known = self.space.find(prompt[:-1], salt)
        number = len(known) * PAGE_TOKENS
        assert self.read(known, number) == prompt[:number]
        assert all((salt, tuple(prompt[:end])) in self.published for end in range(PAGE_TOKENS, number + 1, PAGE_TOKENS))
        left = self.space.free_after(len(prompt), known)
        if left < 0:
            return
        life = Life(self.space.take(len(prompt), salt, known), prompt, salt)
        assert self.space.num_free_pages == left
        self.write(life, number)
        self.lives.append(life)

    def publish(self, life: Life) -> None:
        self.space.publish(life.table, life.tokens)
        self.published |= {
            (life.salt, tuple(life.tokens[:end])) for end in range(PAGE_TOKENS, len(life.tokens) + 1, PAGE_TOKENS)
        }

    def grow(self, life: Life, number: int) -> None:
        if self.space.missing(life.table, len(life.tokens) + number) > self.space.num_free_pages:
            return
        start = len(life.tokens)
        life.tokens = [*life.tokens, *range(100, 100 + number)]
        self.space.grow(life.table, len(life.tokens))
        self.write(life, start)

    def act(self, action: str, number: int) -> None:
        if action == "begin":
            shared, length, salt = number % 4, LENGTHS[number // 4 % len(LENGTHS)], SALTS[number // 28 % len(SALTS)]
            # Prompts differ after none to three pages, those of one kind do not at all.
            self.begin([i if i < shared * PAGE_TOKENS else 200 + shared + i for i in range(length)], salt)
        elif self.lives:
            life = self.lives[number % len(self.lives)]
            if action == "grow":
                self.grow(life, 1 + number % 50)
            elif action == "publish":
                self.publish(life)
            else:
                self.lives.remove(life)
                if action in ("end", "preempt"):
                    self.publish(life)
                    self.space.release(life.table, life.tokens)
                elif action == "fail":
                    self.space.discard(life.table)
                    assert not set(self.space.find(life.tokens, life.salt)) & set(life.table.pages)
                else:
                    self.space.release(life.table)
                if action == "preempt":
                    self.begin(life.tokens, life.salt)

    def check(self) -> None:
        self.space.check_integrity()
        used = {page for life in self.lives for page in life.table.pages}
        assert self.space.num_free_pages == NUM_PAGES - len(used)
        for life in self.lives:
            assert len(life.table.pages) == num_pages(len(life.tokens))
            assert self.read(list(life.table.pages), len(life.tokens)) == life.tokens


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 999)), max_size=60))
def test_pages(actions: list[tuple[str, int]]) -> None:
    world = World()
    for action, number in actions:
        world.act(action, number)
        world.check()
    for life in world.lives:
        world.space.release(life.table, life.tokens)
    world.lives.clear()
    world.check()
    # All of it can be had, and then there is nothing to be found.
    world.space.take(NUM_PAGES * PAGE_TOKENS, b"")
    assert (world.space.num_free_pages, world.space._blocks) == (0, {})
    world.space.check_integrity()
