"""Attention over packed steps, registered with transformers' AttentionInterface.

The model sees one sequence [1, tokens] in which prompt pieces and decoding sequences lie side by side. This function
knows them apart: it stores the new keys and values and lets each token attend to its own sequence. No mask function is
registered for it, so that transformers builds no mask (transformers/masking_utils.py, _preprocess_mask_arguments): how
far a layer looks back was read from its mask once, when the model was loaded (engine.probe).
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from bucketserve.core.errors import EngineError
from bucketserve.engine.kv_memory import PAGE_TOKENS, KvLayout, KvMemory
from bucketserve.engine.native.kernels import Kernels

__all__ = [
    "NAME",
    "AttentionCall",
    "Planner",
    "Segment",
    "Step",
    "StepPlan",
    "current_step",
    "layer_of",
    "packed_attention",
    "running_step",
]

NAME = "bucketserve"

# What models may pass on that changes nothing here, or is handled below.
_KNOWN = {
    "dropout", "position_ids", "use_cache", "output_attentions", "cache_position", "position_embeddings", "is_causal",
    "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "num_items_in_batch",
}  # fmt: skip
SCORE_ELEMENTS = 1 << 24
"""Scores that are computed at once where torch's fused attention can't be used: 64 MiB in float32."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The new tokens of one sequence in a step."""

    first: int
    """Index of its first token in the packed step."""
    num_tokens: int
    kv_start: int
    """Where its KV begins: a token of StepPlan.table, which is a whole number of pages for a whole sequence."""
    context: int
    """Tokens of the sequence including the new ones."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a layer asks of attention."""

    layout: KvLayout
    scale: float
    window: int | None
    """Tokens that a token may look back to, itself included; None for all."""
    softcap: float | None
    """Scores are bent to (-softcap, softcap) by tanh; None for none."""
    chunk: int | None
    """Tokens look back to where their chunk of so many positions begins; None for all."""
    group: int
    """Heads that share a KV head."""


