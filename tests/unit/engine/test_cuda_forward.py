"""How a step is laid out for a CUDA device, with its memory on the CPU: what a graph reads is where it was captured."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from bucketserve.engine.cuda.forward import ALIGNED, CudaForward
from bucketserve.engine.cuda.plan import TILE, places
from bucketserve.engine.forward import PackedTokens
from bucketserve.engine.kv_memory import num_pages

TILE_TOKENS = 8


@pytest.fixture
def forward() -> CudaForward:
    made = CudaForward.__new__(CudaForward)
    made._memory = made._calls = None  # type: ignore[assignment]
    made._tile_tokens = TILE_TOKENS
    # Neither zeros nor what fills up.
    made._here, made._there = torch.full((5000,), -7), torch.full((5000,), -9)
    made._copied = SimpleNamespace(synchronize=lambda: None, record=lambda: None)  # type: ignore[assignment]
    return made


def some_tokens(rng: random.Random, *, decodes_only: bool) -> PackedTokens:
    tokens = PackedTokens()
    for _ in range(rng.randint(1, 9)):
        number = 1 if decodes_only else rng.choice((1, 1, 3, 20))
        start = rng.randint(0, 70)
        pages = [rng.randrange(50) for _ in range(num_pages(start + number))]
        ids = [rng.randrange(1, 99) for _ in range(number)]
        tokens.add(ids, start, pages, wants_logits=decodes_only or rng.random() < 0.6)
    return tokens


@pytest.mark.parametrize("seed", range(20))
def test_a_step_is_whole_and_aligned(forward: CudaForward, seed: int) -> None:
    tokens = some_tokens(random.Random(seed), decodes_only=False)
    plan, ids, positions, rows = forward._load(tokens)
    at = places(tokens.segments, tokens.table, TILE_TOKENS)
    assert (ids.tolist(), positions.tolist(), rows.tolist()) == (tokens.ids, tokens.positions, tokens.last or [0])
    assert (plan.slots.tolist(), plan.table.tolist()) == (at.slots.tolist(), at.table.tolist())
    assert plan.single_tiles.tolist() == at.single_tiles.tolist()
    assert plan.prompt_tiles.tolist() == at.prompt_tiles.tolist()
    parts = (ids, positions, plan.slots, rows, plan.single_tiles, plan.prompt_tiles, plan.table)
    assert all(part.storage_offset() % ALIGNED == 0 for part in parts)


@pytest.mark.parametrize("seed", range(20))
def test_a_graph_is_filled_up_with_what_is_computed_for_nobody(forward: CudaForward, seed: int) -> None:
    size, rng = 16, random.Random(seed)
    captured = forward._load(some_tokens(rng, decodes_only=True), size)
    offsets = [part.storage_offset() for part in (*captured[1:], captured[0].slots, captured[0].table)]
    tokens = some_tokens(rng, decodes_only=True)
    plan, ids, positions, rows = forward._load(tokens, size)
    assert [part.storage_offset() for part in (ids, positions, rows, plan.slots, plan.table)] == offsets
    more = size - len(tokens.ids)
    at = places(tokens.segments, tokens.table, TILE_TOKENS)
    assert ids.tolist() == tokens.ids + [0] * more
    assert rows.tolist() == [*range(len(tokens.ids)), *[0] * more]
    assert plan.slots.tolist() == at.slots.tolist() + [-1] * more
    # A tile of no tokens.
    assert plan.single_tiles.tolist() == at.single_tiles.tolist() + [[0] * TILE] * more
    assert plan.prompt_tiles.shape[0] == 0
