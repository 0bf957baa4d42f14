"""Decoder layers of the Llama kind in a handful of kernel calls: Llama, Mistral, Qwen 2 and 3, and what is built alike.

transformers stays the definition of the model. A layer is taken over only if it has the parts of this kind, and only
after it has been seen to compute the same as transformers' own on the same input; any other stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bucketserve.core.errors import EngineError
from bucketserve.engine.attention import AttentionCall, Segment, StepPlan, current_step, running_step
from bucketserve.engine.kv_memory import PAGE_TOKENS, KvMemory
from bucketserve.engine.native.kernels import Kernels
from bucketserve.engine.native.products import Products, TorchProducts

__all__ = ["FusedLayer", "fuse_layers"]

LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj"}

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
    weight: torch.Tensor
    eps: float

    @staticmethod
    def of(module: nn.Module) -> _Norm:
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if not isinstance(weight, torch.Tensor) or eps is None:
            raise _DifferentError
        return _Norm(weight.detach().float().contiguous(), float(eps))


class _DifferentError(Exception):
    """The layer is not of this kind."""


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
        parts = dict(layer.named_children())
        attention, mlp = dict(parts["self_attn"].named_children()), dict(parts["mlp"].named_children())
        self._check(attention, mlp, call, kernels)
        self._call, self._kernels, self._workspace = call, kernels, workspace
        self._layer_idx = int(parts["self_attn"].layer_idx)  # type: ignore[arg-type]
        self._input_norm = _Norm.of(parts["input_layernorm"])
        self._post_norm = _Norm.of(parts["post_attention_layernorm"])
        self._head_norms = None
        if set(attention) >= HEAD_NORMS:
            q_norm, k_norm = _Norm.of(attention["q_norm"]), _Norm.of(attention["k_norm"])
            self._head_norms = (q_norm.weight, k_norm.weight, q_norm.eps)
        qkv: list[Any] = [attention[name] for name in ("q_proj", "k_proj", "v_proj")]
        biases = [linear.bias for linear in qkv]
        self._heads = qkv[0].out_features // call.layout.head_dim
        self._qkv = products.linear(
            [linear.weight for linear in qkv], torch.cat(biases) if biases[0] is not None else None
        )
        out, down, gate, up = attention["o_proj"], mlp["down_proj"], mlp["gate_proj"], mlp["up_proj"]
        self._out = products.linear([out.weight], out.bias)  # type: ignore[list-item, arg-type]
        self._gated = products.gated(gate.weight, up.weight)  # type: ignore[arg-type]
        self._down = products.linear([down.weight], down.bias)  # type: ignore[list-item, arg-type]
        self.num_bytes = sum(p.num_bytes for p in (self._qkv, self._out, self._gated, self._down))
        self.activations: torch.dtype = out.weight.dtype  # type: ignore[assignment]
        self.returns: torch.dtype = self.activations
        """Number types inside and of what it returns: the model's, unless all layers are fused."""

    @staticmethod
    def _check(
        attention: Mapping[str, nn.Module], mlp: Mapping[str, nn.Module], call: AttentionCall, kernels: Kernels
    ) -> None:
        projections = [attention.get(name) for name in ATTENTION_PARTS] + [mlp.get(name) for name in MLP_PARTS]
        is_alike = (
            all(type(projection) is nn.Linear for projection in projections)
            and set(attention) - ATTENTION_PARTS in (set(), HEAD_NORMS)
            and set(mlp) - MLP_PARTS <= {"act_fn"}
            and mlp["gate_proj"].bias is None
            and mlp["up_proj"].bias is None
            and len({attention[name].bias is None for name in ("q_proj", "k_proj", "v_proj")}) == 1
            and mlp["gate_proj"].in_features % kernels.vector == 0
            and kernels.suits_heads(call.layout.head_dim, attention["o_proj"].weight.dtype)
            and call.layout.head_dim == call.layout.value_dim
        )
        if not is_alike:
            raise _DifferentError

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

        kernels.rms_norm(x, self._input_norm.weight, self._input_norm.eps, normed)
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
        x = self._out.add(attended, x)
        kernels.rms_norm(x, self._post_norm.weight, self._post_norm.eps, normed)
        x = self._down.add(self._gated.write(normed, take("gated", rows, self._gated.columns, x.dtype)), x)
        return x[None].to(self.returns)


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
    """
    candidates = [
        (parent, name, child)
        for parent in model.modules()
        if isinstance(parent, nn.ModuleList)
        for name, child in parent.named_children()
        if {part for part, _ in child.named_children()} == LAYER_PARTS
    ]
    if not candidates:
        return []
    dtype = next(model.parameters()).dtype
    trial = _Trial(model, [layer for _, _, layer in candidates], calls, context, kernels)
    workspace = Workspace()
    fused: list[FusedLayer] = []
    for parent, name, layer in candidates:
        try:
            call = calls[int(layer.self_attn.layer_idx)]  # type: ignore[union-attr, arg-type]
            # One at a time, so that no more than one layer is in memory more than once.
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
            with running_step(plan):
                model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        options = {name: _float32(given) for name, given in kwargs.items() if name != "hidden_states"}
        self._seen[id(layer)] = (hidden.float(), options)

    def difference(self, layer: nn.Module, call: AttentionCall) -> float:
        """Returns the norm of the difference, relative to what the original adds to its input.

        Raises:
            _DifferentError: the layer has other parts.
        """
        before, options = self._seen.pop(id(layer))
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
