"""What the packed engine keeps of its sequences, and what of them goes into a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bucketserve.core.preemption import loss
from bucketserve.core.types import MAX_PREEMPTIONS, StepSample
from bucketserve.engine.drawing import Race
from bucketserve.engine.grammars import GrammarError, Matcher
from bucketserve.engine.kv_space import KvTable
from bucketserve.engine.sampling import RowState, SampleRow, sample, token_logprobs, unpacked
from bucketserve.ports import Sampling, SequenceSpec, TokenLogprobs

__all__ = ["EngineSequence", "Entry", "Row", "Success", "Trouble", "choose", "halve", "measure"]

NOT_FINITE = "the model's output is not finite (NaN or infinity in its logits): no token can be chosen"
NO_TOKEN = "no token of the vocabulary may follow its constrained output but what the model or the request excludes"


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
    matcher: Matcher | None = None
    """Follows its output, if that is constrained, once it is compiled."""

    @property
    def may_run(self) -> bool:
        """Whether what it needs beside memory is there."""
        return self.spec.structured_output is None or self.matcher is not None

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
    refused: Sequence[tuple[EngineSequence, str]] = ()
    """Sequences for which no token can be chosen, and why."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a step, or a part of it, could not be computed."""

    is_out_of_memory: bool
    message: str


def sample_row(sequence: EngineSequence, logits: torch.Tensor) -> SampleRow:
    """Returns how to choose its next token, from logits [vocabulary].

    Raises:
        GrammarError: its output can't be constrained as is asked any further.
    """
    spec, matcher = sequence.spec, sequence.matcher
    position = spec.num_resumed_tokens + sequence.num_generated
    allowed = None if matcher is None else unpacked(matcher.mask(spec.stop_token_ids), logits)
    return SampleRow(spec.sampling, position, sequence.tokens, sequence.sampling_state, allowed)


def choose(logits: torch.Tensor, sequences: Sequence[EngineSequence], race: Race) -> Success:
    """Returns the next token of each sequence, from logits [sequences, vocabulary]; see drawing.draw."""
    rows: list[SampleRow] = []
    refused: dict[int, str] = {}
    for i, sequence in enumerate(sequences):
        try:
            rows.append(sample_row(sequence, logits[i]))
        except GrammarError as error:
            refused[i] = f"its output can't be constrained any further: {error}"
            rows.append(SampleRow(Sampling(), 0, ()))
    chosen = [None if i in refused else token_id for i, token_id in enumerate(sample(logits, rows, race))]
    logprobs = token_logprobs(logits, chosen, [sequence.spec.num_logprobs for sequence in sequences])
    found = list(zip(sequences, rows, chosen, logprobs, strict=True))
    return Success(
        [Row(sequence, token_id, own) for sequence, _, token_id, own in found if token_id is not None],
        [
            (sequence, refused.get(i) or (NOT_FINITE if row.allowed is None or row.allowed.any() else NO_TOKEN))
            for i, (sequence, row, token_id, _) in enumerate(found)
            if token_id is None
        ],
    )


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
