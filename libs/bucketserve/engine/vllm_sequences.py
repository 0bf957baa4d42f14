"""Sequences as vLLM takes them and gives them back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

from bucketserve.core.preemption import loss
from bucketserve.core.types import MAX_PREEMPTIONS
from bucketserve.engine.vllm_handover import TRANSFER
from bucketserve.engine.vllm_inside import FIRST, POSITION, SAMPLING, FirstToken
from bucketserve.ports import Logprob, SequenceSpec, TokenLogprobs

__all__ = ["VllmSequence", "token_logprobs", "vllm_prompt", "vllm_sampling"]


@dataclass(slots=True, eq=False)
class VllmSequence:
    """A sequence at this engine."""

    spec: SequenceSpec
    max_chunk_tokens: int
    request: Any = None
    """vLLM's, once it has begun."""
    is_prefilled: bool = False
    num_generated: int = 0
    num_reused: int = 0
    first_token_s: float = 0.0
    expected: FirstToken | None = None
    """Of a sequence whose KV comes from elsewhere: what vLLM is to generate first; None once it has."""

    @property
    def hands_over(self) -> bool:
        """Whether it ends here with its first token, and not for good."""
        return self.spec.hands_over and self.spec.max_new_tokens > 1

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
        """What letting it go costs (core/preemption.py); None if it may not be let go: its blocks would stay taken."""
        spec = self.spec
        if self.expected is not None:
            return None
        return loss(is_batch=spec.is_batch, num_preemptions=spec.num_preemptions, num_tokens=self.num_computed)

    @property
    def pace(self) -> tuple[float, float, int] | None:
        """What StepPace has to know of it while it decodes; None if no TPOT was promised."""
        tpot_s = self.spec.tpot_slo_s
        return None if tpot_s is None else (tpot_s, self.first_token_s, self.num_generated)


def vllm_prompt(spec: SequenceSpec) -> Mapping[str, Any]:
    """Returns a sequence's prompt as vLLM takes it."""
    prompt: dict[str, Any] = {"prompt_token_ids": list(spec.token_ids)}
    if spec.prefix_salt:
        prompt["cache_salt"] = spec.prefix_salt.hex()
    return prompt


def vllm_sampling(sequence: VllmSequence, transfer: Mapping[str, Any] | None) -> Any:
    """Returns how vLLM is to generate a sequence, and what its KV connector is told of it."""
    spec, extra = sequence.spec, dict[str, Any]()
    if transfer is not None:
        extra[TRANSFER] = dict(transfer)
    if sequence.expected is not None:
        extra[FIRST] = sequence.expected
    return SamplingParams(
        # Of what our logits processor leaves, the most likely.
        temperature=0.0,
        max_tokens=1 if spec.hands_over else spec.max_new_tokens,
        stop_token_ids=sorted(spec.stop_token_ids),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        # Who takes the KV over needs that of its first token.
        logprobs=spec.num_logprobs or 0 if sequence.hands_over else spec.num_logprobs,
        extra_args={SAMPLING: spec.sampling, POSITION: spec.num_resumed_tokens} | extra,
    )


def token_logprobs(token_id: int, found: Mapping[int, Any], number: int) -> TokenLogprobs:
    """Returns vLLM's raw log-probabilities: before temperature and filters, as ours are."""
    best = sorted(found.items(), key=lambda item: -item[1].logprob)
    if len(found) > number:
        # The token chosen is none of the best.
        best = [item for item in best if item[0] != token_id]
    return TokenLogprobs(
        Logprob(token_id, found[token_id].logprob), tuple(Logprob(other, each.logprob) for other, each in best)
    )