class Step(Protocol):
    """What runs while the model does, and serves its calls of attention."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        asked: Mapping[str, Any],
    ) -> torch.Tensor:
        """Returns [1, tokens, heads, value head_dim]; see packed_attention."""


Planner = Callable[[KvMemory, Mapping[int, AttentionCall], Sequence[Segment], "array[int]"], Step]
"""Returns how to attend in a step, from what StepPlan is made of."""


@dataclass
class StepPlan:
    """How a packed step is composed, and its attention by torch, or by kernels on a CPU."""

    memory: KvMemory
    calls: Mapping[int, AttentionCall]
    """By layer."""
    segments: Sequence[Segment]
    table: array[int]
    """The arena's pages for all KV of the step, one sequence's after another's: token t of it is in page
    table[t // PAGE_TOKENS]. Of type q."""
    kernels: Kernels | None = None
    """Those of this CPU, if there are any."""
    pages: torch.Tensor = field(init=False)
    """The table as int64 [n], on the device."""
    slots: torch.Tensor = field(init=False)
    """[tokens] place of each new token in the arena."""
    _pieces: dict[int | None, list[Segment]] = field(default_factory=dict)
    _rows: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _is_run: dict[tuple[int, int], bool] = field(default_factory=dict)
    """Whether these pages of the table, first and last, lie side by side."""

    def __post_init__(self) -> None:
        """Finds where new tokens go."""
        device = self.memory.keys[0].device
        pages = torch.frombuffer(self.table, dtype=torch.long)
        tokens = [
            t for s in self.segments for t in range(s.kv_start + s.context - s.num_tokens, s.kv_start + s.context)
        ]
        new = torch.tensor(tokens, dtype=torch.long)
        self.slots = (pages[new // PAGE_TOKENS] * PAGE_TOKENS + new % PAGE_TOKENS).to(device)
        self.pages = pages.to(device)

    def pieces(self, chunk: int | None) -> Sequence[Segment]:
        """Returns the segments as layers see them that look back within chunks of so many positions."""
        if chunk is None:
            return self.segments
        if chunk not in self._pieces:
            self._pieces[chunk] = [piece for segment in self.segments for piece in _within_chunks(segment, chunk)]
        return self._pieces[chunk]

    def rows(self, chunk: int | None) -> torch.Tensor:
        """Returns the same as int64 [n, 4], for the kernels."""
        if chunk not in self._rows:
            rows = [(s.first, s.num_tokens, s.kv_start, s.context) for s in self.pieces(chunk)]
            self._rows[chunk] = torch.tensor(rows)
        return self._rows[chunk]

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        asked: Mapping[str, Any],
    ) -> torch.Tensor:
        """See Step."""
        layer = layer_of(module, mask)
        call, sinks = self.calls[layer], asked.get("s_aux")
        self.memory.write(layer, self.slots, key[0], value[0])
        keys, values = self.memory.keys[layer], self.memory.values[layer]
        head_dim, value_dim = query.shape[3], value.shape[3]
        output = torch.empty(1, query.shape[2], query.shape[1], value_dim, dtype=query.dtype, device=query.device)
        is_plain = sinks is None and head_dim == value_dim
        if self.kernels is not None and is_plain and self.kernels.suits_heads(head_dim, query.dtype):
            self.kernels.attention(
                query[0].transpose(0, 1),
                keys,
                values,
                self.rows(call.chunk),
                self.pages,
                output[0],
                page_tokens=PAGE_TOKENS,
                scale=call.scale,
                window=call.window,
                softcap=call.softcap,
            )
            return output
        for segment in self.pieces(call.chunk):
            end, low = segment.first + segment.num_tokens, 0
            if call.window is not None:
                low = max(segment.context - segment.num_tokens + 1 - call.window, 0)
            seen = segment.kv_start + low, segment.kv_start + segment.context
            attended = _attend(
                query[0, :, segment.first : end], self._gather(keys, *seen), self._gather(values, *seen), call, sinks
            )
            output[0, segment.first : end] = attended.transpose(0, 1)
        return output

    def _gather(self, arena: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Returns [kv_heads, end - begin, dim] of tokens of the table: a view where their pages lie side by side."""
        first, last = begin // PAGE_TOKENS, (end - 1) // PAGE_TOKENS
        if (first, last) not in self._is_run:
            self._is_run[first, last] = all(a + 1 == b for a, b in pairwise(self.table[first : last + 1]))
        low, number = begin % PAGE_TOKENS, end - begin
        if self._is_run[first, last]:
            start = self.table[first] * PAGE_TOKENS + low
            return arena[:, start : start + number]
        heads, _, dim = arena.shape
        pages = arena.view(heads, -1, PAGE_TOKENS * dim).index_select(1, self.pages[first : last + 1])
        return pages.view(heads, -1, dim)[:, low : low + number]


def layer_of(module: torch.nn.Module, mask: torch.Tensor | None) -> int:
    """Returns the number of the layer that attends.

    Raises:
        EngineError: it brings a mask.
    """
    if mask is not None:
        raise EngineError("its layers make a mask of their own")
    return int(module.layer_idx)  # type: ignore[arg-type]


def _within_chunks(segment: Segment, chunk: int) -> Sequence[Segment]:
    """Returns a segment cut where chunks of positions begin; each piece knows of its own chunk only."""
    pieces = []
    position = segment.context - segment.num_tokens
    while position < segment.context:
        begin = position // chunk * chunk
        end = min(begin + chunk, segment.context)
        first = segment.first + position - (segment.context - segment.num_tokens)
        pieces.append(Segment(first, end - position, segment.kv_start + begin, end - begin))
        position = end
    return pieces


_current = threading.local()


class running_step:
    """Makes a step the one that attention serves, in this thread, while the model runs."""

    def __init__(self, step: Step) -> None:
        """Takes the step."""
        self._step = step

    def __enter__(self) -> None:
        """Sets it."""
        _current.step = self._step

    def __exit__(self, *error: object) -> None:
        """Clears it."""
        _current.step = None


def current_step() -> Step | None:
    """Returns what is running in this thread."""
    return getattr(_current, "step", None)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Returns the attention output [1, tokens, heads, value head_dim].

    Args:
        module: the layer, which knows its layer_idx.
        query: [1, heads, tokens, head_dim].
        key: [1, kv_heads, tokens, head_dim] of the new tokens.
        value: [1, kv_heads, tokens, value head_dim] likewise.
        attention_mask: None, except while a model is probed.
        scaling: factor of the scores; default 1 / sqrt(head_dim).
        sliding_window: tokens that a token may look back to, itself included; None for all.
        softcap: scores are bent to (-softcap, softcap) by tanh; None for none.
        s_aux: [heads] scores of a sink that takes its share of each token's attention and gives nothing; or None.
        **kwargs: whatever else the model passes.

    Raises:
        EngineError: the model asks for something that is not done here.
    """
    step = current_step()
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _KNOWN]
    if step is None or unknown:
        raise EngineError(f"its layers give attention what is not supported here: {', '.join(unknown) or 'no step'}")
    asked = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
    return step.attend(module, query, key, value, attention_mask, asked), None


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: AttentionCall, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Returns [heads, new, value head_dim] for the last `new` positions of a sequence.

    Args:
        query: [heads, new, head_dim].
        keys: [kv_heads, context, head_dim]; the new positions are its last ones.
        values: [kv_heads, context, value head_dim].
        call: what the layer asks for.
        sinks: [heads] or None; see packed_attention.
    """
    heads, new, head_dim = query.shape
    kv_heads, context, _ = keys.shape
    is_plain = call.softcap is None and sinks is None
    if new == 1 and is_plain:
        # One token attends to all: the heads that share a KV head become its queries, and nothing is repeated.
        grouped = query.reshape(1, kv_heads, heads // kv_heads, head_dim)
        attended = F.scaled_dot_product_attention(grouped, keys[None], values[None], scale=call.scale)
        return attended.reshape(heads, 1, -1)
    if heads != kv_heads:
        keys = keys.repeat_interleave(heads // kv_heads, dim=0)
        values = values.repeat_interleave(heads // kv_heads, dim=0)
    window = call.window if call.window is not None and context > call.window else None
    if is_plain and new == context and window is None:
        return F.scaled_dot_product_attention(query[None], keys[None], values[None], is_causal=True, scale=call.scale)[
            0
        ]
    positions = torch.arange(context, device=query.device)
    distance = positions[context - new :, None] - positions[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if is_plain:
        return F.scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=allowed, scale=call.scale
        )[0]
    rows = max(SCORE_ELEMENTS // (heads * context), 1)
    parts = [
        _weights(query[:, i : i + rows] @ keys.transpose(1, 2), allowed[i : i + rows], call, sinks) @ values
        for i in range(0, new, rows)
    ]
    return torch.cat(parts, dim=1)


def _weights(
    products: torch.Tensor, allowed: torch.Tensor, call: AttentionCall, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Returns the weights [heads, new, context] of the values, from the products of queries and keys."""
    scores = products * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(products.dtype)
    sink = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
    weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1, dtype=torch.float32)
    return weights[..., :-1].to(products.dtype)


AttentionInterface.register(NAME, packed_attention)
