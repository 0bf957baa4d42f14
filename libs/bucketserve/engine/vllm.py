"""vLLM behind ports.Engine: it computes and keeps KV; who begins, who goes and what a step holds is decided here.

add -> waiting --(KV of its prompt)--> begun: with vLLM --(stop, length)--> gone
                                         |
                                         +--(KV runs out: aborted)--> let go

vLLM is driven in the engine's thread (its in-process client). It gets a sequence only when there is KV for its prompt,
and before each step those that grow are given room by letting others go, by the rule of all engines
(core/preemption.py). So vLLM itself has no reason to preempt. Where blocks are not what its own estimate says (a hybrid
model's), it may all the same: then the sequence pauses inside vLLM and is computed again there; nobody is told.

With a KV connector of vLLM's KV is handed over by handles (vllm_handover.py), without one never (EngineInfo.kv_layout
is empty). An exception out of vLLM's step ends the worker: its memory and its device are in no known state.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from bucketserve.core.errors import EngineError, ModelLoadError, NoAdapterError
from bucketserve.core.pace import StepPace
from bucketserve.core.preemption import SPARE_SHARE
from bucketserve.core.stepping import CPU_STEP_TOKENS, cpu_step_tokens, plan_prefill
from bucketserve.core.types import FinishReason, Headroom, RequestId
from bucketserve.engine.adapter_files import check_adapter
from bucketserve.engine.device_memory import DeviceMemory
from bucketserve.engine.model_source import first_line
from bucketserve.engine.vllm_blocks import KvBlocks
from bucketserve.engine.vllm_handover import TO_HAND_OVER, Handle
from bucketserve.engine.vllm_inside import DoneStep, FirstToken, StepOrder, clear_blocks
from bucketserve.engine.vllm_sequences import VllmSequence, token_logprobs, vllm_prompt, vllm_sampling
from bucketserve.ports import (
    UNKNOWN_TOKEN,
    Adapter,
    EngineInfo,
    Sampling,
    SequenceFailure,
    SequenceSpec,
    StepOutput,
    TokenOutput,
)

__all__ = ["VllmEngine", "VllmLimits"]

NO_HANDOVER = "vLLM was given no KV connector (kv_transfer_config): its workers have the role both"
NO_GRAMMARS = "vLLM is given no grammars: its output can't be constrained here"
NO_BYTES = "vLLM hands KV over by a connector of its own, not as bytes"
OTHER_KV = "the KV that came is not this prompt's: its first token has another probability by it"
TOLERANCE, COARSE = {"float32": 0.01}, 0.5
"""How far log-probabilities of a token may differ by KV that is the same, by number type; in others COARSE."""
FETCH_S = 30.0
"""What KV has for its way: a connector may go on waiting for a peer that is gone, for as long as it likes."""
LATE_KV = f"its KV has not come in {FETCH_S:.0f} s"
IDLE_S = 0.001
"""Between two steps while vLLM only waits for KV to come or to be fetched, as its own loop does."""
NOT_FINITE = "the model's output is not finite (NaN in its logits): no token can be chosen"


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmLimits:
    """Sizes of an engine."""

    max_sequences: int
    max_step_tokens: int
    vocabulary: int
    weights_bytes: int = 0


@dataclass(slots=True)
class _Brought:
    """What a step brought, as it is put together."""

    tokens: list[TokenOutput] = field(default_factory=list)
    prefilled: list[RequestId] = field(default_factory=list)
    failures: list[SequenceFailure] = field(default_factory=list)

    def fail(self, request_id: RequestId, message: str, *, is_retryable: bool = False) -> None:
        self.failures.append(SequenceFailure(request_id=request_id, message=message, is_retryable=is_retryable))


class VllmEngine:
    """See ports.Engine. Built by engine.vllm_loader; owned by one thread."""

    def __init__(
        self, vllm: Any, info: EngineInfo, limits: VllmLimits, device_memory: Callable[[], DeviceMemory]
    ) -> None:
        """Takes an LLMEngine in this process, whose scheduler is one of engine.vllm_inside's."""
        self._vllm = vllm
        self._scheduler = vllm.engine_core.engine_core.scheduler
        self._kv = KvBlocks(self._scheduler, vllm.vllm_config.cache_config)
        self._info = info
        self._limits = limits
        self._device_memory = device_memory
        self._pace = StepPace()
        self._waiting: dict[RequestId, VllmSequence] = {}
        self._begun: dict[RequestId, VllmSequence] = {}
        self._adapters: dict[str, LoRARequest] = {}
        """By fingerprint, by which vLLM calls them as well."""
        self._num_loaded = 0
        """Adapters so far: vLLM wants numbers for them."""
        self._handles: dict[RequestId, bytes] = {}
        """Of what is to be handed over; until then."""
        self._source = secrets.token_hex(16)
        self._preempted: list[RequestId] = []
        """Let go since the last step."""
        self._num_decode_steps = 0
        self._num_prefix_asked = self._num_prefix_reused = 0

    def warm_up(self, *, is_step_measured: bool) -> None:
        """Runs a request of each kind, so that no client's first one waits for what is compiled then.

        is_step_measured: whether steps hold as much as takes about as long as a step on a CPU should.
        """
        for i, sampling in enumerate((Sampling(), Sampling(temperature=1.0, top_p=0.9))):
            self._run(
                SequenceSpec(
                    request_id=RequestId(f"{i}"), token_ids=(0, 0), max_new_tokens=2, sampling=sampling, num_logprobs=1
                )
            )
        if is_step_measured:
            number = max(min(CPU_STEP_TOKENS, self._most_tokens - 1), 1)
            for i in range(2):
                # Another prompt: its KV is not there yet.
                start_s = time.perf_counter()
                self._run(SequenceSpec(request_id=RequestId(f"{i}"), token_ids=(i,) * number, max_new_tokens=1))
            token_s = (time.perf_counter() - start_s) / number
            most = min(cpu_step_tokens(token_s), self._limits.max_step_tokens)
            self._limits = replace(self._limits, max_step_tokens=most)
            self._info = replace(self._info, step_tokens=most)
        self._num_decode_steps = self._num_prefix_asked = self._num_prefix_reused = 0

    def _run(self, spec: SequenceSpec) -> None:
        self.add([spec])
        while self.has_work():
            self.step()

    @property
    def info(self) -> EngineInfo:
        """See ports.Engine."""
        return self._info

    def headroom(self) -> Headroom:
        """See ports.Engine."""
        waiting = [s for s in (*self._waiting.values(), *self._begun.values()) if not s.is_prefilled]
        to_come = self._outstanding(self._begun.values()) + sum(
            self._kv.missing("", s.kv_tokens) for s in self._waiting.values()
        )
        device = self._device_memory()
        return Headroom(
            kv_total_tokens=self._kv.total_tokens,
            kv_free_tokens=max(self._kv.tokens_of(self._kv.num_free - to_come), 0),
            max_sequences=self._limits.max_sequences,
            num_decode_steps=self._num_decode_steps,
            num_running=len(self._waiting) + len(self._begun) - len(waiting),
            num_waiting=len(waiting),
            waiting_prefill_tokens=sum(s.remaining for s in waiting),
            kv_bytes_per_token=self._info.kv_bytes_per_token,
            device_total_bytes=device.total,
            device_reserved_bytes=device.reserved,
            device_free_bytes=device.free,
            weights_bytes=self._limits.weights_bytes,
            num_prefix_asked_tokens=self._num_prefix_asked,
            num_prefix_reused_tokens=self._num_prefix_reused,
        )

    def add(self, sequences: Sequence[SequenceSpec], max_chunk_tokens: int = 0) -> None:
        """See ports.Engine."""
        seen = {*self._waiting, *self._begun, *self._handles}
        for spec in sequences:
            if spec.hands_over and not self._info.kv_layout:
                raise EngineError(NO_HANDOVER)
            spec.check(self._most_tokens)
            if spec.request_id in seen:
                raise EngineError(f"sequence {spec.request_id} is already here")
            self._check_served(spec)
            seen.add(spec.request_id)
        for spec in sequences:
            self._waiting[spec.request_id] = VllmSequence(spec, max_chunk_tokens)

    def hand_over(self, request_id: RequestId) -> bytes | None:
        """See ports.Engine. Who fetches the KV ends it here, or else the connector's lease (NIXL's: 30 s)."""
        try:
            return self._handles.pop(request_id)
        except KeyError:
            raise EngineError(f"sequence {request_id} is not here to be handed over") from None

    def take_over(self, spec: SequenceSpec, generated: Sequence[int], handle: bytes) -> None:
        """See ports.Engine. KV that the connector does not find is computed here."""
        if not self._info.kv_layout:
            raise EngineError(NO_HANDOVER)
        if spec.request_id in (*self._waiting, *self._begun, *self._handles):
            raise EngineError(f"sequence {spec.request_id} is already here")
        self._check_served(spec)
        found = Handle.for_sequence(handle, spec)
        if len(generated) != 1:
            raise EngineError("KV comes with one token")
        if not spec.is_known(self._limits.vocabulary, generated):
            raise EngineError(UNKNOWN_TOKEN)
        sequence = VllmSequence(spec, 0, is_prefilled=True, num_generated=1, first_token_s=time.perf_counter())
        sequence.expected = FirstToken(generated[0], found.logprob, TOLERANCE.get(self._info.dtype, COARSE))
        needed = self._kv.missing("", max(sequence.kv_tokens, len(spec.token_ids) + 1))
        may_go = {s.request.request_id for s in self._begun.values() if s.loss is not None}
        # Of those that have gone as well: vLLM has them until their KV has been fetched, or has stopped coming.
        taken = self._kv.taken(name for name in self._scheduler.requests if name not in may_go)
        to_come = self._outstanding(s for s in self._begun.values() if s.loss is None)
        if spec.reserved_tokens > self._most_tokens or needed + taken + to_come > self._kv.total:
            raise EngineError(f"no room for {spec.reserved_tokens} tokens whose KV has come")
        # Those that run may have grown since it was sent for.
        self._make_room(needed)
        # From itself vLLM fetches nothing: what it still has it finds by the prompt.
        self._start(sequence, None if found.source == self._source else found.params)

    def export_kv(self, request_id: RequestId, into: memoryview) -> None:
        """Always refused.

        Raises:
            EngineError: this engine hands over by handles.
        """
        raise EngineError(NO_BYTES if self._info.kv_layout else NO_HANDOVER)

    def known_pages(self, token_ids: Sequence[int], salt: bytes) -> int:
        """See ports.Engine: none can be left out."""
        return 0

    def import_kv(self, spec: SequenceSpec, generated: Sequence[int], kv: memoryview) -> None:
        """Always refused.

        Raises:
            EngineError: this engine takes handles.
        """
        raise EngineError(NO_BYTES if self._info.kv_layout else NO_HANDOVER)

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """See ports.Engine."""
        begun = [name for name in dict.fromkeys(request_ids) if self._begun.pop(name, None) is not None]
        if begun:
            self._vllm.abort_request(begun)
        for name in request_ids:
            self._waiting.pop(name, None)
            self._handles.pop(name, None)

    def load_adapter(self, adapter: Adapter) -> None:
        """See ports.Engine."""
        if adapter.fingerprint in self._adapters:
            return
        if len(self._adapters) >= self._info.max_adapters:
            # One more would take another one's place, and vLLM would load it again when it is wanted.
            raise EngineError(f"there are {len(self._adapters)} adapters here, and max_adapters is no more")
        try:
            # vLLM would take a smaller one, and leave the rest of its memory as another one left it.
            check_adapter(adapter.directory, Path(self._vllm.vllm_config.model_config.model))
        except ModelLoadError as error:
            raise EngineError(f"vLLM can't serve it: {error}") from error
        # Numbers are not used twice: of one that fails half of it may be there.
        self._num_loaded += 1
        request = LoRARequest(adapter.fingerprint, self._num_loaded, str(adapter.directory))
        try:
            self._vllm.add_lora(request)
        except Exception as error:  # whatever vLLM makes of files that it did not write
            # What it was registered as before it failed would push out one that is served.
            with contextlib.suppress(Exception):
                self._vllm.remove_lora(request.lora_int_id)
            raise EngineError(f"vLLM can't serve it: {first_line(error)}") from error
        self._adapters[adapter.fingerprint] = request

    def unload_adapter(self, fingerprint: str) -> bool:
        """See ports.Engine."""
        if any(s.spec.adapter == fingerprint for s in (*self._waiting.values(), *self._begun.values())):
            return False
        if request := self._adapters.get(fingerprint):
            try:
                self._vllm.remove_lora(request.lora_int_id)
            except Exception as error:  # whatever vLLM comes upon: it is not computing
                raise EngineError(f"vLLM can't unload it: {first_line(error)}") from error
            del self._adapters[fingerprint]
        return True

    def has_work(self) -> bool:
        """See ports.Engine."""
        return bool(self._waiting or self._begun or self._preempted or self._transfers)

    def close(self) -> None:
        """See ports.Engine."""
        self.cancel([*self._waiting, *self._begun])
        self._vllm.engine_core.shutdown()
        del self._vllm, self._scheduler, self._kv

    def step(self) -> StepOutput:
        """See ports.Engine. With steps that overlap, what it returns may be of the step before, or nothing yet."""
        brought = _Brought()
        self._make_room()
        preempted, self._preempted = tuple(self._preempted), []
        self._give_up_late_kv(brought)
        self._begin(brought)
        if not self._begun and not self._transfers:
            return StepOutput(preempted=preempted, failures=tuple(brought.failures))
        self._scheduler.order = self._compose()
        outputs = self._vllm.step()
        done, self._scheduler.done = self._scheduler.done, []
        if not done and not outputs and self._info.kv_layout:
            time.sleep(IDLE_S)
        for step in done:
            self._fail_not_finite(step, brought)
        for output in outputs:
            self._take(output, brought)
        # One, but for pipelines, in which several may be under way.
        sample = done[-1].sample if done else None
        if sample is not None:
            self._pace.learn(sample)
            self._num_decode_steps += sample.decode_sequences > 0
        return StepOutput(
            tokens=tuple(brought.tokens),
            prefilled=tuple(brought.prefilled),
            failures=tuple(brought.failures),
            preempted=preempted,
            sample=sample,
        )

    @property
    def _most_tokens(self) -> int:
        """Tokens that a sequence may have, generated ones included."""
        return min(self._info.context_tokens, self._kv.total_tokens)

    @property
    def _transfers(self) -> bool:
        """Whether vLLM has to step for the sake of KV alone: it is being fetched from here, or for what has gone."""
        return bool(self._info.kv_layout) and bool(self._scheduler.has_finished_requests())

    def _check_served(self, spec: SequenceSpec) -> None:
        if spec.structured_output is not None:
            raise EngineError(NO_GRAMMARS)
        if spec.adapter and spec.adapter not in self._adapters:
            raise NoAdapterError("the adapter is not here any more")

    # --- KV memory ----------------------------------------------------------------------------------------------

    def _outstanding(self, begun: Iterable[VllmSequence]) -> int:
        """Returns the blocks that these, which have begun, are to have by the next step, and do not have yet."""
        return sum(self._kv.missing(s.request.request_id, s.kv_tokens, s.num_computed) for s in begun)

    def _make_room(self, num_blocks: int = 0) -> None:
        """Lets sequences go until there is room for the others' next tokens, and for so many blocks more."""
        while self._outstanding(self._begun.values()) + num_blocks > self._kv.num_free:
            # Of equals the last to begin goes.
            losses = {name: cost for name, s in reversed(self._begun.items()) if (cost := s.loss) is not None}
            if not losses:
                return
            request_id = min(losses, key=losses.__getitem__)
            self.cancel([request_id])
            self._preempted.append(request_id)

    def _begin(self, brought: _Brought) -> None:
        """Gives vLLM those that wait, in order, while there are places and KV for their prompts."""
        if not self._waiting:
            return
        free = self._kv.num_free - self._outstanding(self._begun.values())
        for name, sequence in list(self._waiting.items()):
            if len(self._begun) >= self._limits.max_sequences:
                return
            free -= self._kv.missing("", sequence.kv_tokens)
            spare = math.ceil(self._kv.total_tokens * SPARE_SHARE) if self._begun else 0
            if self._kv.tokens_of(free) < spare:
                return
            del self._waiting[name]
            if not sequence.spec.is_known(self._limits.vocabulary):
                brought.fail(name, UNKNOWN_TOKEN)
                continue
            try:
                self._start(sequence, TO_HAND_OVER if sequence.hands_over else None)
            except EngineError as error:
                brought.fail(name, str(error))

    def _start(self, sequence: VllmSequence, transfer: Mapping[str, Any] | None) -> None:
        """Gives a sequence to vLLM.

        Raises:
            EngineError: vLLM refuses it.
        """
        spec = sequence.spec
        try:
            internal = self._vllm.add_request(
                spec.request_id,
                vllm_prompt(spec),
                vllm_sampling(sequence, transfer),
                lora_request=self._adapters.get(spec.adapter),
            )
        except (ValueError, TypeError, VLLMValidationError) as error:
            raise EngineError(f"vLLM refuses it: {error}") from error
        sequence.request = self._scheduler.requests[internal]
        self._begun[spec.request_id] = sequence

    # --- a step -------------------------------------------------------------------------------------------------

    def _compose(self) -> StepOrder:
        """Returns what the next step is to hold: every decoding sequence, then prompt pieces as in any worker."""
        here = [s for s in self._begun.values() if not self._scheduler.is_fetching(s.request)]
        # How much of its KV there is to fetch the connector says in the step: until then it is a token to compute.
        asking = {s.request.request_id: 1 for s in here if s.expected is not None and not s.num_computed}
        here = [s for s in here if s.request.request_id not in asking]
        decoding = [s for s in here if s.decodes]
        ready = [s for s in here if not s.decodes]
        if not ready:
            return StepOrder(max(len(decoding) + len(asking), 1), asking)
        limits = [*(s.max_chunk_tokens for s in ready), self._paced_tokens(decoding, ready)]
        planned = plan_prefill(
            ((s.spec.request_id, s.remaining) for s in ready),
            num_decoding=len(decoding),
            max_step_tokens=self._limits.max_step_tokens - len(asking),
            max_chunk_tokens=min((limit for limit in limits if limit), default=0),
        )
        pieces = asking | {s.request.request_id: 0 for s in ready}
        pieces |= {self._begun[piece.request_id].request.request_id: piece.num_tokens for piece in planned}
        return StepOrder(len(decoding) + sum(pieces.values()), pieces)

    def _paced_tokens(self, decoding: Sequence[VllmSequence], ready: Sequence[VllmSequence]) -> int:
        """Returns the most prompt tokens beside which those that decode keep their TPOT; 0 for no limit."""
        return self._pace.prompt_tokens(
            (pace for s in decoding if (pace := s.pace)),
            num_decoding=len(decoding),
            context_tokens=sum(s.num_computed + 1 for s in decoding),
            prompt_end=max(s.num_computed + min(s.remaining, self._limits.max_step_tokens) for s in ready),
            now_s=time.perf_counter(),
        )

    def _give_up_late_kv(self, brought: _Brought) -> None:
        """Fails those whose KV is still on its way; a new attempt computes it."""
        since_s = time.perf_counter() - FETCH_S
        for name in [name for name, s in self._begun.items() if s.expected is not None and s.first_token_s < since_s]:
            self.cancel([name])
            brought.fail(name, LATE_KV, is_retryable=True)

    def _fail_not_finite(self, done: DoneStep, brought: _Brought) -> None:
        """Gives up those whose logits allow no choice, and clears their KV."""
        for name, sequence in list(self._begun.items()):
            if sequence.request.request_id in done.not_finite:
                self.cancel([name])
                # What has come may be of another prompt, or none at all.
                brought.fail(name, NOT_FINITE, is_retryable=sequence.expected is not None)
        if done.tainted:
            self._vllm.collective_rpc(clear_blocks, args=(done.tainted,))

    def _take(self, output: Any, brought: _Brought) -> None:
        """Takes what vLLM says of a sequence."""
        name = RequestId(output.request_id)
        sequence = self._begun.get(name)
        if sequence is None:
            return
        (completion,) = output.outputs
        tokens, logprobs = list(completion.token_ids), list(completion.logprobs or ())
        if tokens and sequence.expected is not None:
            # It has been delivered: here it only shows whether the KV is the prompt's.
            first, sequence.expected = sequence.expected, None
            if tokens.pop(0) != first.token_id:
                # It may have NaNs, and they need not show in what it was used for.
                blocks = self._scheduler.blocks_of(frozenset({sequence.request.request_id}))
                self.cancel([name])
                self._vllm.collective_rpc(clear_blocks, args=(blocks,))
                brought.fail(name, OTHER_KV, is_retryable=True)
                return
            logprobs = logprobs[1:]
        if tokens and not sequence.is_prefilled:
            self._first(sequence, output.num_cached_tokens or 0)
            brought.prefilled.append(name)
        reason = completion.finish_reason
        if reason == "stop":
            # The stop token, which is the last one, is no part of the output.
            tokens.pop()
        number, ends = sequence.spec.num_logprobs, reason == "length" and not sequence.hands_over
        for i, token_id in enumerate(tokens):
            sequence.num_generated += 1
            is_last = ends and i == len(tokens) - 1
            brought.tokens.append(
                TokenOutput(
                    request_id=name,
                    token_id=token_id,
                    logprobs=None if number is None else token_logprobs(token_id, logprobs[i], number),
                    finish_reason=FinishReason.LENGTH if is_last else None,
                    cached_prompt_tokens=sequence.num_reused,
                )
            )
        if not output.finished:
            return
        del self._begun[name]
        if reason == "length" and sequence.hands_over:
            params, logprob = output.kv_transfer_params, logprobs[0][tokens[0]].logprob
            handle = Handle.of(sequence.spec, source=self._source, logprob=logprob, params=params)
            self._handles[name] = handle.to_bytes()
        elif reason == "stop":
            brought.tokens.append(
                TokenOutput(
                    request_id=name,
                    token_id=None,
                    finish_reason=FinishReason.STOP,
                    matched_stop_token_id=completion.stop_reason,
                    cached_prompt_tokens=sequence.num_reused,
                )
            )
        elif reason != "length":
            brought.fail(name, f"vLLM gave it up ({reason})", is_retryable=True)

    def _first(self, sequence: VllmSequence, num_reused: int) -> None:
        """Notes that a sequence's prompt is computed."""
        sequence.is_prefilled = True
        sequence.first_token_s = time.perf_counter()
        sequence.num_reused = num_reused
        self._num_prefix_asked += len(sequence.spec.token_ids)
        self._num_prefix_reused += num_reused
