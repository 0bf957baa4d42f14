"""Loads a Hugging Face causal LM and builds a PackedEngine around it."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from bucketserve.core.errors import ModelLoadError
from bucketserve.core.stepping import CPU_STEP_TOKENS, MAX_SEQUENCES, STEP_TOKENS, cpu_step_tokens
from bucketserve.engine.attention import AttentionCall, Planner, Segment, StepPlan
from bucketserve.engine.device_memory import CPU_KV_MOST_BYTES, CPU_KV_SHARE, device_memory, seldom
from bucketserve.engine.drawing import Race
from bucketserve.engine.fingerprint import HAND_OVER, model_fingerprint, tokenizer_fingerprint
from bucketserve.engine.forward import EagerForward, Forward, run_model
from bucketserve.engine.grammars import GrammarError, GrammarTokenizer
from bucketserve.engine.kv_memory import PAGE_TOKENS, KvLayout, KvMemory, bytes_per_token, num_pages
from bucketserve.engine.linear import num_multiplied, place_linears
from bucketserve.engine.model_source import accepted, context_of, model_directory, vocabulary_of
from bucketserve.engine.native.compiler import KernelBuildError
from bucketserve.engine.native.kernels import Kernels, load_kernels
from bucketserve.engine.native.layers import fuse_layers
from bucketserve.engine.native.products import KernelProducts, Products, choose_products
from bucketserve.engine.packed import PackedEngine, PackedLimits
from bucketserve.engine.pretrained import FLOATS, load_model
from bucketserve.engine.probe import Probed, decoder_layers, probe
from bucketserve.engine.races import race_of
from bucketserve.engine.sampling import SampleRow, sample
from bucketserve.engine.self_check import SelfCheck
from bucketserve.engine.weight_files import WeightFile, weight_files
from bucketserve.machine import memory as machine_memory
from bucketserve.machine import num_cpus
from bucketserve.ports import EngineInfo, Sampling

__all__ = ["LoadSettings", "build_engine", "load_engine"]

ENGINE = "transformers"
DECLARED_REACHES = {"sliding_window": "sliding", "attention_chunk_size": "chunked"}
"""How far a model says that its layers look back, with the word for them in its layer_types."""
CUDA_KV_SHARE = 0.85
CPU_STEP_SHARE = 0.25
"""Of the memory that is left, for the activations of the largest step."""
INT8_LEAST_SHARE = 0.5
"""Of the weights: whoever asks for 8 bits counts on a quarter of the memory, and on the speed."""


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
    max_sequences: int = MAX_SEQUENCES
    max_step_tokens: int = 0
    """0: STEP_TOKENS, on CPU cpu_step_tokens()."""
    quantization: str = "none"
    """none, or int8: weights of linear layers rounded to 8 bits (CPU)."""
    prefix_cache: bool = True
    kernels: str = "auto"
    """auto; torch: nothing but torch's own operations; or, on CPU, an instruction set, which must be there."""
    compile: bool = True
    """On CUDA: layers are compiled and decode steps captured as graphs, which takes up to a minute."""


def load_engine(settings: LoadSettings, on_progress: Callable[[str], None] = lambda text: None) -> PackedEngine:
    """Returns a warm engine. Takes seconds to minutes; on_progress is told what is being done.

    Raises:
        ModelLoadError: the model can't be loaded or served; says what to do.
    """
    # torch knows of the affinity and of OMP_NUM_THREADS, but of no container's share of a CPU.
    torch.set_num_threads(settings.num_threads or min(torch.get_num_threads(), num_cpus()))
    device = _device(settings.device)
    on_progress(f"loading weights of {os.path.basename(settings.model.rstrip('/')) or settings.model}")
    try:
        dtype = _dtype(settings.dtype, device)
        _check_quantization(settings, device, dtype)
        directory = model_directory(settings.model, with_weights=True)
        if isinstance(dtype, torch.dtype) and device.type == "cpu":
            _check_room(directory, dtype)
        model = load_model(directory, dtype, on_progress)
        fingerprint = model_fingerprint(
            directory,
            engine=f"{ENGINE}, KV {HAND_OVER}",
            dtype=_name_of(next(model.parameters()).dtype),
            quantization=settings.quantization,
        )
        tokenizer = tokenizer_fingerprint(directory)
        grammar_tokenizer = _grammar_tokenizer(directory, model, on_progress)
    except ModelLoadError as error:
        raise ModelLoadError(f"model {settings.model!r} can't be loaded: {error}") from error
    return build_engine(
        model.to(device),
        settings,
        on_progress,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        grammar_tokenizer=grammar_tokenizer,
    )


