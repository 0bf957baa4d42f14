"""The transformers engine: each step is one forward pass without padding, prompt pieces and decodes side by side.

add -> waiting --(KV of its prompt)--> prefilling --(prompt complete)--> decoding --(stop, length)--> gone
                                          |                                |
                                          +-------(KV runs out)------------+--> let go
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bucketserve.core.errors import EngineError, KvGoneError, NoAdapterError
from bucketserve.core.pace import StepPace
from bucketserve.core.preemption import SPARE_SHARE
from bucketserve.core.stepping import plan_prefill
from bucketserve.core.types import FinishReason, Headroom, RequestId
from bucketserve.engine.device_memory import DeviceMemory
from bucketserve.engine.drawing import Race, race
from bucketserve.engine.forward import Forward, PackedTokens
from bucketserve.engine.grammar_compiler import GrammarCompiler
from bucketserve.engine.grammars import GrammarTokenizer
from bucketserve.engine.kv_memory import PAGE_TOKENS, KvMemory, num_pages
from bucketserve.engine.kv_space import KvSpace
from bucketserve.engine.pressure import MemoryPressure, is_out_of_memory
from bucketserve.engine.sequences import EngineSequence, Entry, Row, Success, Trouble, choose, halve, measure
from bucketserve.ports import Adapter, EngineInfo, SequenceFailure, SequenceSpec, StepOutput, TokenOutput

__all__ = ["PackedEngine", "PackedLimits"]

NO_ADAPTERS = "this engine has no adapters"
NO_TOKEN = "it has a token that is not in the model's vocabulary"


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
        self._forward = forward
        self._space = KvSpace(memory, keeps_prefixes=keeps_prefixes)
        self._info = info
        self._limits = limits
        self._weights_bytes = weights_bytes
        self._activation_bytes_per_token = activation_bytes_per_token
        self._device_memory = device_memory
        self._device = torch.device(info.device)
        self._race = race
        self._pressure = MemoryPressure(limits.max_step_tokens, memory.num_tokens)
        self._pace = StepPace()
        self._num_prefix_asked = self._num_prefix_reused = 0
        self._num_decode_steps = 0
        self._waiting: dict[RequestId, EngineSequence] = {}
        self._running: dict[RequestId, EngineSequence] = {}
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
        return self._forward

    def headroom(self) -> Headroom:
        """See ports.Engine."""
        space, total = self._space, self._pressure.budget_tokens
        to_come = sum(num_pages(s.first_tokens) for s in self._waiting.values() if s.kv is None)
        used = (space.memory.num_pages - space.num_free_pages + to_come) * PAGE_TOKENS
        device = self._device_memory()
        return Headroom(
            kv_total_tokens=total,
            kv_free_tokens=max(total - used, 0),
            kv_kept_tokens=space.num_kept_pages * PAGE_TOKENS,
            max_sequences=self._limits.max_sequences,
            num_decode_steps=self._num_decode_steps,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            waiting_prefill_tokens=sum(s.remaining for s in self._waiting.values()),
            kv_bytes_per_token=self._info.kv_bytes_per_token,
            device_total_bytes=device.total,
            device_reserved_bytes=device.reserved,
            device_free_bytes=device.free,
            weights_bytes=self._weights_bytes,
            activation_bytes_per_token=self._activation_bytes_per_token,
            num_out_of_memory=self._pressure.num_out_of_memory,
            num_prefix_asked_tokens=self._num_prefix_asked,
            num_prefix_reused_tokens=self._num_prefix_reused,
        )

    def add(self, sequences: Sequence[SequenceSpec], max_chunk_tokens: int = 0) -> None:
        """See ports.Engine."""
        seen = {*self._waiting, *self._running}
        for spec in sequences:
            spec.check(self._most_tokens)
            if spec.request_id in seen:
                raise EngineError(f"sequence {spec.request_id} is already here")
            if spec.structured_output is not None and self._compiler is None:
                raise EngineError("this engine has no grammars: the model's tokenizer is of no kind that they know")
            if spec.adapter:
                raise NoAdapterError(NO_ADAPTERS)
            seen.add(spec.request_id)
        for spec in sequences:
            sequence = EngineSequence(spec, max_chunk_tokens, list(spec.token_ids))
            self._waiting[spec.request_id] = sequence
            if self._are_tokens(spec.token_ids):
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
        sequence = self._running.get(request_id)
        if sequence is None or sequence.kv is None or not sequence.spec.hands_over:
            raise EngineError(f"sequence {request_id} is not here to be handed over")
        self._check_length(sequence.num_cached, into)
        try:
            self._space.memory.copy_out(sequence.kv.pages, sequence.num_cached, into)
        except Exception as error:
            raise EngineError(f"the KV of {sequence.num_cached} tokens can't be copied: {error}") from error
        self.cancel([request_id])

    def known_pages(self, token_ids: Sequence[int], salt: bytes) -> int:
        """See ports.Engine."""
        return len(self._space.find(token_ids, salt))

    def import_kv(self, spec: SequenceSpec, generated: Sequence[int], kv: memoryview) -> None:
        """See ports.Engine."""
        if spec.request_id in self._waiting or spec.request_id in self._running:
            raise EngineError(f"sequence {spec.request_id} is already here")
        if not self._are_tokens((*spec.token_ids, *generated)):
            raise EngineError(NO_TOKEN)
        sequence = EngineSequence(
            spec,
            0,
            [*spec.token_ids, *generated],
            num_generated=len(generated),
            first_token_s=time.perf_counter(),
        )
        with_kv, space, page_bytes = sequence.tokens[:-1], self._space, self._info.kv_page_bytes
        known = space.find(with_kv, spec.prefix_salt)
        # Pages that did not come, since they were here.
        num_left_out = max(len(with_kv) * self._info.kv_bytes_per_token - len(kv), 0) // page_bytes
        self._check_length(len(with_kv) - num_left_out * PAGE_TOKENS, kv)
        if num_left_out > len(known):
            raise KvGoneError(f"{num_left_out} pages of KV were here, now {len(known)}")
        stay = self._pages_that_stay()
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
            self._release(sequence)
            raise EngineError(f"the KV of {len(with_kv)} tokens can't be copied: {error}") from error
        sequence.num_cached = len(with_kv)
        space.publish(sequence.kv, with_kv)
        self._running[spec.request_id] = sequence
        self._compile(sequence)

    def _compile(self, sequence: EngineSequence) -> None:
        """Has what its output must be compiled, meanwhile; it has no part in steps until that is done."""
        if self._compiler is not None and sequence.spec.structured_output is not None:
            self._compiler.begin(sequence)

    def _are_tokens(self, token_ids: Sequence[int]) -> bool:
        return min(token_ids) >= 0 and max(token_ids) < self._limits.vocabulary

    def _check_length(self, num_tokens: int, data: memoryview) -> None:
        if len(data) != num_tokens * self._info.kv_bytes_per_token:
            raise EngineError(f"{len(data)} bytes are not the KV of {num_tokens} tokens")

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """See ports.Engine."""
        for request_id in request_ids:
            sequence = self._waiting.pop(request_id, None) or self._running.pop(request_id, None)
            if sequence is not None:
                if self._compiler is not None:
                    self._compiler.forget(sequence)
                self._release(sequence)

    def has_work(self) -> bool:
        """See ports.Engine."""
        return bool(self._waiting or self._running or self._preempted)

    def close(self) -> None:
        """See ports.Engine."""
        self.cancel([*self._waiting, *self._running])
        if self._compiler is not None:
            self._compiler.close()
        del self._forward, self._space
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def check_integrity(self) -> None:
        """Checks that all KV is free, kept for reuse, or had by the sequences that are counted as its users.

        Raises:
            EngineError: it is not so.
        """
        self._space.check_integrity()

    @torch.inference_mode()
    def step(self) -> StepOutput:
        """See ports.Engine."""
        # Those that may not be let go have all that they may use: what lacks is lacking to others.
        self._make_room(lambda: self._growth() <= self._space.num_free_pages)
        preempted, self._preempted = tuple(self._preempted), []
        failures: list[SequenceFailure] = []
        for sequence in self._unfit:
            if self._waiting.get(sequence.spec.request_id) is sequence:
                self._fail(sequence, NO_TOKEN, failures, is_retryable=False)
        self._unfit.clear()
        for sequence, message in self._compiler.done() if self._compiler is not None else ():
            self._fail(sequence, message, failures, is_retryable=False)
        entries = self._compose()
        if not entries:
            if self._compiler is not None:
                self._compiler.wait()
            return StepOutput(preempted=preempted, failures=tuple(failures))
        start_s = time.perf_counter()
        sample_of = measure(entries)
        rows = self._run(entries, failures)
        prefilled = [row.sequence.spec.request_id for row in rows if self._begin_decoding(row.sequence)]
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
        entries = [Entry(sequence, 1) for sequence in self._running.values() if sequence.may_run]
        for sequence in self._running.values():
            if sequence.kv is not None:
                self._space.grow(sequence.kv, sequence.num_cached + 1)
        ready = self._ready()
        if not ready:
            return entries
        limits = [*(sequence.max_chunk_tokens for sequence in ready), self._paced_tokens(ready)]
        pieces = plan_prefill(
            ((sequence.spec.request_id, sequence.remaining) for sequence in ready),
            num_decoding=len(entries),
            max_step_tokens=self._pressure.max_step_tokens,
            max_chunk_tokens=min((limit for limit in limits if limit), default=0),
        )
        return entries + [Entry(self._waiting[piece.request_id], piece.num_tokens) for piece in pieces]

    def _paced_tokens(self, ready: Sequence[EngineSequence]) -> int:
        """Returns the most prompt tokens beside which those that decode keep their TPOT; 0 for no limit."""
        running = self._running.values()
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

    def _ready(self) -> list[EngineSequence]:
        """Returns the waiting sequences that have KV, in order, after giving it to those for which there is room."""
        slots, may_begin = self._limits.max_sequences - len(self._running), True
        ready: list[EngineSequence] = []
        for sequence in self._waiting.values():
            if len(ready) >= slots:
                break
            if not sequence.may_run:
                continue
            may_begin = may_begin and (sequence.kv is not None or self._begin(sequence))
            if sequence.kv is not None:
                ready.append(sequence)
        return ready

    def _begin(self, sequence: EngineSequence) -> bool:
        """Gives a sequence pages for its prompt, those that are known already among them; False if there is no room."""
        space, spec = self._space, sequence.spec
        # The last token is computed in any case: its logits are wanted.
        known = space.find(spec.token_ids[:-1], spec.prefix_salt)
        spare = math.ceil(space.memory.num_tokens * SPARE_SHARE) if self._begun() else 0
        if space.free_after(sequence.first_tokens, known) * PAGE_TOKENS < spare:
            return False
        sequence.kv = space.take(sequence.first_tokens, spec.prefix_salt, known)
        sequence.num_reused = sequence.num_cached = len(known) * PAGE_TOKENS
        self._num_prefix_asked += len(spec.token_ids)
        self._num_prefix_reused += sequence.num_reused
        return True

    def _release(self, sequence: EngineSequence) -> None:
        if sequence.kv is not None:
            self._space.release(sequence.kv, sequence.tokens[: sequence.num_cached])
            sequence.kv = None

    # --- KV memory ----------------------------------------------------------------------------------------------

    @property
    def _most_tokens(self) -> int:
        """Tokens that a sequence may have, generated ones included."""
        return min(self._limits.context_tokens, self._space.memory.num_tokens)

    def _begun(self) -> list[EngineSequence]:
        """Returns the sequences that have KV."""
        return [*self._running.values(), *(s for s in self._waiting.values() if s.kv is not None)]

    def _growth(self) -> int:
        """Returns the pages that decodes lack for the next step."""
        running = self._running.values()
        return sum(self._space.missing(s.kv, s.num_cached + 1) for s in running if s.kv is not None)

    def _pages_that_stay(self) -> set[int]:
        """Returns the pages of those that may not be let go."""
        return {page for s in self._begun() if s.kv is not None and s.loss is None for page in s.kv.pages}

    def _make_room(self, has_room: Callable[[], bool]) -> None:
        """Lets sequences go until there is room; their names are in the next step's output."""
        while not has_room():
            # Of equals the last to begin goes.
            losses = {s.spec.request_id: cost for s in reversed(self._begun()) if (cost := s.loss) is not None}
            request_id = min(losses, key=losses.__getitem__)
            self.cancel([request_id])
            self._preempted.append(request_id)

    # --- running ------------------------------------------------------------------------------------------------

    def _run(self, entries: Sequence[Entry], failures: list[SequenceFailure]) -> list[Row]:
        """Computes entries and notes their KV; returns those that get a token, with it.

        What fails is halved and tried again, so that memory suffices, or that only the sequence which is the cause is
        given up. Nothing is lost by a failed try: it wrote at most the same KV.
        """
        rows: list[Row] = []
        ran_out = False
        parts = [list(entries)]
        while parts:
            # Of one that was given up, there may be another half.
            part = [entry for entry in parts.pop() if entry.sequence.kv is not None]
            if not part:
                continue
            attempt = self._try(part)
            if isinstance(attempt, Trouble):
                ran_out = ran_out or attempt.is_out_of_memory
                halves = halve(part) if attempt.is_out_of_memory or len(part) > 1 else None
                if halves is None:
                    self._fail(part[0].sequence, attempt.message, failures, is_retryable=attempt.is_out_of_memory)
                else:
                    parts += reversed(halves)
                continue
            for entry in part:
                entry.sequence.num_cached += entry.num_tokens
            rows += attempt.rows
            for sequence, message in attempt.refused:
                self._fail(sequence, message, failures, is_retryable=False)
        self._pressure.note(ran_out=ran_out)
        return rows

    def _try(self, entries: Sequence[Entry]) -> Success | Trouble:
        """Returns the tokens of those entries that complete. What failed is left when this returns, with its tensors.

        Raises:
            torch.AcceleratorError: the device is not to be used any more.
        """
        try:
            logits = self._run_model(entries)
            if logits is None:
                return Success()
            return choose(logits, [entry.sequence for entry in entries if entry.completes], self._race)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            trouble = Trouble(is_out_of_memory(error), f"{type(error).__name__} while computing: {error}")
        if trouble.is_out_of_memory and self._device.type == "cuda":
            torch.cuda.empty_cache()
        return trouble

    def _run_model(self, entries: Sequence[Entry]) -> torch.Tensor | None:
        """One forward pass; returns logits [rows, vocabulary] in float32 for the entries that complete, or None."""
        tokens = PackedTokens()
        for entry in entries:
            sequence, start = entry.sequence, entry.sequence.num_cached
            pages = sequence.kv.pages if sequence.kv is not None else ()
            tokens.add(sequence.tokens[start : start + entry.num_tokens], start, pages, wants_logits=entry.completes)
        return self._forward(tokens)

    def _fail(
        self, sequence: EngineSequence, message: str, failures: list[SequenceFailure], *, is_retryable: bool
    ) -> None:
        """Gives a sequence up; nobody finds anything of its KV, which may be what is wrong, from now on."""
        if sequence.kv is not None:
            self._space.discard(sequence.kv)
            sequence.kv = None
        self.cancel([sequence.spec.request_id])
        failures.append(
            SequenceFailure(request_id=sequence.spec.request_id, message=message, is_retryable=is_retryable)
        )

    # --- choosing -----------------------------------------------------------------------------------------------

    def _begin_decoding(self, sequence: EngineSequence) -> bool:
        """Returns whether the sequence's prompt is complete as of this step; then others may find its KV."""
        request_id = sequence.spec.request_id
        if request_id not in self._waiting:
            return False
        self._running[request_id] = self._waiting.pop(request_id)
        if sequence.kv is not None:
            self._space.publish(sequence.kv, sequence.spec.token_ids)
        return True

    def _take(self, row: Row) -> TokenOutput:
        sequence, token_id, logprobs = row.sequence, row.token_id, row.logprobs
        spec = sequence.spec
        if token_id in spec.stop_token_ids:
            self.cancel([spec.request_id])
            return TokenOutput(
                request_id=spec.request_id,
                token_id=None,
                finish_reason=FinishReason.STOP,
                matched_stop_token_id=token_id,
                cached_prompt_tokens=sequence.num_reused,
            )
        sequence.tokens.append(token_id)
        sequence.num_generated += 1
        if sequence.num_generated == 1:
            sequence.first_token_s = time.perf_counter()
        reason = FinishReason.LENGTH if sequence.num_generated >= spec.max_new_tokens else None
        if sequence.matcher is not None:
            sequence.matcher.take(token_id)
            if sequence.matcher.is_complete:
                reason = FinishReason.STOP
        if reason is not None:
            self.cancel([spec.request_id])
        return TokenOutput(
            request_id=spec.request_id,
            token_id=token_id,
            logprobs=logprobs,
            finish_reason=reason,
            cached_prompt_tokens=sequence.num_reused,
        )
