"""What each layer of a model asks of attention, found out by running two tokens through it.

While it is probed, a model builds its masks. How far back a layer looks is read from the rule by which its mask was
made, at all positions up to the context: windows and chunks are known that no trial run is long enough to see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface

from bucketserve.core.errors import EngineError, ModelLoadError
from bucketserve.engine.attention import AttentionCall, current_step, packed_attention, running_step
from bucketserve.engine.kv_memory import KvLayout

__all__ = ["Probed", "as_attention", "decoder_layers", "probe", "reach_of", "refusing_what_fails"]

PROBE = "bucketserve-probe"
MOST_POSITIONS = 1 << 20
"""Masks are read up to this position."""
ROWS = 24
"""Positions whose whole row of the mask is compared."""

MaskRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, head, query position, key position) -> whether the query may look at the key."""


@dataclass(slots=True)
class Probed:
    """Takes notes of what the layers ask for instead of computing it."""

    context: int
    calls: dict[int, AttentionCall] = field(default_factory=dict)
    modules: WeakValueDictionary[int, torch.nn.Module] = field(default_factory=WeakValueDictionary)
    """The layers' attention, as long as the model has it: its weights are freed when its layer is placed."""
    rules: dict[int, MaskRule] = field(default_factory=dict)
    """By the address of the mask that was made."""
    masks: list[torch.Tensor] = field(default_factory=list)
    """Kept, so that no address is used twice."""
    read: set[int] = field(default_factory=set)
    """id() of parameters of which something is made other than products and lookups."""
    _reaches: dict[int, tuple[int | None, int | None]] = field(default_factory=dict)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        asked: Mapping[str, Any],
    ) -> torch.Tensor:
        """See attention.Step; the result is nothing but of the right shape."""
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise EngineError("its attention does not know the number of its layer")
        if int(layer) in self.calls:
            raise EngineError(f"layer {layer} calls attention more than once")
        if key.shape[2] != query.shape[2]:
            raise EngineError(f"layer {layer} attends to something other than the sequence's own tokens")
        layout = KvLayout(key.shape[1], key.shape[3], value.shape[3])
        window, chunk = self._reach(mask, asked["sliding_window"])
        scale = asked["scaling"] if asked["scaling"] is not None else query.shape[-1] ** -0.5
        group = query.shape[1] // key.shape[1]
        self.calls[int(layer)] = AttentionCall(layout, float(scale), window, asked["softcap"], chunk, group)
        self.modules[int(layer)] = module
        return query.new_ones(1, query.shape[2], query.shape[1], value.shape[3])

    def _reach(self, mask: torch.Tensor | None, window: int | None) -> tuple[int | None, int | None]:
        if mask is None:
            return (window if window and window < self.context else None), None
        address = mask.data_ptr()
        if address not in self.rules:
            raise EngineError("its layers make a mask of their own")
        if address not in self._reaches:
            self._reaches[address] = reach_of(self.rules[address], self.context, mask.device)
        return self._reaches[address]


class _NotingReads(TorchFunctionMode):
    """Notes the parameters that a model computes with otherwise than by products and lookups."""

    def __init__(self, read: set[int]) -> None:
        super().__init__()
        self._read = read

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # What it is asked for by name (shape, dtype, device) is no number of it.
        if func not in (F.linear, F.embedding) and func.__name__ != "__get__":
            self._read.update(id(given) for given in args if isinstance(given, torch.nn.Parameter))
        return func(*args, **(kwargs or {}))


def reach_of(rule: MaskRule, context: int, device: torch.device | None = None) -> tuple[int | None, int | None]:
    """Returns the window or the chunk, in tokens, that a mask's rule amounts to below `context`; None for all.

    Raises:
        EngineError: it is neither.
    """
    end = min(context, MOST_POSITIONS)
    every, zero = torch.arange(end, device=device), torch.zeros(1, dtype=torch.long, device=device)

    def seen(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return rule(zero, zero, queries, keys).broadcast_to(end)

    # The first position that does not see the beginning any more.
    size = int(seen(every, zero).long().cumprod(0).sum())
    is_window = size < end and size > 1 and bool(rule(zero, zero, zero + size, zero + 1).all())
    rows = {*torch.linspace(0, end - 1, ROWS).long().tolist(), *range(max(size - 2, 0), min(size + 2, end))}
    for row in sorted(rows):
        low = max(row - size + 1, 0) if is_window else row // size * size if size else end
        if not torch.equal(seen(zero + row, every), (every >= low) & (every <= row)):
            later = bool(seen(zero + row, every)[row + 1 :].any())
            problem = "lets tokens look at later ones" if later else "is neither causal nor a window nor chunks"
            raise EngineError(f"the mask of its layers {problem}")
    if size >= end:
        return None, None
    return (size, None) if is_window else (None, size)


@torch.inference_mode()
def probe(model: Any, num_layers: int, context: int) -> Probed:
    """Returns what each layer asks of attention.

    Raises:
        ModelLoadError: some layer does not call our attention, or wants something of it that is not done.
    """
    probed = Probed(context)
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    positions = torch.arange(2, device=model.device)[None]
    with as_attention(model, PROBE), running_step(probed), refusing_what_fails(), _NotingReads(probed.read):
        model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
    if sorted(probed.calls) != list(range(num_layers)):
        raise ModelLoadError(
            f"{len(probed.calls)} of its {num_layers} layers call attention through transformers' AttentionInterface, "
            "the others compute something that needs a state of its own"
            if probed.calls
            else "its layers do not call attention through transformers' AttentionInterface"
        )
    return probed


def decoder_layers(model: torch.nn.Module, probed: Probed) -> list[tuple[torch.nn.ModuleList, str]]:
    """Returns the places of the layers that hold the attention, in order; none if they don't lie in one list."""
    attentions = [probed.modules[layer] for layer in sorted(probed.modules)]
    for parent in model.modules():
        if not isinstance(parent, torch.nn.ModuleList):
            continue
        owner = {id(part): name for name, child in parent.named_children() for part in child.modules()}
        names = [owner.get(id(attention)) for attention in attentions]
        if None not in names and len(set(names)) == len(attentions):
            return [(parent, str(name)) for name in names]
    return []


@contextmanager
def refusing_what_fails() -> Iterator[None]:
    """Around a model's forward: whatever it raises, it can't be served.

    Raises:
        ModelLoadError: it raised; says what.
    """
    try:
        yield
    except EngineError as error:
        raise ModelLoadError(str(error)) from error
    except Exception as error:  # the model's code is somebody else's
        if isinstance(error, TypeError) and "unexpected keyword" in str(error):
            name = str(error).rpartition(" ")[2]
            raise ModelLoadError(f"its forward takes no {name}, which packed steps need") from error
        raise ModelLoadError(f"its forward fails in a packed step: {type(error).__name__}: {error}") from error


@contextmanager
def as_attention(model: Any, name: str) -> Iterator[None]:
    """Makes a model attend by another implementation of transformers' meanwhile."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _note_rule(
    *, mask_function: MaskRule, q_length: int, kv_length: int, device: torch.device | None = None, **_: Any
) -> torch.Tensor:
    """The mask interface while a model is probed: notes how a mask is made."""
    step = current_step()
    mask = torch.zeros(1, 1, q_length, kv_length, device=device)
    if isinstance(step, Probed):
        step.rules[mask.data_ptr()] = mask_function
        step.masks.append(mask)
    return mask


AttentionInterface.register(PROBE, packed_attention)
AttentionMaskInterface.register(PROBE, _note_rule)