def _grammar_tokenizer(directory: Path, model: Any, on_progress: Callable[[str], None]) -> GrammarTokenizer | None:
    """Returns the vocabulary for grammars; None if it is of no kind that they know.

    Raises:
        ModelLoadError: the tokenizer is damaged.
    """
    file = directory / "tokenizer.json"
    if not file.exists():
        return None
    tokenizer = accepted("its tokenizer", lambda: Tokenizer.from_file(str(file)))
    try:
        return GrammarTokenizer(tokenizer, vocabulary_of(model.config.get_text_config()))
    except GrammarError as error:
        on_progress(f"serving without structured output: {error}")
        return None


def _check_quantization(settings: LoadSettings, device: torch.device, dtype: torch.dtype | str) -> None:
    """Refuses 8-bit weights that nobody here computes with.

    Raises:
        ModelLoadError: what is wanted beside them does not go with them.
    """
    if settings.quantization == "none":
        return
    what = f"quantization {settings.quantization}"
    if device.type != "cpu":
        raise ModelLoadError(f"{what} is for CPU workers; set quantization to none")
    if settings.kernels == "torch":
        raise ModelLoadError(f"{what} is done by the CPU kernels; set kernels to auto, or quantization to none")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ModelLoadError(f"{what} does not go with {_name_of(dtype)}; set dtype to float32 or bfloat16")


def _check_room(directory: Path, dtype: torch.dtype) -> None:
    """Refuses weights that would have the process killed while they are read.

    Args:
        directory: as model_directory returns it.
        dtype: in which they are loaded, those in 8 bits as well: they are rounded afterwards, layer by layer.

    Raises:
        ModelLoadError: they need more than the memory that is left.
    """
    needed = sum(_loaded_bytes(file, dtype) for file in weight_files(directory))
    left = machine_memory().available
    if needed > left:
        smaller = ", set dtype to bfloat16" if dtype.itemsize > torch.bfloat16.itemsize else ""
        raise ModelLoadError(
            f"its weights take {needed / 2**20:,.0f} MiB, loaded in {_name_of(dtype)}, and {left / 2**20:,.0f} MiB are "
            f"left of this process's memory; give it more{smaller}, or choose a smaller model"
        )


def _loaded_bytes(file: WeightFile, dtype: torch.dtype) -> int:
    """Returns the memory that a file's weights take; what is no float, or of another format, as much as in the file."""
    if not file.tensors:
        return file.num_bytes
    return sum(
        math.prod(tensor.shape) * dtype.itemsize if tensor.dtype in FLOATS else tensor.num_bytes
        for tensor in file.tensors
    )


