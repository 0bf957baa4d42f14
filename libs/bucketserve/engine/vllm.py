"""vLLM behind ports.Engine: it computes and keeps KV; who begins, who goes and what a step holds is decided here.

add -> waiting --(KV of its prompt)--> begun: with vLLM --(stop, length)--> gone
                                         |
                                         +--(KV runs out: aborted)--> let go

vLLM is driven in the engine's thread (its in-process client). It gets a sequence only when there is KV for its prompt,
and before each step those that grow are given room by letting others go, by the rule of all engines
(core/preemption.py). So vLLM itself has no reason to preempt. Where blocks are not what its own estimate says (a hybrid
model's), it may all the same: then the sequence pauses inside vLLM and is computed again there; nobody is told.

KV is never handed over (EngineInfo.kv_layout is empty). An exception out of vLLM's step ends the worker: its memory and
its device are in no known state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams

from bucketserve.core.errors import EngineError, NoAdapterError
from bucketserve.core.pace import StepPace
from bucketserve.core.preemption import SPARE_SHARE, loss
from bucketserve.core.stepping import plan_prefill
from bucketserve.core.types import MAX_PREEMPTIONS, FinishReason, Headroom, RequestId
from bucketserve.engine.device_memory import DeviceMemory
from bucketserve.engine.model_source import first_line
from bucketserve.engine.vllm_inside import POSITION, SAMPLING, DoneStep, StepOrder, clear_blocks
from bucketserve.ports import (
    Adapter,
    EngineInfo,
    Logprob,
    Sampling,
    SequenceFailure,
    SequenceSpec,
    StepOutput,
    TokenLogprobs,
    TokenOutput,
)

__all__ = ["VllmEngine", "VllmLimits"]

NO_HANDOVER = "the vllm engine hands no KV over and takes none: its workers have the role both"
NO_TOKEN = "the prompt has a token that is not in the model's vocabulary"
NOT_FINITE = "the model's output is not finite (NaN in its logits): no token can be chosen"


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmLimits:
    """Sizes of an engine."""

    max_sequences: int
    max_step_tokens: int
    vocab_size: int
    weights_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Sequence:
    spec: SequenceSpec
    max_chunk_tokens: int
    request: Any = None
    """vLLM's, once it has begun."""
    is_prefilled: bool = False
    num_generated: int = 0
    num_reused: int = 0
    first_token_s: float = 0.0

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is in memory, or will be after the step that is under way."""
        return self.request.num_computed_tokens if self.request is not None else 0

    @property
    def remaining(self) -> int:
        """Tokens to compute before its next one."""
        if self.request is None:
            return len(self.spec.token_ids)
        return max(int(self.request.num_tokens) - self.num_computed, 0)

    @property
    def decodes(self) -> bool:
        """Whether a step gives it one token; else it has prompt to compute, or its own output once more."""
        return self.is_prefilled and self.remaining <= 1

    @property
    def kv_tokens(self) -> int:
        """Tokens for which it has KV, or is to have it by the next step."""
        if self.spec.num_preemptions >= MAX_PREEMPTIONS:
            return self.spec.reserved_tokens
        return len(self.spec.token_ids) if self.request is None else max(self.request.num_tokens, self.num_computed + 1)

    @property
    def loss(self) -> tuple[bool, int, int] | None:
        """What letting it go costs (core/preemption.py); None if it may not be let go."""
        spec = self.spec
        return loss(is_batch=spec.is_batch, num_preemptions=spec.num_preemptions, num_tokens=self.num_computed)

    @property
    def pace(self) -> tuple[float, float, int] | None:
        """What StepPace has to know of it while it decodes; None if no TPOT was promised."""
        tpot_s = self.spec.tpot_slo_s
        return None if tpot_s is None else (tpot_s, self.first_token_s, self.num_generated)


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
        self._waiting: dict[RequestId, _Sequence] = {}
        self._begun: dict[RequestId, _Sequence] = {}
        self._adapters: dict[str, LoRARequest] = {}
        """By fingerprint, by which vLLM calls them as well."""
        self._num_loaded = 0
        """Adapters so far: vLLM wants numbers for them."""
        self._preempted: list[RequestId] = []
        """Let go since the last step."""
        self._num_decode_steps = 0
        self._num_prefix_asked = self._num_prefix_reused = 0

    def warm_up(self) -> None:
        """Runs a request of each kind, so that no client's first one waits for what is compiled then."""
        for i, sampling in enumerate((Sampling(), Sampling(temperature=1.0, top_p=0.9))):
            name = RequestId(f"warm up {i}")
            spec = SequenceSpec(request_id=name, token_ids=(0,), max_new_tokens=2, sampling=sampling, num_logprobs=1)
            self.add([spec])
        while self.has_work():
            self.step()
        self._num_decode_steps = self._num_prefix_asked = 0

    @property
    def info(self) -> EngineInfo:
        """See ports.Engine."""
        return self._info

    def headroom(self) -> Headroom:
        """See ports.Engine."""
        waiting = [s for s in (*self._waiting.values(), *self._begun.values()) if not s.is_prefilled]
        to_come = self._outstanding() + sum(self._kv.missing("", s.kv_tokens) for s in self._waiting.values())
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
        seen, most = {*self._waiting, *self._begun}, min(self._info.context_tokens, self._kv.total_tokens)
        for spec in sequences:
            if spec.hands_over:
                raise EngineError(NO_HANDOVER)
            if spec.reserved_tokens > most:
                raise EngineError(f"{spec.reserved_tokens} tokens can never fit: the context is {most} tokens here")
            if spec.request_id in seen:
                raise EngineError(f"sequence {spec.request_id} is already here")
            if spec.adapter and spec.adapter not in self._adapters:
                raise NoAdapterError("the adapter is not here any more")
            seen.add(spec.request_id)
        for spec in sequences:
            self._waiting[spec.request_id] = _Sequence(spec, max_chunk_tokens)

    def export_kv(self, request_id: RequestId, into: memoryview) -> None:
        """Always refused.

        Raises:
            EngineError: this engine hands no KV over.
        """
        raise EngineError(NO_HANDOVER)

    def known_pages(self, token_ids: Sequence[int], salt: bytes) -> int:
        """See ports.Engine: none can be left out."""
        return 0

    def import_kv(self, spec: SequenceSpec, generated: Sequence[int], kv: memoryview) -> None:
        """Always refused.

        Raises:
            EngineError: this engine takes no KV.
        """
        raise EngineError(NO_HANDOVER)

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """See ports.Engine."""
        begun = [name for name in dict.fromkeys(request_ids) if self._begun.pop(name, None) is not None]
        if begun:
            self._vllm.abort_request(begun)
        for name in request_ids:
            self._waiting.pop(name, None)

    def load_adapter(self, adapter: Adapter) -> None:
        """See ports.Engine."""
        if adapter.fingerprint in self._adapters:
            return
        if len(self._adapters) >= self._info.max_adapters:
            # One more would take another one's place, and vLLM would load it again when it is wanted.
            raise EngineError(f"there are {len(self._adapters)} adapters here, and max_adapters is no more")
        # Numbers are not used twice: of one that fails half of it may be there.
        self._num_loaded += 1
        request = LoRARequest(adapter.fingerprint, self._num_loaded, str(adapter.directory))
        try:
            self._vllm.add_lora(request)
        except Exception as error:  # whatever vLLM makes of files that it did not write
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
        return bool(self._waiting or self._begun or self._preempted)

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
        self._begin(brought)
        if not self._begun:
            return StepOutput(preempted=preempted, failures=tuple(brought.failures))
        self._scheduler.order = self._compose()
        outputs = self._vllm.step()
        done, self._scheduler.done = self._scheduler.done, []
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

    # --- KV memory ----------------------------------------------------------------------------------------------

    def _outstanding(self) -> int:
        """Returns the blocks that those which have begun are to have by the next step, and do not have yet."""
        return sum(self._kv.missing(s.request.request_id, s.kv_tokens, s.num_computed) for s in self._begun.values())

    def _make_room(self) -> None:
        """Lets sequences go until there is room for the others' next tokens."""
        while self._outstanding() > self._kv.num_free:
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
        free = self._kv.num_free - self._outstanding()
        for name, sequence in list(self._waiting.items()):
            if len(self._begun) >= self._limits.max_sequences:
                return
            free -= self._kv.missing("", sequence.kv_tokens)
            spare = math.ceil(self._kv.total_tokens * SPARE_SHARE) if self._begun else 0
            if self._kv.tokens_of(free) < spare:
                return
            del self._waiting[name]
            tokens = sequence.spec.token_ids
            # vLLM would look up a row that its embedding does not have, for all sequences of the step.
            if not all(0 <= token_id < self._limits.vocab_size for token_id in tokens):
                brought.fail(name, NO_TOKEN)
                continue
            try:
                internal = self._vllm.add_request(
                    name,
                    _prompt(sequence.spec),
                    _sampling(sequence.spec),
                    lora_request=self._adapters.get(sequence.spec.adapter),
                )
            except (ValueError, TypeError, VLLMValidationError) as error:
                brought.fail(name, f"vLLM refuses it: {error}")
                continue
            sequence.request = self._scheduler.requests[internal]
            self._begun[name] = sequence

    # --- a step -------------------------------------------------------------------------------------------------

    def _compose(self) -> StepOrder:
        """Returns what the next step is to hold: every decoding sequence, then prompt pieces as in any worker."""
        decoding = [s for s in self._begun.values() if s.decodes]
        ready = [s for s in self._begun.values() if not s.decodes]
        if not ready:
            return StepOrder(max(len(decoding), 1), {})
        limits = [*(s.max_chunk_tokens for s in ready), self._paced_tokens(decoding, ready)]
        planned = plan_prefill(
            ((s.spec.request_id, s.remaining) for s in ready),
            num_decoding=len(decoding),
            max_step_tokens=self._limits.max_step_tokens,
            max_chunk_tokens=min((limit for limit in limits if limit), default=0),
        )
        pieces = {s.request.request_id: 0 for s in ready}
        pieces |= {self._begun[piece.request_id].request.request_id: piece.num_tokens for piece in planned}
        return StepOrder(len(decoding) + sum(pieces.values()), pieces)

    def _paced_tokens(self, decoding: Sequence[_Sequence], ready: Sequence[_Sequence]) -> int:
        """Returns the most prompt tokens beside which those that decode keep their TPOT; 0 for no limit."""
        return self._pace.prompt_tokens(
            (pace for s in decoding if (pace := s.pace)),
            num_decoding=len(decoding),
            context_tokens=sum(s.num_computed + 1 for s in decoding),
            prompt_end=max(s.num_computed + min(s.remaining, self._limits.max_step_tokens) for s in ready),
            now_s=time.perf_counter(),
        )

    def _fail_not_finite(self, done: DoneStep, brought: _Brought) -> None:
        """Gives up those whose logits allow no choice, and clears their KV."""
        for name in [name for name, s in self._begun.items() if s.request.request_id in done.not_finite]:
            self.cancel([name])
            brought.fail(name, NOT_FINITE)
        if done.tainted:
            self._vllm.collective_rpc(clear_blocks, args=(done.tainted,))

    def _take(self, output: Any, brought: _Brought) -> None:
        """Takes what vLLM says of a sequence."""
        name = RequestId(output.request_id)
        sequence = self._begun.get(name)
        if sequence is None:
            return
        (completion,) = output.outputs
        tokens = list(completion.token_ids)
        if tokens and not sequence.is_prefilled:
            self._first(sequence, output.num_cached_tokens or 0)
            brought.prefilled.append(name)
        reason = completion.finish_reason
        if reason == "stop":
            # The stop token, which is the last one, is no part of the output.
            tokens.pop()
        logprobs = list(completion.logprobs or ())
        for i, token_id in enumerate(tokens):
            sequence.num_generated += 1
            is_last = reason == "length" and i == len(tokens) - 1
            brought.tokens.append(
                TokenOutput(
                    request_id=name,
                    token_id=token_id,
                    logprobs=_logprobs(token_id, logprobs[i], sequence.spec.num_logprobs) if logprobs else None,
                    finish_reason=FinishReason.LENGTH if is_last else None,
                    cached_prompt_tokens=sequence.num_reused,
                )
            )
        if not output.finished:
            return
        del self._begun[name]
        if reason == "stop":
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

    def _first(self, sequence: _Sequence, num_reused: int) -> None:
        """Notes that a sequence's prompt is computed."""
        sequence.is_prefilled = True
        sequence.first_token_s = time.perf_counter()
        sequence.num_reused = num_reused
        self._num_prefix_asked += len(sequence.spec.token_ids)
        self._num_prefix_reused += num_reused


