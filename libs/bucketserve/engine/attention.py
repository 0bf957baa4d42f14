"""Attention over packed steps, registered with transformers' AttentionInterface.

The model sees one sequence [1, tokens] in which prompt pieces and decoding sequences lie side by side. This function
knows them apart: it stores the new keys and values and lets each token attend to its own sequence. No mask function is
registered for it, so that transformers builds no mask (transformers/masking_utils.py, _preprocess_mask_arguments).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from bucketserve.core.errors import EngineError
from bucketserve.engine.kv_memory import KvLayout, KvMemory
from bucketserve.engine.native.kernels import Kernels

__all__ = ["NAME", "AttentionCall", "Probe", "Segment", "StepPlan", "current_step", "running_step"]

NAME = "bucketserve"

# What models may pass on that changes nothing here, or is handled below.
_KNOWN = {
    "dropout", "scaling", "sliding_window", "softcap", "position_ids", "use_cache", "output_attentions",
    "cache_position", "position_embeddings", "is_causal", "output_hidden_states", "return_dict", "logits_to_keep",
    "num_items_in_batch",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Segment:
    """The new tokens of one sequence in a step."""

    first: int
    """Index of its first token in the packed step."""
    num_tokens: int
    kv_start: int
    """Where its range begins in the arena."""
    context: int
    """Tokens of the sequence including the new ones."""


@dataclass
class StepPlan:
    """How a packed step is composed."""

    memory: KvMemory
    segments: Sequence[Segment]
    slots: torch.Tensor
    """[tokens] position of each new token in the arena."""
    kernels: Kernels | None = None
    """Those of this CPU, if there are any."""

    @cached_property
    def segment_table(self) -> torch.Tensor:
        """The segments as int64 [n, 4], for the kernels."""
        return torch.tensor([(s.first, s.num_tokens, s.kv_start, s.context) for s in self.segments])


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a layer asks of attention."""

    layout: KvLayout
    scale: float
    window: int | None
    softcap: float | None


@dataclass(slots=True)
class Probe:
    """Takes notes of what the layers ask for instead of computing."""

    calls: dict[int, AttentionCall] = field(default_factory=dict)


_current = threading.local()


class running_step:
    """Makes a plan or a probe the one that attention serves, in this thread, while the model runs."""

    def __init__(self, step: StepPlan | Probe) -> None:
        """Takes the plan."""
        self._step = step

    def __enter__(self) -> None:
        """Sets it."""
        _current.step = self._step

    def __exit__(self, *error: object) -> None:
        """Clears it."""
        _current.step = None


def current_step() -> StepPlan | Probe | None:
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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Returns the attention output [1, tokens, heads, head_dim].

    Args:
        module: the layer, which knows its layer_idx.
        query: [1, heads, tokens, head_dim].
        key: [1, kv_heads, tokens, head_dim] of the new tokens.
        value: likewise.
        attention_mask: None, always.
        scaling: factor of the scores; default 1 / sqrt(head_dim).
        sliding_window: tokens that a token may look back to, itself included; None for all.
        softcap: scores are bent to (-softcap, softcap) by tanh; None for none.
        **kwargs: whatever else the model passes.

    Raises:
        EngineError: the model asks for something that is not done here.
    """
    step = current_step()
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _KNOWN]
    if step is None or unknown or attention_mask is not None:
        raise EngineError(f"the model's attention asks for what is not supported: {', '.join(unknown) or 'a mask'}")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if isinstance(step, Probe):
        step.calls[layer] = AttentionCall(KvLayout(key.shape[1], key.shape[3]), scale, sliding_window, softcap)
        return query.transpose(1, 2).contiguous(), None
    memory = step.memory
    memory.write(layer, step.slots, key[0], value[0])
    keys, values = memory.keys[layer], memory.values[layer]
    if step.kernels is not None and step.kernels.suits_heads(query.shape[3], query.dtype):
        by_token = torch.empty(1, query.shape[2], query.shape[1], query.shape[3], dtype=query.dtype)
        step.kernels.attention(
            query[0].transpose(0, 1),
            keys,
            values,
            step.segment_table,
            by_token[0],
            scale=scale,
            window=sliding_window,
            softcap=softcap,
        )
        return by_token, None
    output = torch.empty_like(query[0])
    for segment in step.segments:
        end = segment.first + segment.num_tokens
        low = 0
        if sliding_window is not None:
            low = max(segment.context - segment.num_tokens + 1 - sliding_window, 0)
        begin, finish = segment.kv_start + low, segment.kv_start + segment.context
        output[:, segment.first : end] = _attend(
            query[0, :, segment.first : end],
            keys[:, begin:finish],
            values[:, begin:finish],
            scale,
            sliding_window,
            softcap,
        )
    return output.transpose(0, 1).unsqueeze(0), None


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Returns [heads, new, head_dim] for the last `new` positions of a sequence.

    Args:
        query: [heads, new, head_dim].
        keys: [kv_heads, context, head_dim]; the new positions are its last ones.
        values: likewise.
        scale: factor of the scores.
        window: tokens to look back to; None for all.
        softcap: see packed_attention.
    """
    heads, new, head_dim = query.shape
    kv_heads, context, _ = keys.shape
    if new == 1 and softcap is None:
        # One token attends to all: the heads that share a KV head become its queries, and nothing is repeated.
        grouped = query.reshape(1, kv_heads, heads // kv_heads, head_dim)
        return F.scaled_dot_product_attention(grouped, keys[None], values[None], scale=scale).reshape(heads, 1, -1)
    if heads != kv_heads:
        keys = keys.repeat_interleave(heads // kv_heads, dim=0)
        values = values.repeat_interleave(heads // kv_heads, dim=0)
    if window is not None and context <= window:
        window = None
    if softcap is None and new == context and window is None:
        return F.scaled_dot_product_attention(query[None], keys[None], values[None], is_causal=True, scale=scale)[0]
    positions = torch.arange(context, device=query.device)
    distance = positions[context - new :, None] - positions[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if softcap is None:
        return F.scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=allowed, scale=scale)[0]
    scores = torch.tanh(query @ keys.transpose(1, 2) * scale / softcap) * softcap
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ values


AttentionInterface.register(NAME, packed_attention)