def build_engine(
    model: Any,
    settings: LoadSettings,
    on_progress: Callable[[str], None] = lambda text: None,
    *,
    fingerprint: str = "",
    tokenizer: str = "",
    grammar_tokenizer: GrammarTokenizer | None = None,
) -> PackedEngine:
    """Returns an engine around a model that is on its device and uses our attention.

    Args:
        model: of transformers.
        settings: `model` is only what it is called.
        on_progress: is told what is being done.
        fingerprint: of its weights and settings; empty for a model that was made here.
        tokenizer: fingerprint of its tokenizer, likewise.
        grammar_tokenizer: its vocabulary; without it there is no structured output.

    Raises:
        ModelLoadError: the model can't be served with these settings.
    """
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    text_config = model.config.get_text_config()
    try:
        _check_quantization(settings, device, dtype)
        context = context_of(text_config, settings.context_tokens)
        on_progress("looking at its attention")
        probed, self_check = _examine(model, text_config.num_hidden_layers, context)
        calls = probed.calls
        kernels, placed_bytes = None, 0
        if device.type == "cpu":
            kernels = _kernels(settings, on_progress)
            placed_bytes = _place(model, probed, context, kernels, settings, on_progress)
        on_progress("comparing packed steps with the model by itself")
        is_by_triton = _is_by_triton(device, settings, on_progress)
        planner = _planner(kernels, is_by_triton=is_by_triton)
        self_check.compare(planner, is_int8=settings.quantization == "int8")
    except ModelLoadError as error:
        raise ModelLoadError(f"{settings.model!r} ({type(model).__name__}) can't be served: {error}") from error
    layouts = [calls[layer].layout for layer in sorted(calls)]
    weights_bytes = placed_bytes + sum(p.numel() * p.element_size() for p in model.parameters())
    race = race_of(kernels, device, is_by_triton=is_by_triton, on_progress=on_progress)
    warm_up = partial(
        _warm_up,
        model,
        calls,
        layouts,
        dtype=dtype,
        device=device,
        planner=planner,
        race=race,
        max_sequences=settings.max_sequences,
    )
    max_step_tokens, activation = settings.max_step_tokens or STEP_TOKENS, 0
    if device.type == "cpu" and not settings.max_step_tokens:
        max_step_tokens, activation = _cpu_step(warm_up, context)
    max_step_tokens = min(max_step_tokens, context)
    on_progress(f"warming up with steps of {max_step_tokens} tokens")
    # Buffers that stay are taken by whichever step is the first that needs them.
    activation = max(activation, warm_up(max_step_tokens))
    per_token = bytes_per_token(layouts, dtype)
    tokens = _budget_tokens(settings, per_token, context, device, activation * max_step_tokens)
    on_progress(f"taking {tokens * per_token / 2**20:,.0f} MiB for KV of {tokens:,} tokens")
    memory = KvMemory(layouts, tokens, dtype, device)
    return PackedEngine(
        _forward(
            model,
            memory,
            probed,
            planner,
            settings,
            max_step_tokens,
            context,
            on_progress,
            is_by_triton=is_by_triton,
        ),
        memory,
        EngineInfo(
            name=ENGINE,
            device=str(device),
            dtype=_name_of(dtype),
            context_tokens=context,
            kv_bytes_per_token=per_token,
            kv_layout=memory.layout,
            kv_page_tokens=PAGE_TOKENS,
            fingerprint=fingerprint,
            tokenizer=tokenizer,
            step_tokens=max_step_tokens,
            has_grammars=grammar_tokenizer is not None,
        ),
        PackedLimits(
            context_tokens=context,
            max_sequences=settings.max_sequences,
            max_step_tokens=max_step_tokens,
            vocabulary=vocabulary_of(text_config),
        ),
        weights_bytes=weights_bytes,
        activation_bytes_per_token=activation,
        device_memory=seldom(lambda: device_memory(device)),
        race=race,
        keeps_prefixes=settings.prefix_cache,
        grammar_tokenizer=grammar_tokenizer,
    )


def _is_by_triton(device: torch.device, settings: LoadSettings, on_progress: Callable[[str], None]) -> bool:
    """Whether steps are computed by engine.cuda."""
    if device.type == "cpu" or settings.kernels == "torch":
        return False
    try:
        # Only here: Triton comes with torch's builds for CUDA alone, and wants a C compiler.
        from bucketserve.engine.cuda.plan import try_kernels

        try_kernels(device)
    except Exception as error:  # of Triton, or of the compiler
        on_progress(f"serving without Triton's kernels, sequence by sequence: {type(error).__name__}: {error}")
        return False
    return True


def _planner(kernels: Kernels | None, *, is_by_triton: bool) -> Planner:
    if not is_by_triton:
        return partial(StepPlan, kernels=kernels)
    from bucketserve.engine.cuda.plan import plan_step

    return plan_step


