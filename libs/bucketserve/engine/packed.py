"""The transformers engine: each step is one forward pass without padding, prompt pieces and decodes side by side.

add -> waiting --(KV range)--> prefilling --(prompt complete)--> decoding --(stop, length)--> gone
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from bucketserve.core.errors import EngineError
from bucketserve.core.stepping import plan_prefill
from bucketserve.core.types import FinishReason, Headroom, RequestId, StepSample
from bucketserve.engine.attention import Segment, StepPlan, running_step
from bucketserve.engine.kv_memory import KvMemory
from bucketserve.engine.sampling import SampleRow, sample, token_logprobs
from bucketserve.ports import EngineInfo, SequenceFailure, SequenceSpec, StepOutput, TokenLogprobs, TokenOutput

__all__ = ["DeviceMemory", "PackedEngine", "PackedLimits"]

MIN_STEP_TOKENS = 16
LOWERED_BUDGET = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLimits:
    """Sizes of an engine."""

    context_tokens: int
    max_sequences: int
    max_step_tokens: int


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of the device: total, held by this process, free."""

    total: int
    reserved: int
    free: int


@dataclass(slots=True, eq=False)
class _Sequence:
    spec: SequenceSpec
    max_chunk_tokens: int
    tokens: list[int]
    """Prompt and generated tokens."""
    kv_start: int = -1
    num_cached: int = 0
    """Tokens whose KV is in memory."""
    num_generated: int = field(default=0)

    @property
    def reserved(self) -> int:
        return len(self.spec.token_ids) + self.spec.max_new_tokens

    @property
    def remaining(self) -> int:
        return len(self.spec.token_ids) - self.num_cached


@dataclass(frozen=True, slots=True)
class _Entry:
    """New tokens of one sequence in a step."""

    sequence: _Sequence
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Whether the last of them is the sequence's last token, so that its logits are wanted."""
        return self.sequence.num_cached + self.num_tokens == len(self.sequence.tokens)


