"""What the packed engine keeps of its sequences, and what of them goes into a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bucketserve.core.preemption import loss
from bucketserve.core.types import MAX_PREEMPTIONS, StepSample
from bucketserve.engine.kv_space import KvTable
from bucketserve.engine.sampling import RowState, SampleRow
from bucketserve.ports import SequenceSpec, TokenLogprobs

__all__ = ["EngineSequence", "Entry", "Row", "Success", "Trouble", "halve", "measure", "sample_row"]


@dataclass(slots=True, eq=False)
class EngineSequence:
    """A sequence in the engine."""

    spec: SequenceSpec
    max_chunk_tokens: int
    tokens: list[int]
    """Prompt and generated tokens."""
    kv: KvTable | None = None
    """Its pages once it has begun."""
    num_cached: int = 0
    """Tokens whose KV is in memory."""
    num_reused: int = 0
    """Those of them that were there already, of a sequence that began alike."""
    num_generated: int = 0
    first_token_s: float = 0.0
    """When it had its first token here, on time.perf_counter."""
    sampling_state: RowState = field(default_factory=RowState)

    @property
    def remaining(self) -> int:
        """Prompt tokens still to compute."""
        return len(self.spec.token_ids) - self.num_cached

    @property
    def first_tokens(self) -> int:
        """Tokens for which it has KV from its beginning: all that it may use if it may not be let go."""
        is_reserved = self.spec.num_preemptions >= MAX_PREEMPTIONS
        return self.spec.reserved_tokens if is_reserved else max(len(self.spec.token_ids), len(self.tokens) - 1)

    @property
    def loss(self) -> tuple[bool, int, int] | None:
        """What letting it go costs (core/preemption.py); None if it may not be let go."""
        return loss(is_batch=self.spec.is_batch, num_preemptions=self.spec.num_preemptions, num_tokens=self.num_cached)

    @property
    def pace(self) -> tuple[float, float, int] | None:
        """What StepPace has to know of it while it decodes; None if no TPOT was promised."""
        tpot_s = self.spec.tpot_slo_s
        return None if tpot_s is None else (tpot_s, self.first_token_s, self.num_generated)


@dataclass(frozen=True, slots=True)
class Entry:
    """New tokens of one sequence in a step."""

    sequence: EngineSequence
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Whether the last of them is the sequence's last token, so that its logits are wanted."""
        return self.sequence.num_cached + self.num_tokens == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Row:
    """What a step brought a sequence."""

    sequence: EngineSequence
    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Success:
    """What a step, or a part of it, brought."""

    rows: Sequence[Row] = ()
    not_finite: Sequence[EngineSequence] = ()
    """Sequences whose logits allow no choice."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a step, or a part of it, could not be computed."""

    is_out_of_memory: bool
    message: str


def sample_row(sequence: EngineSequence) -> SampleRow:
    """Returns how to choose its next token."""
    position = sequence.spec.num_resumed_tokens + sequence.num_generated
    return SampleRow(sequence.spec.sampling, position, sequence.tokens, sequence.sampling_state)


def measure(entries: Sequence[Entry]) -> Callable[[float], StepSample]:
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


def halve(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]] | None:
    """Returns two smaller parts of a step, to be run in this order; None if it is a single token."""
    if len(entries) > 1:
        middle = len(entries) // 2
        return list(entries[:middle]), list(entries[middle:])
    entry = entries[0]
    if entry.num_tokens == 1:
        return None
    half = entry.num_tokens // 2
    return [Entry(entry.sequence, half)], [Entry(entry.sequence, entry.num_tokens - half)]