def _forward(
    model: Any,
    memory: KvMemory,
    probed: Probed,
    planner: Planner,
    settings: LoadSettings,
    max_step_tokens: int,
    context: int,
    on_progress: Callable[[str], None],
    *,
    is_by_triton: bool,
) -> Forward:
    if not is_by_triton:
        return EagerForward(model, memory, probed.calls, planner)
    from bucketserve.engine.cuda.forward import CudaForward

    return CudaForward(
        model,
        memory,
        probed.calls,
        max_sequences=settings.max_sequences,
        max_step_tokens=max_step_tokens,
        context_tokens=context,
        compiled=[p.get_submodule(name) for p, name in decoder_layers(model, probed)] if settings.compile else [],
        on_progress=on_progress,
    )


def _kernels(settings: LoadSettings, on_progress: Callable[[str], None]) -> Kernels | None:
    if settings.kernels == "torch":
        return None
    try:
        return load_kernels(settings.kernels, on_progress)
    except KernelBuildError as error:
        if settings.kernels != "auto":
            raise ModelLoadError(f"no CPU kernels for {settings.kernels}: {error}; or set kernels to auto") from error
        on_progress(f"serving without CPU kernels: {error}")
        return None


def _place(
    model: Any,
    probed: Probed,
    context: int,
    kernels: Kernels | None,
    settings: LoadSettings,
    on_progress: Callable[[str], None],
) -> int:
    """Hands the model's layers to whoever computes them fastest here; returns the bytes of their weights.

    Raises:
        ModelLoadError: 8-bit weights are asked for, and there are no kernels, or less than half of them would be.
    """
    is_int8 = settings.quantization == "int8"
    products: Products | None
    if is_int8:
        if kernels is None:
            raise ModelLoadError("quantization int8 needs the CPU kernels; install g++, or set quantization to none")
        products = KernelProducts(kernels, is_int8=True)
    else:
        products = None if settings.kernels == "torch" else _fastest(model, kernels)
    if products is None:
        on_progress("products by torch, layers as they are")
        return 0
    fused = fuse_layers(model, probed.calls, context, kernels, products) if kernels is not None else []
    placed = place_linears(model, products, probed.read)
    num_bytes = sum(layer.num_bytes for layer in fused) + sum(linear.num_bytes for linear in placed)
    on_progress(f"{len(fused)} layers fused, {len(placed)} linear layers placed; products by {products.name}")
    if is_int8:
        share = num_bytes / (num_bytes + num_multiplied(model))
        if share < INT8_LEAST_SHARE:
            raise ModelLoadError(
                f"quantization int8 would round {share:.0%} of the weights that are multiplied with: only those of "
                "linear layers (torch.nn.Linear) can be, not experts in one tensor, for one; set quantization to none"
            )
        on_progress(f"{share:.0%} of the weights that are multiplied with are in 8 bits")
    return num_bytes


