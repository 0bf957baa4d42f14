"""The transformers engine: each step is one forward pass without padding, prompt pieces and decodes side by side.

add -> waiting --(KV of its prompt)--> prefilling --(prompt complete)--> decoding --(stop, length)--> gone
                                          |                                |
                                          +-------(KV runs out)------------+--> let go
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bucketserve.core.errors import EngineError, KvGoneError, NoAdapterError
from bucketserve.core.pace import StepPace
from bucketserve.core.stepping import plan_prefill
from bucketserve.core.types import Headroom, RequestId
from bucketserve.engine.device_memory import DeviceMemory
from bucketserve.engine.drawing import Race, race
from bucketserve.engine.forward import Forward
from bucketserve.engine.grammar_compiler import GrammarCompiler
from bucketserve.engine.grammars import GrammarTokenizer
from bucketserve.engine.kv_memory import PAGE_TOKENS, KvMemory, num_pages
from bucketserve.engine.kv_space import KvSpace
from bucketserve.engine.pressure import MemoryPressure
from bucketserve.engine.sequence_table import SequenceTable
from bucketserve.engine.sequences import EngineSequence, Entry, measure
from bucketserve.engine.step_runner import Row, StepRunner
from bucketserve.ports import UNKNOWN_TOKEN, Adapter, EngineInfo, SequenceFailure, SequenceSpec, StepOutput, TokenOutput

__all__ = ["PackedEngine", "PackedLimits"]

NO_ADAPTERS = "this engine has no adapters"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLimits:
    """Sizes of an engine."""

    context_tokens: int
    max_sequences: int
    max_step_tokens: int
    vocabulary: int
    """Token ids that the model knows. Any other would be the last one on a GPU: its device is lost with it."""


class PackedEngine:
    """See ports.Engine. Built by engine.loader; owned by one thread."""

    def __init__(
        self,
        forward: Forward,
        memory: KvMemory,
        info: EngineInfo,
        limits: PackedLimits,
        *,
        weights_bytes: int,
        activation_bytes_per_token: int,
        device_memory: Callable[[], DeviceMemory],
        race: Race = race,
        keeps_prefixes: bool = True,
        grammar_tokenizer: GrammarTokenizer | None = None,
    ) -> None:
        """Takes the forward pass of a warm model over this memory. Without a tokenizer for grammars there are none."""
        self._table = SequenceTable(KvSpace(memory, keeps_prefixes=keeps_prefixes))
        self._info = info
        self._limits = limits
        self._weights_bytes = weights_bytes
        self._activation_bytes_per_token = activation_bytes_per_token
        self._device_memory = device_memory
        self._device = torch.device(info.device)
        self._pressure = MemoryPressure(limits.max_step_tokens, memory.num_tokens)
        self._runner = StepRunner(forward, self._device, race, self._pressure)
        self._pace = StepPace()
        self._num_decode_steps = 0
        self._preempted: list[RequestId] = []
        """Let go since the last step."""
        self._unfit: list[EngineSequence] = []
        """Added since the last step, with tokens that the model doesn't know."""
        self._compiler = None if grammar_tokenizer is None else GrammarCompiler(grammar_tokenizer)

    @property
    def info(self) -> EngineInfo:
        """See ports.Engine."""
        return self._info

    @property
    def forward(self) -> Forward:
        """The forward pass, for measurements; only while the engine is idle."""
        return self._runner.forward

    @property
    def _most_tokens(self) -> int:
        """Tokens that a sequence may have, generated ones included."""
        return min(self._limits.context_tokens, self._table.space.memory.num_tokens)

    def headroom(self) -> Headroom:
        """See ports.Engine."""
        table, total = self._table, self._pressure.budget_tokens
        device = self._device_memory()
        return Headroom(
            kv_total_tokens=total,
            kv_free_tokens=max(total - table.num_used_tokens, 0),
            kv_kept_tokens=table.space.num_kept_pages * PAGE_TOKENS,
            max_sequences=self._limits.max_sequences,
            num_decode_steps=self._num_decode_steps,
            num_running=len(table.running),
            num_waiting=len(table.waiting),
            waiting_prefill_tokens=sum(s.remaining for s in table.waiting.values()),
            kv_bytes_per_token=self._info.kv_bytes_per_token,
            device_total_bytes=device.total,
            device_reserved_bytes=device.reserved,
            device_free_bytes=device.free,
            weights_bytes=self._weights_bytes,
            activation_bytes_per_token=self._activation_bytes_per_token,
            num_out_of_memory=self._pressure.num_out_of_memory,
            num_prefix_asked_tokens=table.num_prefix_asked,
            num_prefix_reused_tokens=table.num_prefix_reused,
        )

    def add(self, sequences: Sequence[SequenceSpec], max_chunk_tokens: int = 0) -> None:
        """See ports.Engine."""
        seen = set(self._table)
        for spec in sequences:
            spec.check(self._most_tokens)
            if spec.request_id in seen:
                raise EngineError(f"sequence {spec.request_id} is already here")
            self._check_means(spec)
            seen.add(spec.request_id)
        for spec in sequences:
            sequence = EngineSequence(spec, max_chunk_tokens, list(spec.token_ids))
            self._table.waiting[spec.request_id] = sequence
            if spec.is_known(self._limits.vocabulary):
                self._compile(sequence)
            else:
                self._unfit.append(sequence)

    def load_adapter(self, adapter: Adapter) -> None:
        """Always refused (EngineInfo.max_adapters)."""
        raise EngineError(NO_ADAPTERS)

    def unload_adapter(self, fingerprint: str) -> bool:
        """See ports.Engine."""
        return True

    def hand_over(self, request_id: RequestId) -> bytes | None:
        """None: KV goes as bytes."""
        return None

    def take_over(self, spec: SequenceSpec, generated: Sequence[int], handle: bytes) -> None:
        """Always refused.

        Raises:
            EngineError: this engine takes KV as bytes.
        """
        raise EngineError("this engine takes KV as bytes, not by a handle")

    def export_kv(self, request_id: RequestId, into: memoryview) -> None:
        """See ports.Engine."""
        sequence = self._table.running.get(request_id)
        if sequence is None or sequence.kv is None or not sequence.spec.hands_over:
            raise EngineError(f"sequence {request_id} is not here to be handed over")
        self._check_length(sequence.num_cached, into)
        try:
            self._table.space.memory.copy_out(sequence.kv.pages, sequence.num_cached, into)
        except Exception as error:
            raise EngineError(f"the KV of {sequence.num_cached} tokens can't be copied: {error}") from error
        self.cancel([request_id])

    def known_pages(self, token_ids: Sequence[int], salt: bytes) -> int:
        """See ports.Engine."""
        return len(self._table.space.find(token_ids, salt))

    def import_kv(self, spec: SequenceSpec, generated: Sequence[int], kv: memoryview) -> None:
        """See ports.Engine."""
        if spec.request_id in self._table:
            raise EngineError(f"sequence {spec.request_id} is already here")
        self._check_means(spec)
        if not spec.is_known(self._limits.vocabulary, generated):
            raise EngineError(UNKNOWN_TOKEN)
        sequence = EngineSequence(
            spec,
            0,
            [*spec.token_ids, *generated],
            num_generated=len(generated),
            first_token_s=time.perf_counter(),
        )
        with_kv, space, page_bytes = sequence.tokens[:-1], self._table.space, self._info.kv_page_bytes
        known = space.find(with_kv, spec.prefix_salt)
        # Pages that did not come, since they were here.
        num_left_out = max(len(with_kv) * self._info.kv_bytes_per_token - len(kv), 0) // page_bytes
        self._check_length(len(with_kv) - num_left_out * PAGE_TOKENS, kv)
        if num_left_out > len(known):
            raise KvGoneError(f"{num_left_out} pages of KV were here, now {len(known)}")
        stay = self._table.pages_that_stay()
        needed = num_pages(sequence.first_tokens) - len(stay.intersection(known))
        if spec.reserved_tokens > self._most_tokens or needed > space.memory.num_pages - len(stay):
            raise EngineError(f"no room for {spec.reserved_tokens} tokens whose KV has come")
        # Those that run may have grown since it was sent for. What is known stays known: who goes leaves it behind.
        self._make_room(lambda: space.free_after(sequence.first_tokens, known) >= 0)
        sequence.kv = space.take(sequence.first_tokens, spec.prefix_salt, known)
        num_known_tokens = len(known) * PAGE_TOKENS
        try:
            space.memory.copy_in(
                sequence.kv.pages[len(known) :],
                len(with_kv) - num_known_tokens,
                kv[(len(known) - num_left_out) * page_bytes :],
            )
        except Exception as error:
            space.release(sequence.kv)
            raise EngineError(f"the KV of {len(with_kv)} tokens can't be copied: {error}") from error
        sequence.num_cached = len(with_kv)
        space.publish(sequence.kv, with_kv)
        self._table.running[spec.request_id] = sequence
        self._compile(sequence)

    def _compile(self, sequence: EngineSequence) -> None:
        """Has what its output must be compiled, meanwhile; it has no part in steps until that is done."""
        if self._compiler is not None and sequence.spec.structured_output is not None:
            self._compiler.begin(sequence)

    def _check_means(self, spec: SequenceSpec) -> None:
        """Raises EngineError: it asks for what this engine does not have."""
        if spec.structured_output is not None and self._compiler is None:
            raise EngineError("this engine has no grammars: the model's tokenizer is of no kind that they know")
        if spec.adapter:
            raise NoAdapterError(NO_ADAPTERS)

    def _check_length(self, num_tokens: int, data: memoryview) -> None:
        if len(data) != num_tokens * self._info.kv_bytes_per_token:
            raise EngineError(f"{len(data)} bytes are not the KV of {num_tokens} tokens")

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """See ports.Engine."""
        for request_id in request_ids:
            sequence = self._table.remove(request_id)
            if sequence is not None and self._compiler is not None:
                self._compiler.forget(sequence)

    def has_work(self) -> bool:
        """See ports.Engine."""
        return bool(self._table.waiting or self._table.running or self._preempted)

    def close(self) -> None:
        """See ports.Engine."""
        self.cancel([*self._table])
        if self._compiler is not None:
            self._compiler.close()
        del self._runner, self._table
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def check_integrity(self) -> None:
        """Checks that all KV is free, kept for reuse, or had by the sequences that are counted as its users.

        Raises:
            EngineError: it is not so.
        """
        self._table.space.check_integrity()

    @torch.inference_mode()
    def step(self) -> StepOutput:
        """See ports.Engine."""
        # Those that may not be let go have all that they may use: what lacks is lacking to others.
        self._make_room(lambda: self._table.num_missing_pages <= self._table.space.num_free_pages)
        preempted, self._preempted = tuple(self._preempted), []
        failures = [*map(self._give_up, self._never_to_run())]
        entries = self._compose()
        if not entries:
            self._pressure.idle()
            if self._compiler is not None:
                self._compiler.wait()
            return StepOutput(preempted=preempted, failures=tuple(failures))
        start_s = time.perf_counter()
        sample_of = measure(entries)
        outcome = self._runner.run(entries)
        failures += map(self._give_up, outcome.failures)
        for entry in entries:
            if entry.sequence.spec.request_id in self._table.waiting:
                self._table.publish(entry.sequence)
        rows = outcome.rows
        prefilled = [row.sequence.spec.request_id for row in rows if self._table.begin_decoding(row.sequence)]
        sample = sample_of(time.perf_counter() - start_s)
        self._pace.learn(sample)
        self._num_decode_steps += sample.decode_sequences > 0
        return StepOutput(
            tokens=tuple(self._take(row) for row in rows),
            prefilled=tuple(prefilled),
            failures=tuple(failures),
            preempted=preempted,
            sample=sample,
        )

    # --- composing ----------------------------------------------------------------------------------------------

    def _compose(self) -> list[Entry]:
        """Returns this step's tokens: every decoding sequence, then prompt pieces."""
        entries = [Entry(sequence, 1) for sequence in self._table.running.values() if sequence.may_run]
        self._table.grow()
        ready = self._table.ready(self._limits.max_sequences)
        if not ready:
            return entries
        limits = [*(sequence.max_chunk_tokens for sequence in ready), self._paced_tokens(ready)]
        pieces = plan_prefill(
            ((sequence.spec.request_id, sequence.remaining) for sequence in ready),
            num_decoding=len(entries),
            max_step_tokens=self._pressure.max_step_tokens,
            max_chunk_tokens=min((limit for limit in limits if limit), default=0),
        )
        return entries + [Entry(self._table.waiting[piece.request_id], piece.num_tokens) for piece in pieces]

    def _paced_tokens(self, ready: Sequence[EngineSequence]) -> int:
        """Returns the most prompt tokens beside which those that decode keep their TPOT; 0 for no limit."""
        running = self._table.running.values()
        furthest = max(
            min(sequence.num_cached + self._limits.max_step_tokens, len(sequence.tokens)) for sequence in ready
        )
        return self._pace.prompt_tokens(
            (pace for sequence in running if (pace := sequence.pace)),
            num_decoding=len(running),
            context_tokens=sum(sequence.num_cached + 1 for sequence in running),
            prompt_end=furthest,
            now_s=time.perf_counter(),
        )

    def _make_room(self, has_room: Callable[[], bool]) -> None:
        """Lets sequences go until there is room; their names are in the next step's output."""
        while not has_room():
            request_id = self._table.least_loss()
            self.cancel([request_id])
            self._preempted.append(request_id)

    def _never_to_run(self) -> Iterator[SequenceFailure]:
        """Yields failures of those added of which it turned out that they can't run."""
        for sequence in self._unfit:
            if self._table.waiting.get(sequence.spec.request_id) is sequence:
                yield SequenceFailure(request_id=sequence.spec.request_id, message=UNKNOWN_TOKEN)
        self._unfit.clear()
        for sequence, message in self._compiler.done() if self._compiler is not None else ():
            yield SequenceFailure(request_id=sequence.spec.request_id, message=message)

    def _give_up(self, failure: SequenceFailure) -> SequenceFailure:
        """Takes a sequence out; nobody finds anything of its KV, which may be what is wrong with it."""
        self._table.discard(failure.request_id)
        self.cancel([failure.request_id])
        return failure

    def _take(self, row: Row) -> TokenOutput:
        """Adds a token to its sequence, or ends it."""
        spec, token_id = row.sequence.spec, row.token_id
        reason = row.sequence.take(token_id, time.perf_counter())
        if reason is not None:
            self.cancel([spec.request_id])
        # A stop token is no part of the output.
        is_stop = token_id in spec.stop_token_ids
        return TokenOutput(
            request_id=spec.request_id,
            token_id=None if is_stop else token_id,
            logprobs=None if is_stop else row.logprobs,
            finish_reason=reason,
            matched_stop_token_id=token_id if is_stop else None,
            cached_prompt_tokens=row.sequence.num_reused,
        )
