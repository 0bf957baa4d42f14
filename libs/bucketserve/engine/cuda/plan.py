"""A packed step's attention on a CUDA device: one launch or two of the same kernel in each layer, whatever is in it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from bucketserve.engine.attention import AttentionCall, Segment, layer_of
from bucketserve.engine.cuda import kernels
from bucketserve.engine.kv_memory import PAGE_TOKENS, KvLayout, KvMemory

__all__ = ["TILE", "DevicePlan", "Places", "places", "plan_step", "tile_tokens", "try_kernels"]

TILE = 4
"""Numbers of a tile; see kernels.attend."""
FEWEST_ROWS = 16
"""Of a matrix product."""
PROMPT_ROWS = {2: 128, 4: 32}
"""Rows of a prompt's tile, by bytes of a number: what registers hold beside a block of keys."""
WIDE_PROMPT_ROWS = 32
"""The same where heads are wider than WIDE."""
WIDE = 128
MOST_PARTS = 32
"""Programs between which a single token's keys are shared out."""
PROGRAMS_PER_PROCESSOR = 2


@dataclass(frozen=True, slots=True)
class Places:
    """Where the new tokens of a step go and what they look at, as int64 arrays; see DevicePlan."""

    slots: np.ndarray[Any, np.dtype[np.int64]]
    single_tiles: np.ndarray[Any, np.dtype[np.int64]]
    prompt_tiles: np.ndarray[Any, np.dtype[np.int64]]
    table: np.ndarray[Any, np.dtype[np.int64]]


def places(segments: Sequence[Segment], table: array[int], tile_tokens: int) -> Places:
    """Returns the places of a step whose prompts are cut into tiles of at most `tile_tokens`."""
    pages = np.frombuffer(table, dtype=np.int64)
    single = [(s.first, 1, s.context - 1, s.kv_start) for s in segments if s.num_tokens == 1]
    prompts = [
        (s.first + at, min(tile_tokens, s.num_tokens - at), s.context - s.num_tokens + at, s.kv_start)
        for s in segments
        if s.num_tokens > 1
        for at in range(0, s.num_tokens, tile_tokens)
    ]
    # The longest contexts first, so that none of them is left for the end.
    prompts.sort(key=lambda tile: -tile[2])
    ends = np.array([s.kv_start + s.context for s in segments])
    if len(single) == len(segments):
        new = ends - 1
    else:
        new = np.concatenate([np.arange(end - s.num_tokens, end) for s, end in zip(segments, ends, strict=True)])
    return Places(
        pages[new // PAGE_TOKENS] * PAGE_TOKENS + new % PAGE_TOKENS,
        np.array(single, dtype=np.int64).reshape(-1, TILE),
        np.array(prompts, dtype=np.int64).reshape(-1, TILE),
        pages,
    )


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """See attention.Step. The tensors are int64, on the device; what is in them may change between runs of a graph."""

    memory: KvMemory
    calls: Mapping[int, AttentionCall]
    slots: torch.Tensor
    """[tokens] place of each new token in the arena; negative for none."""
    single_tiles: torch.Tensor
    """[number, 4] tiles of one token; see kernels.attend."""
    prompt_tiles: torch.Tensor
    """[number, 4] the others."""
    tile_tokens: int
    """Tokens of theirs at most."""
    table: torch.Tensor
    """Pages of the sequences, one's after another's."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        asked: Mapping[str, Any],
    ) -> torch.Tensor:
        """See attention.Step."""
        layer = layer_of(module, mask)
        self._store(layer, key[0], value[0])
        # Tokens that a graph has room for and a step has not get zeros.
        output = query.new_zeros(query.shape[2], query.shape[1], value.shape[3])
        group = query.shape[1] // key.shape[1]
        for tiles, tokens in ((self.single_tiles, 1), (self.prompt_tiles, self.tile_tokens)):
            if tiles.shape[0]:
                rows = max(triton.next_power_of_2(tokens * group), FEWEST_ROWS)
                self._attend(layer, query[0], output, tiles, rows, asked.get("s_aux"))
        return output[None]

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes keys and values, [kv_heads, tokens, dim] of any strides but 1 for the last, to their slots."""
        keys, values = self.memory.keys[layer], self.memory.values[layer]
        key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
        kernels.store[(key.shape[1], key.shape[0])](
            keys, values, key, value, self.slots,
            keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
            key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            HEAD_DIM=key.shape[2], VALUE_DIM=value.shape[2],
            HEAD_BLOCK=triton.next_power_of_2(key.shape[2]), VALUE_BLOCK=triton.next_power_of_2(value.shape[2]),
        )  # fmt: skip

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        tiles: torch.Tensor,
        rows: int,
        sinks: torch.Tensor | None,
    ) -> None:
        """Computes the output [tokens, heads, value dim] of tiles; `query` is [heads, tokens, dim]."""
        call, keys, values = self.calls[layer], self.memory.keys[layer], self.memory.values[layer]
        query = query if query.stride(2) == 1 else query.contiguous()
        kv_heads, heads = keys.shape[0], query.shape[0]
        # A matrix product has at least 16 of everything.
        head_block, value_block = (max(triton.next_power_of_2(x.shape[2]), FEWEST_ROWS) for x in (keys, values))
        parts = num_parts(tiles.shape[0] * kv_heads, query.device) if tiles is self.single_tiles else 1
        part_values = part_weights = output
        if parts > 1:
            shape = tiles.shape[0], heads, parts
            part_values = torch.empty(*shape, value_block, dtype=torch.float32, device=query.device)
            part_weights = torch.empty(*shape, 2, dtype=torch.float32, device=query.device)
        is_wide = max(head_block, value_block) > WIDE or query.itemsize > 2
        kernels.attend[(tiles.shape[0], kv_heads, parts)](
            query, keys, values, output, part_values, part_weights, tiles, self.table,
            output if sinks is None else sinks,
            query.stride(0), query.stride(1), keys.stride(0), values.stride(0), output.stride(1), output.stride(0),
            call.scale, call.softcap or 0.0, call.window or 0, call.chunk or 0,
            HAS_SINKS=sinks is not None, HAS_SOFTCAP=call.softcap is not None,
            HAS_WINDOW=call.window is not None, HAS_CHUNK=call.chunk is not None,
            GROUP=heads // kv_heads, HEAD_DIM=keys.shape[2], VALUE_DIM=values.shape[2],
            HEAD_BLOCK=head_block, VALUE_BLOCK=value_block,
            ROWS=rows, KEYS=32 if is_wide else 64, PAGE=PAGE_TOKENS, PARTS=parts,
            num_warps=8 if rows >= 128 else 4 if rows > FEWEST_ROWS else 2,
        )  # fmt: skip
        if parts > 1:
            kernels.combine[(tiles.shape[0], heads)](
                output, part_values, part_weights, tiles, output.stride(1), output.stride(0),
                VALUE_DIM=values.shape[2], VALUE_BLOCK=value_block, PARTS=parts,
            )  # fmt: skip