def _fastest(model: torch.nn.Module, kernels: Kernels | None) -> Products | None:
    """Returns who does the products of the largest linear layer fastest; None to leave the model as it is."""
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    if not linears:
        return None
    largest = max(linears, key=lambda linear: linear.weight.numel())
    return choose_products(kernels, largest.weight.dtype, largest.out_features, largest.in_features)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    """Returns the number type; auto is the model's own on CUDA, and float32, the exact one, on CPU."""
    if name == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _name_of(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _examine(model: Any, num_layers: int, context: int) -> tuple[Probed, SelfCheck]:
    """Returns what each layer asks of attention, and what the model computes by itself.

    Raises:
        ModelLoadError: it can't be served, or it declares a window that none of its layers has.
    """
    if not num_layers:
        raise ModelLoadError("config.json gives it no layers")
    probed = probe(model, num_layers, context)
    reaches = {reach for call in probed.calls.values() for reach in (call.window, call.chunk)}
    config = model.config.get_text_config()
    for name, kind in DECLARED_REACHES.items():
        declared, layer_types = getattr(config, name, None), getattr(config, "layer_types", None)
        is_used = getattr(config, "use_sliding_window", True) and any(kind in layer for layer in layer_types or [kind])
        if is_used and declared and declared < context and declared not in reaches:
            raise ModelLoadError(f"config.json declares {name} {declared}, and none of its layers asks for it")
    return probed, SelfCheck(model, probed, context)


@torch.inference_mode()
def _warm_up(
    model: Any,
    calls: Mapping[int, AttentionCall],
    layouts: list[KvLayout],
    num_tokens: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    planner: Planner,
    race: Race,
    max_sequences: int,
) -> int:
    """Runs the largest step once; returns the activation bytes that it took per token."""
    memory = KvMemory(layouts, num_tokens, dtype, device)
    for arena in (*memory.keys, *memory.values):
        # Its pages are there now, so that they don't count as activations.
        arena.zero_()
    ids = torch.zeros(num_tokens, dtype=torch.long, device=device)
    positions = torch.arange(num_tokens, device=device)
    plan = planner(memory, calls, [Segment(0, num_tokens, 0, num_tokens)], memory.backwards())
    before = _peak_bytes(device, reset=True)
    # On CUDA all but some of what is left becomes KV, and the tokens of many sequences are chosen at once.
    rows = min(num_tokens, max_sequences) if device.type == "cuda" else 1
    logits = run_model(model, plan, ids, positions, rows)
    # Drawn both from logits and from scores that a penalty has changed: nothing is compiled later.
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=1.0, presence_penalty=1.0)):
        sample(logits.float(), [SampleRow(sampling, 0, ())] * rows, race)
    return max(_peak_bytes(device) - before, 0) // num_tokens


def _cpu_step(warm_up: Callable[[int], int], context: int) -> tuple[int, int]:
    """Returns the tokens, a power of two, that take about CPU_STEP_S and fit, and the activation bytes of one.

    Both by the smallest step.
    """
    trial = min(CPU_STEP_TOKENS, context)
    activation = warm_up(trial)
    start_s = time.perf_counter()
    warm_up(trial)
    token_s = (time.perf_counter() - start_s) / trial
    room = machine_memory().available * CPU_STEP_SHARE
    return cpu_step_tokens(token_s, room / max(activation, 1)), activation


def _peak_bytes(device: torch.device, reset: bool = False) -> int:
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        # Loading has had a higher peak than any step: the kernel is told to forget it (proc(5), clear_refs).
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _budget_tokens(
    settings: LoadSettings, per_token: int, context: int, device: torch.device, activation_bytes: int
) -> int:
    """Returns the KV budget in tokens, whole pages: as set, or measured; never more than all sequences could use.

    Args:
        settings: as given.
        per_token: KV bytes of a token.
        context: most tokens of a sequence.
        device: where the KV will be.
        activation_bytes: what the largest step takes beside it.

    Raises:
        ModelLoadError: it does not fit into what is left.
    """
    # On CUDA what the warm-up took is still with torch's allocator.
    free = max(device_memory(device).free - (activation_bytes if device.type == "cpu" else 0), 0)
    share, most = (CUDA_KV_SHARE, free) if device.type == "cuda" else (CPU_KV_SHARE, CPU_KV_MOST_BYTES)
    budget = settings.kv_budget_bytes or min(int(free * share), most)
    most_tokens = settings.max_sequences * num_pages(context) * PAGE_TOKENS
    tokens = settings.kv_budget_tokens or min(budget // per_token, most_tokens)
    if tokens >= 1:
        tokens = max(tokens // PAGE_TOKENS, 1) * PAGE_TOKENS
    if tokens < 1 or tokens * per_token > free:
        wanted = f"{max(tokens, 1) * per_token / 2**20:,.1f} MiB of KV"
        raise ModelLoadError(
            f"{wanted} do not fit: {free / 2**20:,.0f} MiB are left of this process's memory beside the model and its "
            f"largest step ({activation_bytes / 2**20:,.0f} MiB); give it more memory, or lower the KV budget or "
            "max_step_tokens"
        )
    return int(tokens)
