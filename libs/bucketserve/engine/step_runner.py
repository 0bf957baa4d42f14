"""A step of the packed engine: the forward pass and the choice of tokens, in parts where it can't be run as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from bucketserve.engine.drawing import Race
from bucketserve.engine.forward import Forward, PackedTokens
from bucketserve.engine.grammars import GrammarError
from bucketserve.engine.pressure import MemoryPressure, is_out_of_memory
from bucketserve.engine.sampling import SampleRow, sample, token_logprobs, unpacked
from bucketserve.engine.sequences import EngineSequence, Entry
from bucketserve.ports import Sampling, SequenceFailure, TokenLogprobs

__all__ = ["Outcome", "Row", "StepRunner"]

NOT_FINITE = "the model's output is not finite (NaN or infinity in its logits): no token can be chosen"
NOTHING_ALLOWED = (
    "no token of the vocabulary may follow its constrained output but what the model or the request excludes"
)


@dataclass(frozen=True, slots=True)
class Row:
    """What a step brought a sequence."""

    sequence: EngineSequence
    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step, or a part of it, brought."""

    rows: list[Row] = field(default_factory=list)
    failures: list[SequenceFailure] = field(default_factory=list)
    """Of sequences that can't go on; they have their KV still."""


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why a step, or a part of it, could not be computed."""

    is_out_of_memory: bool
    message: str


class StepRunner:
    """Runs steps of one forward pass each, as long as nothing fails."""

    def __init__(self, forward: Forward, device: torch.device, race: Race, pressure: MemoryPressure) -> None:
        """Takes the model, how tokens are drawn, and who is told of each step whether memory sufficed."""
        self.forward = forward
        self._device = device
        self._race = race
        self._pressure = pressure

    def run(self, entries: Sequence[Entry]) -> Outcome:
        """Computes entries and notes their KV; returns those that get a token, with it, and those that failed.

        What fails is halved and tried again, so that memory suffices, or that only the sequence which is the cause is
        given up. Nothing is lost by a failed try: it wrote at most the same KV.
        """
        outcome, given_up = Outcome(), set[EngineSequence]()
        ran_out = False
        parts = [list(entries)]
        while parts:
            # Of one that was given up, there may be another half.
            part = [entry for entry in parts.pop() if entry.sequence not in given_up]
            if not part:
                continue
            attempt = self._try(part)
            if isinstance(attempt, _Trouble):
                ran_out = ran_out or attempt.is_out_of_memory
                halves = _halve(part) if attempt.is_out_of_memory or len(part) > 1 else None
                if halves is None:
                    given_up.add(part[0].sequence)
                    outcome.failures.append(
                        _failure(part[0].sequence, attempt.message, is_retryable=attempt.is_out_of_memory)
                    )
                else:
                    parts += reversed(halves)
                continue
            for entry in part:
                entry.sequence.num_cached += entry.num_tokens
            outcome.rows.extend(attempt.rows)
            outcome.failures.extend(attempt.failures)
        self._pressure.note(ran_out=ran_out)
        return outcome

    def _try(self, entries: Sequence[Entry]) -> Outcome | _Trouble:
        """Returns the tokens of those entries that complete. What failed is left when this returns, with its tensors.

        Raises:
            torch.AcceleratorError: the device is not to be used any more.
        """
        try:
            logits = self._run_model(entries)
            if logits is None:
                return Outcome()
            return _choose(logits, [entry.sequence for entry in entries if entry.completes], self._race)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            trouble = _Trouble(is_out_of_memory(error), f"{type(error).__name__} while computing: {error}")
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
        return self.forward(tokens)


def _choose(logits: torch.Tensor, sequences: Sequence[EngineSequence], race: Race) -> Outcome:
    """Returns the next token of each sequence, from logits [sequences, vocabulary]; see drawing.draw."""
    rows: list[SampleRow] = []
    refused: dict[int, str] = {}
    for i, sequence in enumerate(sequences):
        try:
            rows.append(_sample_row(sequence, logits[i]))
        except GrammarError as error:
            refused[i] = f"its output can't be constrained any further: {error}"
            rows.append(SampleRow(Sampling(), 0, ()))
    chosen = [None if i in refused else token_id for i, token_id in enumerate(sample(logits, rows, race))]
    logprobs = token_logprobs(logits, chosen, [sequence.spec.num_logprobs for sequence in sequences])
    outcome = Outcome()
    for i, (sequence, row, token_id, own) in enumerate(zip(sequences, rows, chosen, logprobs, strict=True)):
        if token_id is not None:
            outcome.rows.append(Row(sequence, token_id, own))
        elif i in refused or (row.allowed is not None and not row.allowed.any()):
            outcome.failures.append(_failure(sequence, refused.get(i, NOTHING_ALLOWED)))
        else:
            # It may be due to KV that others computed: the next attempt finds none of that.
            outcome.failures.append(_failure(sequence, NOT_FINITE, is_retryable=sequence.num_reused > 0))
    return outcome


def _failure(sequence: EngineSequence, message: str, *, is_retryable: bool = False) -> SequenceFailure:
    return SequenceFailure(request_id=sequence.spec.request_id, message=message, is_retryable=is_retryable)


def _sample_row(sequence: EngineSequence, logits: torch.Tensor) -> SampleRow:
    """Returns how to choose its next token, from logits [vocabulary].

    Raises:
        GrammarError: its output can't be constrained as is asked any further.
    """
    spec, matcher = sequence.spec, sequence.matcher
    position = spec.num_resumed_tokens + sequence.num_generated
    allowed = None if matcher is None else unpacked(matcher.mask(spec.stop_token_ids), logits)
    return SampleRow(spec.sampling, position, sequence.tokens, sequence.sampling_state, allowed)


def _halve(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]] | None:
    """Returns two smaller parts of a step, to be run in this order; None if it is a single token."""
    if len(entries) > 1:
        middle = len(entries) // 2
        return list(entries[:middle]), list(entries[middle:])
    entry = entries[0]
    if entry.num_tokens == 1:
        return None
    half = entry.num_tokens // 2
    return [Entry(entry.sequence, half)], [Entry(entry.sequence, entry.num_tokens - half)]
