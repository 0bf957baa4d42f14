"""Loads a Hugging Face causal LM and builds a PackedEngine around it."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bucketserve.core.errors import EngineError, ModelLoadError
from bucketserve.engine.attention import NAME, Probe, Segment, StepPlan, running_step
from bucketserve.engine.kv_memory import KvLayout, KvMemory, bytes_per_token
from bucketserve.engine.linear import pack_linears
from bucketserve.engine.packed import DeviceMemory, PackedEngine, PackedLimits
from bucketserve.ports import EngineInfo

__all__ = ["LoadSettings", "build_engine", "load_engine"]

CPU_KV_SHARE = 0.25
CPU_KV_MOST_BYTES = 4 * 1024**3
CUDA_KV_SHARE = 0.85
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """What to load and how; 0 means: measured, or what the model has."""

    model: str
    device: str = "auto"
    dtype: str = "auto"
    num_threads: int = 0
    kv_budget_bytes: int = 0
    kv_budget_tokens: int = 0
    context_tokens: int = 0
    max_sequences: int = 64
    max_step_tokens: int = 2048


def load_engine(settings: LoadSettings, on_progress: Callable[[str], None] = lambda text: None) -> PackedEngine:
    """Returns a warm engine. Takes seconds to minutes; on_progress is told what is being done.

    Raises:
        ModelLoadError: the model can't be loaded or served; says what to do.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    device = _device(settings.device)
    on_progress(f"loading weights of {os.path.basename(settings.model.rstrip('/')) or settings.model}")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=_dtype(settings.dtype, device), attn_implementation=NAME
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelLoadError(
            f"can't load {settings.model!r}: {error}\ngive a directory with config.json and safetensors, or a hub id, "
            "of a causal LM whose attention goes through transformers' AttentionInterface"
        ) from error
    return build_engine(model.to(device).eval(), settings, on_progress)


def build_engine(
    model: Any, settings: LoadSettings, on_progress: Callable[[str], None] = lambda text: None
) -> PackedEngine:
    """Returns an engine around a model that is on its device and uses our attention.

    Raises:
        ModelLoadError: the model's attention can't be served.
    """
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    text_config = model.config.get_text_config()
    context = settings.context_tokens or next(
        (int(value) for name in CONTEXT_NAMES if (value := getattr(text_config, name, None))), 0
    )
    if not context:
        raise ModelLoadError(f"{settings.model!r} names no context length; set context_tokens")
    weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if device.type == "cpu" and (number := pack_linears(model)):
        on_progress(f"{number} linear layers laid out for this CPU")
    on_progress("looking at its attention")
    layouts = _probe(model, text_config.num_hidden_layers, settings.model)
    on_progress("warming up")
    max_step_tokens = min(settings.max_step_tokens, context)
    activation = _warm_up(model, layouts, max_step_tokens, dtype, device)
    per_token = bytes_per_token(layouts, dtype)
    tokens = _budget_tokens(settings, per_token, context, device)
    on_progress(f"taking {tokens * per_token / 2**20:,.0f} MiB for KV of {tokens:,} tokens")
    return PackedEngine(
        model,
        KvMemory(layouts, tokens, dtype, device),
        EngineInfo(
            name="transformers",
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            context_tokens=context,
            kv_bytes_per_token=per_token,
            pays_padding=False,
        ),
        PackedLimits(context_tokens=context, max_sequences=settings.max_sequences, max_step_tokens=max_step_tokens),
        weights_bytes=weights_bytes,
        activation_bytes_per_token=activation,
        device_memory=lambda: _device_memory(device),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    """Returns the number type; auto is the model's own on CUDA, and float32, the exact one, on CPU."""
    if name == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


@torch.inference_mode()
def _probe(model: Any, num_layers: int, name: str) -> list[KvLayout]:
    """Returns each layer's KV shape, by running one token through the model.

    Raises:
        ModelLoadError: some layer does not call our attention, or wants something of it that is not done.
    """
    probe = Probe()
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    advice = "serve it with another engine, or choose a model with plain, sliding-window or soft-capped attention"
    try:
        with running_step(probe):
            model(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=1)
    except (EngineError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ModelLoadError(f"{name!r} ({type(model).__name__}) can't be served: {error}; {advice}") from error
    if sorted(probe.layouts) != list(range(num_layers)):
        seen = f"{len(probe.layouts)} of {num_layers} layers use transformers' AttentionInterface"
        raise ModelLoadError(f"{name!r} ({type(model).__name__}): {seen}; {advice}")
    return [probe.layouts[layer] for layer in range(num_layers)]


@torch.inference_mode()
def _warm_up(model: Any, layouts: list[KvLayout], num_tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """Runs the largest step once; returns the activation bytes that it took per token."""
    memory = KvMemory(layouts, num_tokens, dtype, device)
    ids = torch.zeros(1, num_tokens, dtype=torch.long, device=device)
    positions = torch.arange(num_tokens, device=device)
    plan = StepPlan(memory, [Segment(0, num_tokens, 0, num_tokens)], positions)
    before = _peak_bytes(device, reset=True)
    with running_step(plan):
        model(input_ids=ids, position_ids=positions[None], use_cache=False, logits_to_keep=1)
    return max(_peak_bytes(device) - before, 0) // num_tokens


def _peak_bytes(device: torch.device, reset: bool = False) -> int:
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _budget_tokens(settings: LoadSettings, per_token: int, context: int, device: torch.device) -> int:
    """Returns the KV budget in tokens: as set, or measured; never more than all sequences could use."""
    if settings.kv_budget_tokens:
        return settings.kv_budget_tokens
    budget = settings.kv_budget_bytes
    if not budget:
        free = _device_memory(device).free
        budget = (
            int(free * CUDA_KV_SHARE) if device.type == "cuda" else min(int(free * CPU_KV_SHARE), CPU_KV_MOST_BYTES)
        )
    tokens = min(budget // per_token, settings.max_sequences * context)
    if tokens < 1:
        raise ModelLoadError(
            f"a KV budget of {budget} bytes holds no token of {per_token} bytes; raise kv_budget_bytes"
        )
    return int(tokens)


def _device_memory(device: torch.device) -> DeviceMemory:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total, torch.cuda.memory_reserved(device), free)
    page = os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * page
    return DeviceMemory(os.sysconf("SC_PHYS_PAGES") * page, resident, os.sysconf("SC_AVPHYS_PAGES") * page)