def num_parts(num_programs: int, device: torch.device) -> int:
    """Returns between how many programs each one's keys are shared out so that the device is full: a power of two."""
    if device.type != "cuda":
        return 2
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = PROGRAMS_PER_PROCESSOR * num_processors // num_programs
    return min(1 << max(wanted.bit_length() - 1, 0), MOST_PARTS)


def tile_tokens(calls: Mapping[int, AttentionCall], number_bytes: int) -> int:
    """Returns the tokens of a prompt's tile: as many as fill its rows in the layer with the largest groups of heads."""
    group = max(call.group for call in calls.values())
    widest = max(max(call.layout.head_dim, call.layout.value_dim) for call in calls.values())
    rows = PROMPT_ROWS[number_bytes] if widest <= WIDE else WIDE_PROMPT_ROWS
    return max(rows // group, 1)


def plan_step(
    memory: KvMemory, calls: Mapping[int, AttentionCall], segments: Sequence[Segment], table: array[int]
) -> DevicePlan:
    """Returns the plan of a step; see attention.Planner."""
    tokens = tile_tokens(calls, memory.keys[0].itemsize)
    at = places(segments, table, tokens)
    device = memory.keys[0].device
    slots, single, prompts, pages = (
        torch.from_numpy(part).to(device) for part in (at.slots, at.single_tiles, at.prompt_tiles, at.table.copy())
    )
    return DevicePlan(memory, calls, slots, single, prompts, tokens, pages)


def try_kernels(device: torch.device) -> None:
    """Attends once to one token.

    Raises:
        Exception: of any kind: kernels can't be compiled here.
    """
    layout = KvLayout(1, FEWEST_ROWS, FEWEST_ROWS)
    call = AttentionCall(layout, scale=1.0, window=None, softcap=None, chunk=None, group=1)
    memory = KvMemory([layout], 1, torch.float32, device)
    token = torch.zeros(1, 1, 1, FEWEST_ROWS, device=device)
    layer = torch.nn.Module()
    layer.layer_idx = 0  # type: ignore[assignment]
    plan_step(memory, {0: call}, [Segment(0, 1, 0, 1)], array("q", [0])).attend(layer, token, token, token, None, {})
