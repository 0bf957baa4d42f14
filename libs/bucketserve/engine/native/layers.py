"""Decoder layers in a handful of kernel calls: norms, attention and a gated MLP, added to the residual stream.

Llama, Mistral, Qwen 2 and 3, Phi 3, Gemma 2 and 3, and what is built alike: what a norm multiplies by and which
activation an MLP has is found by asking them, not by their class. transformers stays the definition of the model: a
layer is taken over only after it has been seen to compute the same as transformers' own on the same input.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bucketserve.core.errors import EngineError
from bucketserve.engine.attention import AttentionCall, Segment, StepPlan, current_step, running_step
from bucketserve.engine.kv_memory import PAGE_TOKENS, KvMemory
from bucketserve.engine.native.kernels import Epilogue, Kernels
from bucketserve.engine.native.products import ACTIVATIONS, Product, Products, TorchProducts
from bucketserve.engine.probe import refusing_what_fails

__all__ = ["FusedLayer", "fuse_layers"]

NORMS: Mapping[frozenset[str], tuple[str, str | None, str, str | None]] = {
    frozenset({"input_layernorm", "post_attention_layernorm"}): (
        "input_layernorm", None, "post_attention_layernorm", None,
    ),
    frozenset(
        {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}
    ): (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    ),
}  # fmt: skip
"""A layer's norms by what they are called: before and after attention, before and after the MLP."""
HEAD_NORMS = {"q_norm", "k_norm"}

TRIAL = (33, 15)
"""Tokens of the two sequences of the step by which a layer is compared with its original.

The second ends at the last position of the context: what a layer does with positions may begin anywhere."""
TOLERANCE = 1e-4
"""Of what a layer adds to its input, relative, in float32. Another activation, norm or scale is off by far more."""


class Workspace:
    """Buffers that the layers of a model share, as large as the largest step so far."""

    def __init__(self) -> None:
        """Starts with none."""
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns [rows, columns], contiguous, with anything in it; the same memory for the same name."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            # Zeroed, so that its pages are there before they are needed.
            buffer = self._buffers[name] = torch.zeros(rows * columns, dtype=dtype)
        return buffer[: rows * columns].view(rows, columns)


@dataclass(frozen=True, slots=True)
class _Norm:
    """x / rms(x) x weight."""

    weight: torch.Tensor
    eps: float

    @staticmethod
    def of(module: nn.Module) -> _Norm:
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float):
            raise _DifferentError
        # Some multiply by the weight, some by one more than it: what ones become tells.
        ones = _asked(module, torch.ones(1, weight.shape[0]))
        return _Norm((ones[0].float() * math.sqrt(1 + eps)).contiguous(), eps)


class _DifferentError(Exception):
    """The layer is not of this kind."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a layer is made of, by what each part is for."""

    norms: tuple[_Norm, _Norm | None, _Norm, _Norm | None]
    head_norms: tuple[torch.Tensor, torch.Tensor, float] | None
    qkv: list[nn.Linear]
    out: nn.Linear
    gate: torch.Tensor
    up: torch.Tensor
    down: nn.Linear
    epilogue: Epilogue

    @staticmethod
    def of(layer: nn.Module, call: AttentionCall, kernels: Kernels) -> _Parts:
        """Raises _DifferentError: it has other parts, or sizes that the kernels can't work with."""
        parts = _children(layer)
        attention, mlp = _children(parts.pop("self_attn")), _children(parts.pop("mlp"))
        names = NORMS.get(frozenset(parts))
        if names is None:
            raise _DifferentError
        norms = [None if name is None else _Norm.of(parts[name]) for name in names]
        qkv = [attention.pop("qkv_proj")] if "qkv_proj" in attention else _pop(attention, "q_proj", "k_proj", "v_proj")
        (out,) = _pop(attention, "o_proj")
        joined = [mlp.pop("gate_up_proj")] if "gate_up_proj" in mlp else _pop(mlp, "gate_proj", "up_proj")
        (down,) = _pop(mlp, "down_proj")
        activations = list(mlp.values())
        dim = call.layout.head_dim
        is_alike = (
            all(type(linear) is nn.Linear for linear in (*qkv, out, *joined, down))
            and set(attention) in (set(), HEAD_NORMS)
            and len(activations) == 1
            and all(linear.bias is None for linear in joined)
            and len({linear.bias is None for linear in qkv}) == 1
            and joined[0].in_features % kernels.vector == 0
            and kernels.suits_heads(dim, out.weight.dtype)
            and dim == call.layout.value_dim
        )
        if not is_alike:
            raise _DifferentError
        head_norms = None
        if attention:
            q_norm, k_norm = _Norm.of(attention["q_norm"]), _Norm.of(attention["k_norm"])
            if {q_norm.weight.numel(), k_norm.weight.numel()} != {dim}:
                raise _DifferentError
            head_norms = (q_norm.weight, k_norm.weight, q_norm.eps)
        gate, up = joined[0].weight.chunk(2) if len(joined) == 1 else (linear.weight for linear in joined)
        return _Parts(
            tuple(norms), head_norms, qkv, out, gate, up, down, _epilogue(activations[0])  # type: ignore[arg-type]
        )  # fmt: skip


