"""KV as bytes: page after page, so that whoever has the first pages needs the rest alone."""

from __future__ import annotations

import pytest
import torch

from bucketserve.engine import kv_memory
from bucketserve.engine.kv_memory import PAGE_TOKENS, KvLayout, KvMemory

pytestmark = pytest.mark.engine
LAYOUTS = [KvLayout(2, 3, 3), KvLayout(1, 4, 2), KvLayout(2, 3, 3)]
PAGES = [7, 2, 3, 9, 0]
BYTES_PER_TOKEN = kv_memory.bytes_per_token(LAYOUTS, torch.float32)


def memory() -> KvMemory:
    made = KvMemory(LAYOUTS, 10 * PAGE_TOKENS, torch.float32, torch.device("cpu"))
    for i, arena in enumerate((*made.keys, *made.values)):
        arena.copy_(torch.rand(arena.shape, generator=torch.Generator().manual_seed(i)))
    return made


def copied_out(source: KvMemory, num_tokens: int) -> bytes:
    data = bytearray(num_tokens * BYTES_PER_TOKEN)
    source.copy_out(PAGES, num_tokens, memoryview(data))
    return bytes(data)


@pytest.mark.parametrize("portion_pages", [1, 2, 100])
@pytest.mark.parametrize("num_tokens", [1, PAGE_TOKENS - 1, PAGE_TOKENS, 4 * PAGE_TOKENS, 4 * PAGE_TOKENS + 5])
def test_pages_follow_each_other_with_all_of_their_layers(
    num_tokens: int, portion_pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_memory, "PORTION_BYTES", portion_pages * PAGE_TOKENS * BYTES_PER_TOKEN)
    source, wanted = memory(), b""
    for number, page in enumerate(PAGES):
        for keys, values in zip(source.keys, source.values, strict=True):
            first = page * PAGE_TOKENS
            last = first + max(min(num_tokens - number * PAGE_TOKENS, PAGE_TOKENS), 0)
            wanted += keys[:, first:last].contiguous().numpy().tobytes()
            wanted += values[:, first:last].contiguous().numpy().tobytes()
    assert copied_out(source, num_tokens) == wanted


@pytest.mark.parametrize("num_known", [0, 1, 3, 4])
def test_the_end_of_it_fills_the_pages_that_lack_and_no_other(num_known: int) -> None:
    num_tokens = 4 * PAGE_TOKENS + 5
    data = copied_out(memory(), num_tokens)
    target = KvMemory(LAYOUTS, 10 * PAGE_TOKENS, torch.float32, torch.device("cpu"))
    rest = data[num_known * PAGE_TOKENS * BYTES_PER_TOKEN :]
    target.copy_in(PAGES[num_known:], num_tokens - num_known * PAGE_TOKENS, memoryview(bytearray(rest)))
    assert copied_out(target, num_tokens) == bytes(len(data) - len(rest)) + rest
    written = {int(at) // PAGE_TOKENS for at in target.keys[0].ne(0).any(0).any(-1).nonzero()}
    assert written == set(PAGES[num_known:])


def test_nothing_is_nothing() -> None:
    memory().copy_in([], 0, memoryview(b""))