class KvBlocks:
    """vLLM's KV memory, counted in its blocks; one of them it never gives to anybody."""

    def __init__(self, scheduler: Any, cache: Any) -> None:
        """Takes the scheduler and the cache's configuration of an engine that is loaded."""
        self._manager = scheduler.kv_cache_manager
        self._pool = self._manager.block_pool
        self._total = int(cache.num_gpu_blocks) - 1
        groups = scheduler.kv_cache_config.kv_cache_groups
        if len(groups) == 1:
            self.total_tokens = self._total * int(groups[0].kv_cache_spec.block_size)
        else:
            # Layers of several kinds: how many tokens fit depends on their lengths; vLLM's figure is for long ones.
            self.total_tokens = int(cache.kv_cache_size_tokens) * self._total // (self._total + 1)

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses; what they hold may be kept for reuse."""
        return int(self._pool.get_num_free_blocks())

    def tokens_of(self, num_blocks: int) -> int:
        """Returns the tokens for which blocks suffice."""
        return num_blocks * self.total_tokens // self._total

    def missing(self, internal_id: str, num_tokens: int, num_computed: int = 0) -> int:
        """Returns the blocks that a request lacks to have KV for so many tokens; of nobody's id: all of them."""
        return int(
            self._manager.coordinator.get_num_blocks_to_allocate(
                request_id=internal_id,
                num_tokens=num_tokens,
                new_computed_blocks=self._manager.empty_kv_cache_blocks.blocks,
                num_encoder_tokens=0,
                total_computed_tokens=num_computed,
                num_local_computed_tokens=num_computed,
                num_tokens_main_model=num_tokens,
                apply_admission_cap=True,
            )
        )


def _prompt(spec: SequenceSpec) -> Mapping[str, Any]:
    prompt: dict[str, Any] = {"prompt_token_ids": list(spec.token_ids)}
    if spec.prefix_salt:
        prompt["cache_salt"] = spec.prefix_salt.hex()
    return prompt


def _sampling(spec: SequenceSpec) -> Any:
    return SamplingParams(
        # Of what our logits processor leaves, the most likely.
        temperature=0.0,
        max_tokens=spec.max_new_tokens,
        stop_token_ids=sorted(spec.stop_token_ids),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        logprobs=spec.num_logprobs,
        extra_args={SAMPLING: spec.sampling, POSITION: spec.num_resumed_tokens},
    )


def _logprobs(token_id: int, found: Mapping[int, Any], number: int | None) -> TokenLogprobs:
    """Returns vLLM's raw log-probabilities: before temperature and filters, as ours are."""
    best = sorted(found.items(), key=lambda item: -item[1].logprob)
    if len(found) > (number or 0):
        # The token chosen is none of the best.
        best = [item for item in best if item[0] != token_id]
    return TokenLogprobs(
        Logprob(token_id, found[token_id].logprob), tuple(Logprob(other, each.logprob) for other, each in best)
    )