def _children(module: nn.Module) -> dict[str, Any]:
    """Returns what computes something when the model is served."""
    return {name: child for name, child in module.named_children() if not isinstance(child, nn.Dropout | nn.Identity)}


def _pop(parts: dict[str, Any], *names: str) -> list[Any]:
    if not parts.keys() >= set(names):
        raise _DifferentError
    return [parts.pop(name) for name in names]


def _epilogue(activation: nn.Module) -> Epilogue:
    """Returns the one that computes the same."""
    x = torch.linspace(-8.0, 8.0, 257)
    for epilogue, known in ACTIVATIONS.items():
        if torch.allclose(_asked(activation, x), known(x), rtol=1e-6, atol=1e-6):
            return epilogue
    raise _DifferentError


def _asked(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns what a module makes of x, of the shape that x has."""
    try:
        y = module(x)
    except Exception as error:  # whatever it is that wants something else
        raise _DifferentError from error
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        raise _DifferentError
    return y


class FusedLayer(nn.Module):
    """One decoder layer: norm, attention, norm, gated MLP, each added to the residual stream in place."""

    def __init__(
        self, layer: nn.Module, call: AttentionCall, kernels: Kernels, products: Products, workspace: Workspace
    ) -> None:
        """Takes over the layer's weights; those of `layer` may be freed.

        Raises:
            _DifferentError: the layer has other parts.
        """
        super().__init__()
        parts = _Parts.of(layer, call, kernels)
        self._call, self._kernels, self._workspace = call, kernels, workspace
        self._layer_idx = int(layer.self_attn.layer_idx)  # type: ignore[union-attr, arg-type]
        self._before_attention, self._after_attention, self._before_mlp, self._after_mlp = parts.norms
        self._head_norms = parts.head_norms
        biases: list[torch.Tensor] = [linear.bias for linear in parts.qkv]
        self._heads = parts.out.in_features // call.layout.head_dim
        self._qkv = products.linear(
            [linear.weight for linear in parts.qkv], torch.cat(biases) if biases[0] is not None else None
        )
        self._out = products.linear([parts.out.weight], parts.out.bias)
        self._gated = products.gated(parts.gate, parts.up, parts.epilogue)
        self._down = products.linear([parts.down.weight], parts.down.bias)
        self.num_bytes = sum(p.num_bytes for p in (self._qkv, self._out, self._gated, self._down))
        self.activations: torch.dtype = parts.out.weight.dtype
        self.returns: torch.dtype = self.activations
        """Number types inside and of what it returns: the model's, unless all layers are fused."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Returns the residual stream [1, tokens, hidden] with this layer's part added, in place."""
        plan = current_step()
        if not isinstance(plan, StepPlan) or attention_mask is not None or position_embeddings is None:
            raise EngineError("a fused layer runs in packed steps only")
        kernels, take = self._kernels, self._workspace.take
        x = hidden_states[0].to(self.activations)
        rows, hidden = x.shape
        keys, values = plan.memory.keys[self._layer_idx], plan.memory.values[self._layer_idx]
        normed = take("normed", rows, hidden, x.dtype)
        cos, sin = (part[0].to(x.dtype) for part in position_embeddings)

        kernels.rms_norm(x, self._before_attention.weight, self._before_attention.eps, normed)
        qkv = self._qkv.write(normed, take("qkv", rows, self._qkv.columns, x.dtype))
        kernels.rotate_and_store(qkv, self._heads, cos, sin, self._head_norms, keys, values, plan.slots)
        dim = self._call.layout.head_dim
        attended = take("attended", rows, self._heads * dim, x.dtype)
        kernels.attention(
            qkv[:, : self._heads * dim].view(rows, self._heads, dim),
            keys,
            values,
            plan.rows(self._call.chunk),
            plan.pages,
            attended,
            page_tokens=PAGE_TOKENS,
            scale=self._call.scale,
            window=self._call.window,
            softcap=self._call.softcap,
        )
        x = self._add(self._out, attended, self._after_attention, x)
        kernels.rms_norm(x, self._before_mlp.weight, self._before_mlp.eps, normed)
        gated = self._gated.write(normed, take("gated", rows, self._gated.columns, x.dtype))
        x = self._add(self._down, gated, self._after_mlp, x)
        return x[None].to(self.returns)

    def _add(self, product: Product, rows: torch.Tensor, norm: _Norm | None, x: torch.Tensor) -> torch.Tensor:
        """Returns x with the product of rows added, after its norm if it has one."""
        if norm is None:
            return product.add(rows, x)
        part = product.write(rows, self._workspace.take("part", x.shape[0], x.shape[1], x.dtype))
        self._kernels.rms_norm(part, norm.weight, norm.eps, x, is_added=True)
        return x


@torch.inference_mode()
def fuse_layers(
    model: nn.Module,
    calls: Mapping[int, AttentionCall],
    context: int,
    kernels: Kernels,
    products: Products,
) -> list[FusedLayer]:
    """Takes over the decoder layers that are of this kind and that it computes alike; returns the new ones.

    Args:
        model: on the CPU, with our attention.
        calls: what each layer asks of attention.
        context: positions that the model is served with.
        kernels: for everything between products.
        products: for the products.

    Raises:
        ModelLoadError: the model fails in a packed step.
    """
    candidates = [
        (parent, name)
        for parent in model.modules()
        if isinstance(parent, nn.ModuleList)
        for name, child in parent.named_children()
        if {part for part, _ in child.named_children()} >= {"self_attn", "mlp"}
    ]
    if not candidates:
        return []
    dtype = next(model.parameters()).dtype
    trial = _Trial(model, [getattr(parent, name) for parent, name in candidates], calls, context, kernels)
    workspace = Workspace()
    fused: list[FusedLayer] = []
    for parent, name in candidates:
        layer = getattr(parent, name)
        call = calls.get(getattr(layer.self_attn, "layer_idx", -1))
        if call is None or not trial.has_run(layer):
            continue  # it attends otherwise, or is part of what looks at images
        try:
            # One at a time, and nobody else has it, so that no more than one layer is in memory more than once.
            if trial.difference(layer, call) <= TOLERANCE:
                fused.append(FusedLayer(layer, call, kernels, products, workspace))
                setattr(parent, name, fused[-1])
        except _DifferentError:
            continue
    if len(fused) == len(calls) and products.wants_float32:
        # Whatever reads the residual stream is fused: it can stay in float32 from the first layer to the last.
        for layer in fused:
            layer.activations = layer.returns = torch.float32
        fused[-1].returns = dtype
    return fused


class _Trial:
    """A small step of each layer, in float32 whatever the model's type is: rounding must not hide a difference."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[nn.Module],
        calls: Mapping[int, AttentionCall],
        context: int,
        kernels: Kernels,
    ) -> None:
        self._kernels = kernels
        self._seen: dict[int, tuple[torch.Tensor, dict[str, Any]]] = {}
        trial = [min(number, context) for number in TRIAL]
        segments = [Segment(0, trial[0], 0, trial[0]), Segment(trial[0], trial[1], trial[0], trial[1])]
        layouts, cpu = [calls[i].layout for i in sorted(calls)], torch.device("cpu")
        dtype = next(model.parameters()).dtype
        exact, memory = (KvMemory(layouts, sum(trial), one, cpu) for one in (torch.float32, dtype))
        self._plan = StepPlan(exact, calls, segments, exact.backwards())
        plan = StepPlan(memory, calls, segments, memory.backwards())
        hooks = [layer.register_forward_pre_hook(self._note, with_kwargs=True) for layer in layers]
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        ids = torch.randint(0, vocabulary, (1, sum(trial)), generator=generator)
        positions = torch.cat([torch.arange(trial[0]), torch.arange(context - trial[1], context)])[None]
        try:
            with running_step(plan), refusing_what_fails():
                model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        options = {name: _float32(given) for name, given in kwargs.items() if name != "hidden_states"}
        self._seen[id(layer)] = (hidden.float(), options)

    def has_run(self, layer: nn.Module) -> bool:
        """Whether the layer had a part in the step."""
        return id(layer) in self._seen

    def difference(self, layer: nn.Module, call: AttentionCall) -> float:
        """Returns the norm of the difference, relative to what the original adds to its input.

        Raises:
            _DifferentError: the layer has other parts, or turns queries and keys otherwise.
        """
        before, options = self._seen.pop(id(layer))
        turned = options.get("position_embeddings")
        if not isinstance(turned, tuple) or any(part.shape[-1] != call.layout.head_dim for part in turned):
            raise _DifferentError  # by something else, or a part of each head
        exact = layer if next(layer.parameters()).dtype is torch.float32 else copy.deepcopy(layer).float()
        taken = FusedLayer(exact, call, self._kernels, TorchProducts(self._kernels), Workspace())
        with running_step(self._plan):
            output = exact(before.clone(), **options)
            wanted = output if isinstance(output, torch.Tensor) else output[0]
            result = taken(before.clone(), **options)
        return float((result - wanted).norm() / (wanted - before).norm())


def _float32(given: Any) -> Any:
    """Returns what a layer is given, in float32 if it is a tensor, or some, of another floating type."""
    if isinstance(given, tuple):
        return tuple(_float32(part) for part in given)
    return given.float() if isinstance(given, torch.Tensor) and given.is_floating_point() else given
