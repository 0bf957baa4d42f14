"""The index of prefixes is what a plain list for each worker would be, and never more than its memory."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from bucketserve.core.prefixes import BLOCK_TOKENS, PrefixIndex
from bucketserve.core.types import WorkerId

NAMES = [WorkerId(name) for name in ("a", "b", "c")]
# A chain is a path in a tree; a block's hash stands for the path up to it.
paths = st.lists(st.integers(0, 1), max_size=8).map(
    lambda turns: tuple(hash((1, *turns[: i + 1])) for i in range(len(turns)))
)
names = st.sampled_from(NAMES)
tokens = st.integers(0, 8).map(lambda number: number * BLOCK_TOKENS)
operations = st.one_of(
    st.tuples(st.just("join"), names, st.integers(0, 12)),
    st.tuples(st.just("leave"), names),
    st.tuples(st.just("note"), names, paths),
    st.tuples(st.just("note"), names, paths),
    st.tuples(st.just("correct"), names, tokens, tokens),
)


class Plain:
    """One list of blocks for each worker, most recently used last."""

    def __init__(self) -> None:
        self.blocks: dict[WorkerId, list[int]] = {}
        self.most: dict[WorkerId, int] = {}
        self.limit: dict[WorkerId, float] = {}

    def join(self, name: WorkerId, number: int) -> None:
        self.blocks[name], self.most[name], self.limit[name] = [], number, number

    def leave(self, name: WorkerId) -> None:
        self.blocks.pop(name, None)

    def note(self, name: WorkerId, path: tuple[int, ...]) -> None:
        if name in self.blocks:
            kept = [block for block in self.blocks[name] if block not in path] + list(reversed(path))
            self.blocks[name] = kept
            self.cut(name)

    def correct(self, name: WorkerId, believed: int, found: int) -> None:
        if name not in self.blocks or not believed + found:
            return
        if found < believed:
            self.limit[name] *= 7 / 8
        else:
            self.limit[name] = min(max(self.limit[name], found // BLOCK_TOKENS) * 9 / 8, self.most[name])
        self.cut(name)

    def cut(self, name: WorkerId) -> None:
        while len(self.blocks[name]) > int(self.limit[name]):
            del self.blocks[name][0]

    def depth(self, name: WorkerId, path: tuple[int, ...]) -> int:
        kept = self.blocks.get(name, [])
        return next((i for i, block in enumerate(path) if block not in kept), len(path))


@given(st.lists(operations, max_size=60), st.lists(paths, min_size=1, max_size=6))
@settings(max_examples=400)
def test_the_index_is_what_plain_lists_would_be(script: list[tuple], asked: list[tuple[int, ...]]) -> None:
    index, plain = PrefixIndex(), Plain()
    for what, name, *more in script:
        if what == "join":
            index.join(name, more[0] * BLOCK_TOKENS + 1)
        else:
            getattr(index, what)(name, *more)
        getattr(plain, what)(name, *more)
        for path in asked:
            depths = {each: plain.depth(each, path) for each in NAMES}
            assert {each: index.tokens_at(each, path) for each in NAMES} == {
                each: depth * BLOCK_TOKENS for each, depth in depths.items()
            }
            most, holders = index.holders(path)
            assert most == max(depths.values()) * BLOCK_TOKENS
            assert set(holders) == {each for each, depth in depths.items() if depth and depth * BLOCK_TOKENS == most}
        for each, kept in index._kept.items():
            assert list(kept.blocks) == plain.blocks[each]
            assert len(kept.blocks) <= kept.limit <= kept.most
        assert set(index._holders) == {block for kept in plain.blocks.values() for block in kept}


@given(paths.filter(len))
def test_a_worker_that_never_keeps_anything_is_soon_believed_to_have_nothing(path: tuple[int, ...]) -> None:
    index, name = PrefixIndex(), NAMES[0]
    index.join(name, 6400 * BLOCK_TOKENS)
    for _ in range(200):
        index.note(name, path)
        index.correct(name, index.tokens_at(name, path), 0)
    assert index.tokens_at(name, path) == 0
    # Until it says that it had some.
    index.correct(name, 0, len(path) * BLOCK_TOKENS)
    index.note(name, path)
    assert index.tokens_at(name, path) == len(path) * BLOCK_TOKENS
