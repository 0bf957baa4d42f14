"""The forward pass on a CUDA device: one copy to the device a step, and graphs of steps in which everybody decodes.

A graph holds for a number of sequences; what a step has fewer is filled up with tokens that are computed for nobody and
write no KV. Lengths, pages and places are read from the same device memory at each run (kernels.py), so that no graph
depends on how long contexts are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from bucketserve.core.errors import EngineError
from bucketserve.engine.attention import NAME, AttentionCall, packed_attention
from bucketserve.engine.cuda.plan import TILE, DevicePlan, places, tile_tokens
from bucketserve.engine.forward import PackedTokens, run_model
from bucketserve.engine.kv_memory import KvMemory, num_pages
from bucketserve.engine.self_check import tolerance

__all__ = ["CudaForward"]

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Sequences of a graph; steps of more run without."""
ALIGNED = 16
"""Numbers: parts of a step begin at multiples of them, since Triton compiles anew for another alignment."""
TRIAL_TOKENS = 3
"""Context of those that a graph is tried with."""
OPAQUE_ATTENTION = torch.compiler.disable(packed_attention)  # type: ignore[no-untyped-call]

Array = np.ndarray[Any, np.dtype[np.int64]]


class CudaForward:
    """See forward.Forward. Used by the thread that made it."""

    def __init__(
        self,
        model: Any,
        memory: KvMemory,
        calls: Mapping[int, AttentionCall],
        *,
        max_sequences: int,
        max_step_tokens: int,
        context_tokens: int,
        compiled: Sequence[nn.Module],
        on_progress: Callable[[str], None],
    ) -> None:
        """Compiles and captures; takes a second without `compiled`, else up to a minute.

        Args:
            model: on the device; its attention is bucketserve.engine.attention.
            memory: of its KV. Its contents are lost.
            calls: what its layers ask of attention.
            max_sequences: that may be in a step.
            max_step_tokens: prompt tokens of a step, decoding ones come on top.
            context_tokens: of a sequence.
            compiled: the layers that are to be compiled. If there are none, no step runs as a graph either.
            on_progress: is told what is being done.
        """
        self._model = model
        self._memory = memory
        self._calls = calls
        self._device = memory.keys[0].device
        torch.cuda.set_device(self._device)
        self._tile_tokens = tile_tokens(calls, memory.keys[0].itemsize)
        most_pages = max_sequences * min(num_pages(context_tokens), memory.num_pages)
        # Ids, positions, slots, wanted rows, tiles; each sequence's pages.
        size = (4 + TILE) * (max_step_tokens + max_sequences + ALIGNED) + most_pages
        self._here = torch.empty(size, dtype=torch.int64, pin_memory=True)
        self._there = torch.empty(size, dtype=torch.int64, device=self._device)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits = torch.empty(0)
        self._most_prompt = min(max_step_tokens, context_tokens)
        with torch.inference_mode():
            self._prepare(sorted({min(size, max_sequences) for size in SIZES}), compiled, on_progress)
        # From here on nobody waits for a compiler: a step for which nothing is compiled runs as the model is.
        torch.compiler.set_stance("eager_on_recompile")

    def __call__(self, tokens: PackedTokens) -> torch.Tensor | None:
        """See forward.Forward."""
        number = len(tokens.segments)
        size = next((size for size in self._graphs if size >= number), None)
        if size is None or not len(tokens.last) == number == len(tokens.ids):
            logits = self._run(*self._load(tokens))
            if not tokens.last:
                # Else whoever chooses tokens waits: how long a step takes is measured.
                torch.cuda.current_stream().synchronize()
            return logits.float() if tokens.last else None
        self._load(tokens, size)
        self._graphs[size].replay()
        return self._logits[:number]

    def _load(self, tokens: PackedTokens, size: int = 0) -> tuple[DevicePlan, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies a step to the device, filled up to `size` single tokens; returns plan, ids, positions, wanted rows."""
        at = places(tokens.segments, tokens.table, self._tile_tokens)
        single, prompts = at.single_tiles.ravel(), at.prompt_tiles.ravel()
        number = max(len(tokens.ids), size)
        ids, positions, slots, last, single_tiles, prompt_tiles, table = self._copy(
            (tokens.ids, number, 0),
            (tokens.positions, number, 0),
            (at.slots, number, -1),
            (tokens.last or [0], size or max(len(tokens.last), 1), 0),
            (single, size * TILE or len(single), 0),
            (prompts, len(prompts), 0),
            (at.table, len(at.table), 0),
        )
        plan = DevicePlan(
            self._memory,
            self._calls,
            slots,
            single_tiles.view(-1, TILE),
            prompt_tiles.view(-1, TILE),
            self._tile_tokens,
            table,
        )
        return plan, ids, positions, last

    def _copy(self, *parts: tuple[Sequence[int] | Array, int, int]) -> Iterator[torch.Tensor]:
        """Yields parts, filled up to a length with a number, on the device: those of the same lengths in one place."""
        # What is still being copied must stay as it is.
        self._copied.synchronize()
        here, slices, end = self._here.numpy(), [], 0
        for values, length, fill in parts:
            here[end : end + len(values)] = values
            here[end + len(values) : end + length] = fill
            slices.append(slice(end, end + length))
            end = -(-(end + length) // ALIGNED) * ALIGNED
        end = slices[-1].stop
        self._there[:end].copy_(self._here[:end], non_blocking=True)
        self._copied.record()
        return (self._there[place] for place in slices)

    def _run(self, plan: DevicePlan, ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return run_model(self._model, plan, ids, positions, last)

    # --- preparing ----------------------------------------------------------------------------------------------

    def _prepare(self, sizes: Sequence[int], layers: Sequence[nn.Module], on_progress: Callable[[str], None]) -> None:
        """Compiles layers and captures steps, and compares what they bring with what the model does as it is.

        What can't be compiled or captured, or differs, is served without.
        """
        decodes = {size: self._decodes(size) for size in sizes}
        # The prompt first, each time: decodes look back at its KV.
        steps = [self._prompt(), *decodes.values()]
        wanted = [self._run(*self._load(step)).float().cpu() for step in steps]
        if not layers:
            return
        torch.compiler.set_stance("default")
        on_progress(f"compiling {len(layers)} layers")
        try:
            _compile(layers)
            for step, logits in zip(steps, wanted, strict=True):
                self._compare(self._run(*self._load(step)), logits)
        except Exception as error:  # of the compiler, or of the one that it calls
            on_progress(f"serving without compiled layers: {error}")
            for layer in layers:
                layer._compiled_call_impl = None
        on_progress(f"capturing steps of up to {sizes[-1]} sequences")
        self._logits = torch.empty_like(wanted[-1], device=self._device)
        pool = torch.cuda.graph_pool_handle()
        graphs: dict[int, torch.cuda.CUDAGraph] = {}
        try:
            for size, logits in reversed(list(zip(sizes, wanted[1:], strict=True))):
                graphs[size] = self._capture(self._load(decodes[size], size), size, pool)
                graphs[size].replay()
                self._compare(self._logits[:size], logits)
        except (RuntimeError, EngineError) as error:
            on_progress(f"decoding without CUDA graphs: {error}")
            return
        self._graphs = dict(sorted(graphs.items()))

    def _capture(
        self, step: tuple[DevicePlan, torch.Tensor, torch.Tensor, torch.Tensor], size: int, pool: Any
    ) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._logits[:size].copy_(self._run(*step))
        return graph

    def _compare(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        difference = float((found.float().cpu() - wanted).norm() / wanted.norm())
        if not difference <= tolerance(self._memory.keys[0].dtype, len(self._calls)):
            raise EngineError(f"its results differ from the model's by {difference:.1%}")

    def _decodes(self, size: int) -> PackedTokens:
        """Returns the last tokens of short sequences, each in a page of its own while there are enough."""
        tokens = PackedTokens()
        for i in range(size):
            page = i % self._memory.num_pages
            tokens.add([page % 8], TRIAL_TOKENS - 1, [page], wants_logits=True)
        return tokens

    def _prompt(self) -> PackedTokens:
        """Returns the largest prompt of a step that there is room for."""
        number = min(self._most_prompt, self._memory.num_tokens)
        tokens = PackedTokens()
        tokens.add([i % 8 for i in range(number)], 0, range(num_pages(number)), wants_logits=True)
        return tokens


def _compile(layers: Sequence[nn.Module]) -> None:
    """Has layers compiled when they are called next, for any number of tokens; attention stays as it is."""
    AttentionInterface.register(NAME, OPAQUE_ATTENTION)
    for layer in layers:
        layer.compile(dynamic=True)