class PackedEngine:
    """See ports.Engine. Built by engine.loader; owned by one thread."""

    def __init__(
        self,
        model: Any,
        memory: KvMemory,
        info: EngineInfo,
        limits: PackedLimits,
        *,
        weights_bytes: int,
        activation_bytes_per_token: int,
        device_memory: Callable[[], DeviceMemory],
    ) -> None:
        """Takes a warm model whose attention is bucketserve.engine.attention."""
        self._model = model
        self._memory = memory
        self._info = info
        self._limits = limits
        self._weights_bytes = weights_bytes
        self._activation_bytes_per_token = activation_bytes_per_token
        self._device_memory = device_memory
        self._device = torch.device(info.device)
        self._max_step_tokens = limits.max_step_tokens
        self._budget_tokens = memory.num_tokens
        self._num_out_of_memory = 0
        self._waiting: dict[RequestId, _Sequence] = {}
        self._running: dict[RequestId, _Sequence] = {}

    @property
    def info(self) -> EngineInfo:
        """See ports.Engine."""
        return self._info

    @property
    def model(self) -> Any:
        """The model, for benchmarks that count its weights."""
        return self._model

    def headroom(self) -> Headroom:
        """See ports.Engine."""
        reserved = sum(s.reserved for group in (self._waiting, self._running) for s in group.values())
        device = self._device_memory()
        return Headroom(
            kv_total_tokens=self._budget_tokens,
            kv_free_tokens=self._budget_tokens - reserved,
            max_sequences=self._limits.max_sequences,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            waiting_prefill_tokens=sum(s.remaining for s in self._waiting.values()),
            kv_bytes_per_token=self._info.kv_bytes_per_token,
            device_total_bytes=device.total,
            device_reserved_bytes=device.reserved,
            device_free_bytes=device.free,
            weights_bytes=self._weights_bytes,
            activation_bytes_per_token=self._activation_bytes_per_token,
            num_out_of_memory=self._num_out_of_memory,
        )

    def fragmentation(self) -> float:
        """Returns the share of free KV memory that one large sequence could not use."""
        return self._memory.allocator.fragmentation()

    def add(self, sequences: Sequence[SequenceSpec], max_chunk_tokens: int = 0) -> None:
        """See ports.Engine."""
        most = min(self._limits.context_tokens, self._memory.num_tokens)
        for spec in sequences:
            needed = len(spec.token_ids) + spec.max_new_tokens
            if needed > most:
                raise EngineError(f"{needed} tokens can never fit: the context is {most} tokens here")
            if spec.request_id in self._waiting or spec.request_id in self._running:
                raise EngineError(f"sequence {spec.request_id} is already here")
        for spec in sequences:
            self._waiting[spec.request_id] = _Sequence(spec, max_chunk_tokens, list(spec.token_ids))

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """See ports.Engine."""
        for request_id in request_ids:
            sequence = self._waiting.pop(request_id, None) or self._running.pop(request_id, None)
            if sequence is not None:
                self._release(sequence)

    def has_work(self) -> bool:
        """See ports.Engine."""
        return bool(self._waiting or self._running)

    def close(self) -> None:
        """See ports.Engine."""
        self.cancel([*self._waiting, *self._running])
        del self._model, self._memory
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def check_integrity(self) -> None:
        """Checks that every KV token is either free or owned by exactly one sequence.

        Raises:
            EngineError: it is not so.
        """
        ranges = sorted((s.kv_start, s.reserved) for s in self._all() if s.kv_start >= 0)
        used = sum(length for _, length in ranges)
        overlaps = any(a[0] + a[1] > b[0] for a, b in pairwise(ranges))
        if overlaps or used + self._memory.allocator.num_free != self._memory.num_tokens:
            raise EngineError(f"KV memory is inconsistent: {used} used, {self._memory.allocator.num_free} free")

    @torch.inference_mode()
    def step(self) -> StepOutput:
        """See ports.Engine."""
        entries = self._compose()
        if not entries:
            return StepOutput()
        start_s = time.perf_counter()
        sample_of = _measure(entries)
        failures: list[SequenceFailure] = []
        rows, logits = self._forward(entries, failures)
        outputs, prefilled = self._choose(rows, logits)
        return StepOutput(
            tokens=tuple(outputs),
            prefilled=tuple(prefilled),
            failures=tuple(failures),
            sample=sample_of(time.perf_counter() - start_s),
        )

    # --- composing ----------------------------------------------------------------------------------------------

    def _compose(self) -> list[_Entry]:
        """Returns this step's tokens: every decoding sequence, then prompt pieces in order of arrival."""
        entries = [_Entry(sequence, 1) for sequence in self._running.values()]
        ready: list[_Sequence] = []
        for sequence in self._waiting.values():
            if len(entries) + len(ready) >= self._limits.max_sequences or not self._reserve(sequence):
                break
            ready.append(sequence)
        chunks = [sequence.max_chunk_tokens for sequence in ready if sequence.max_chunk_tokens]
        pieces = plan_prefill(
            ((sequence.spec.request_id, sequence.remaining) for sequence in ready),
            num_decoding=len(entries),
            max_step_tokens=self._max_step_tokens,
            max_chunk_tokens=min(chunks, default=0),
        )
        return entries + [_Entry(self._waiting[piece.request_id], piece.num_tokens) for piece in pieces]

    def _reserve(self, sequence: _Sequence) -> bool:
        """Gives a sequence its KV range, moving others together if only fragmentation is in the way."""
        if sequence.kv_start >= 0:
            return True
        allocator = self._memory.allocator
        start = allocator.allocate(sequence.reserved)
        if start is None and allocator.num_free >= sequence.reserved:
            holders = sorted((s for s in self._all() if s.kv_start >= 0), key=lambda s: s.kv_start)
            starts = self._memory.compact([(s.kv_start, s.reserved) for s in holders])
            for holder, new_start in zip(holders, starts, strict=True):
                holder.kv_start = new_start
            start = allocator.allocate(sequence.reserved)
        if start is None:
            return False
        sequence.kv_start = start
        return True

    def _release(self, sequence: _Sequence) -> None:
        if sequence.kv_start >= 0:
            self._memory.allocator.release(sequence.kv_start, sequence.reserved)
            sequence.kv_start = -1

    def _all(self) -> list[_Sequence]:
        return [*self._waiting.values(), *self._running.values()]

    # --- running ------------------------------------------------------------------------------------------------

    def _forward(
        self, entries: Sequence[_Entry], failures: list[SequenceFailure]
    ) -> tuple[list[_Sequence], torch.Tensor | None]:
        """Runs entries and notes their KV; returns the sequences that get a token, and their logits in that order.

        When the device is out of memory the entries are halved and tried again, down to a single token; what does not
        even fit alone is given up. Nothing is lost by a failed try: it wrote at most the same KV.
        """
        try:
            logits = self._run_model(entries)
        except torch.OutOfMemoryError as error:
            self._note_out_of_memory()
            halves = _halve(entries)
            if halves is None:
                self._fail(entries[0].sequence, f"out of memory: {error}", failures)
                return [], None
            parts = [self._forward(half, failures) for half in halves]
            rows = [sequence for part, _ in parts for sequence in part]
            tensors = [tensor for _, tensor in parts if tensor is not None]
            return rows, torch.cat(tensors) if tensors else None
        rows = [entry.sequence for entry in entries if entry.completes]
        for entry in entries:
            entry.sequence.num_cached += entry.num_tokens
        return rows, logits

    def _run_model(self, entries: Sequence[_Entry]) -> torch.Tensor | None:
        """One forward pass; returns logits [rows, vocabulary] in float32 for the entries that complete, or None."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        segments: list[Segment] = []
        last: list[int] = []
        for entry in entries:
            sequence, start = entry.sequence, entry.sequence.num_cached
            end = start + entry.num_tokens
            segments.append(Segment(len(ids), entry.num_tokens, sequence.kv_start, end))
            ids += sequence.tokens[start:end]
            positions += range(start, end)
            slots += range(sequence.kv_start + start, sequence.kv_start + end)
            if entry.completes:
                last.append(len(ids) - 1)
        device = self._device
        plan = StepPlan(self._memory, segments, torch.tensor(slots, device=device))
        with running_step(plan):
            output = self._model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                # Logits cost hidden x vocabulary per position: only where a token is chosen. At least one is asked for.
                logits_to_keep=torch.tensor(last or [0], device=device),
            )
        return output.logits[0].float() if last else None

    def _note_out_of_memory(self) -> None:
        self._num_out_of_memory += 1
        self._max_step_tokens = max(self._max_step_tokens // 2, MIN_STEP_TOKENS)
        self._budget_tokens = int(self._budget_tokens * LOWERED_BUDGET)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _fail(self, sequence: _Sequence, message: str, failures: list[SequenceFailure]) -> None:
        self.cancel([sequence.spec.request_id])
        failures.append(SequenceFailure(request_id=sequence.spec.request_id, message=message, is_retryable=True))

    # --- choosing -----------------------------------------------------------------------------------------------

    def _choose(
        self, rows: Sequence[_Sequence], logits: torch.Tensor | None
    ) -> tuple[list[TokenOutput], list[RequestId]]:
        """Samples the rows' next tokens; returns them and the sequences whose prompt is now complete."""
        if logits is None:
            return [], []
        chosen = sample(logits, [_sample_row(sequence) for sequence in rows])
        logprobs = token_logprobs(logits, chosen, [sequence.spec.num_logprobs for sequence in rows])
        prefilled = []
        for sequence in rows:
            request_id = sequence.spec.request_id
            if request_id in self._waiting:
                self._running[request_id] = self._waiting.pop(request_id)
                prefilled.append(request_id)
        outputs = [self._take(*row) for row in zip(rows, chosen, logprobs, strict=True)]
        return outputs, prefilled

    def _take(self, sequence: _Sequence, token_id: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        spec = sequence.spec
        if token_id in spec.stop_token_ids:
            self.cancel([spec.request_id])
            return TokenOutput(
                request_id=spec.request_id,
                token_id=None,
                finish_reason=FinishReason.STOP,
                matched_stop_token_id=token_id,
            )
        sequence.tokens.append(token_id)
        sequence.num_generated += 1
        is_last = sequence.num_generated >= spec.max_new_tokens
        if is_last:
            self.cancel([spec.request_id])
        return TokenOutput(
            request_id=spec.request_id,
            token_id=token_id,
            logprobs=logprobs,
            finish_reason=FinishReason.LENGTH if is_last else None,
        )


def _sample_row(sequence: _Sequence) -> SampleRow:
    position = sequence.spec.num_resumed_tokens + sequence.num_generated
    return SampleRow(sequence.spec.sampling, position, sequence.tokens)


def _measure(entries: Sequence[_Entry]) -> Callable[[float], StepSample]:
    """Returns what makes the step's sample once its duration is known; lengths are read before they change."""
    prefills = [entry for entry in entries if entry.sequence.remaining > 0]
    decodes = [entry for entry in entries if entry.sequence.remaining <= 0]
    prefill_tokens = sum(entry.num_tokens for entry in prefills)
    attention = sum(entry.num_tokens * (entry.sequence.num_cached + entry.num_tokens) for entry in prefills)
    context = sum(entry.sequence.num_cached + 1 for entry in decodes)
    return lambda duration_s: StepSample(
        prefill_tokens=prefill_tokens,
        prefill_attention=attention,
        decode_sequences=len(decodes),
        decode_context_tokens=context,
        duration_s=duration_s,
    )


def _halve(entries: Sequence[_Entry]) -> tuple[list[_Entry], list[_Entry]] | None:
    """Returns two smaller parts of a step, to be run in this order; None if it is a single token."""
    if len(entries) > 1:
        middle = len(entries) // 2
        return list(entries[:middle]), list(entries[middle:])
    entry = entries[0]
    if entry.num_tokens == 1:
        return None
    half = entry.num_tokens // 2
    return [_Entry(entry.sequence, half)], [_Entry(entry.sequence, entry.num_tokens - half)]
