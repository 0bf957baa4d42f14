"""The next token of each row, from its logits.

Parameters are applied in the order of vLLM and transformers: logit bias, repetition penalty, frequency and presence
penalty, temperature, top_k, top_p, min_p; in float64, in which no parameter of the documented ranges overflows or
vanishes. Of equal logits the lower token id comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from bucketserve.engine.drawing import Race, draw, pick, race
from bucketserve.ports import Logprob, Sampling, TokenLogprobs

__all__ = [
    "RowState",
    "SampleRow",
    "TokenCounts",
    "choose",
    "sample",
    "token_logprobs",
    "unpacked",
]


class TokenCounts:
    """How often a growing sequence contains each token. Each of its tokens is looked at once."""

    def __init__(self) -> None:
        """Starts with none."""
        self._ids = self._counts = torch.empty(0)
        self._end = -1

    def of(self, tokens: Sequence[int], start: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids and how often `tokens`, which begin as last time, contain them from `start` on.

        Returns:
            int64 and float64, [n], placed as `like`, [vocabulary]; an id may be there more than once.
        """
        if self._end < 0:
            self._counts = torch.zeros_like(like, dtype=torch.float64)
            self._ids, self._end = torch.empty(0, dtype=torch.int64, device=like.device), start
        if len(tokens) > self._end:
            new = torch.tensor([i for i in tokens[self._end :] if i < like.shape[0]], dtype=torch.int64)
            new = new.to(like.device)
            self._counts.index_add_(0, new, torch.ones_like(new, dtype=torch.float64))
            self._ids, self._end = torch.cat((self._ids, new)), len(tokens)
        return self._ids, self._counts[self._ids]


@dataclass(slots=True)
class RowState:
    """What is kept of a sequence from one of its tokens to the next."""

    all: TokenCounts = field(default_factory=TokenCounts)
    generated: TokenCounts = field(default_factory=TokenCounts)
    _bias: tuple[torch.Tensor, torch.Tensor] | None = None

    def bias(self, pairs: Sequence[tuple[int, float]], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the ids and what to add to their scores, as tensors; `pairs` are the same each time."""
        if self._bias is None:
            pairs = [(token_id, bias) for token_id, bias in pairs if token_id < like.shape[0]]
            ids = torch.tensor([token_id for token_id, _ in pairs], dtype=torch.long, device=like.device)
            self._bias = ids, torch.tensor([bias for _, bias in pairs], dtype=torch.float64, device=like.device)
        return self._bias


@dataclass(frozen=True, slots=True)
class SampleRow:
    """How to choose one row's token."""

    sampling: Sampling
    position: int
    """Position of the token among the generated ones, over all attempts."""
    history: Sequence[int]
    """Prompt and generated tokens, for the penalties."""
    state: RowState = field(default_factory=RowState)
    """What was kept of it at the step before."""
    allowed: torch.Tensor | None = None
    """Bool, [vocabulary]: the tokens that may be chosen; None for all."""

    @property
    def is_adjusted(self) -> bool:
        """Whether a bias or a penalty changes its logits."""
        sampling = self.sampling
        return bool(sampling.logit_bias) or sampling.repetition_penalty != 1.0 or self.counts_generated

    @property
    def counts_generated(self) -> bool:
        """Whether it matters how often a token was generated."""
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)


def sample(logits: torch.Tensor, rows: Sequence[SampleRow], race: Race = race) -> list[int | None]:
    """Returns a token id for each row; None where logits are NaN or plus infinity, or exclude every token allowed.

    Args:
        logits: [rows, vocabulary], float32; minus infinity excludes a token.
        rows: one for each row of logits.
        race: as drawing.draw has it.
    """
    both: list[list[int]] = torch.stack(choose(logits, rows, race)).tolist()
    return [token_id if is_sound else None for token_id, is_sound in zip(*both, strict=True)]


def choose(logits: torch.Tensor, rows: Sequence[SampleRow], race: Race = race) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `sample` chooses, on the device: token ids and whether to go by them, [rows] int64."""
    sound = logits.amax(dim=-1).isfinite()
    chosen = torch.zeros_like(sound, dtype=torch.int64)
    changed = [i for i, row in enumerate(rows) if row.is_adjusted or row.allowed is not None]
    if changed:
        scores = _adjusted(logits[changed].double(), [rows[i] for i in changed])
        sound[changed] &= scores.amax(dim=-1).isfinite()
        chosen[changed] = _choose(scores, [rows[i] for i in changed], race)
    if len(changed) < len(rows):
        as_they_are = sorted({*range(len(rows))}.difference(changed))
        chosen[as_they_are] = _choose(pick(logits, as_they_are), [rows[i] for i in as_they_are], race)
    return chosen, sound.long()


def token_logprobs(
    logits: torch.Tensor, chosen: Sequence[int | None], numbers: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """Returns the log-probabilities of each row that wants them, from the model's own distribution.

    Args:
        logits: [rows, vocabulary], float32, untouched by filters.
        chosen: the tokens chosen; rows without one have no log-probabilities.
        numbers: alternatives wanted for each row; None for no log-probabilities.
    """
    result: list[TokenLogprobs | None] = [None] * len(chosen)
    rows = enumerate(zip(chosen, numbers, strict=True))
    wanted = {i: (token, n) for i, (token, n) in rows if token is not None and n is not None}
    if not wanted:
        return result
    logits = logits[list(wanted)]
    logprobs = torch.log_softmax(logits, dim=-1)
    own = torch.tensor([[token] for token, _ in wanted.values()], device=logits.device)
    most = min(max(n for _, n in wanted.values()), logits.shape[1])
    chosen_and_best = torch.cat((own, _best(logits, most)), dim=1)
    # One copy from the device each, whatever the number of rows.
    values, ids = logprobs.gather(1, chosen_and_best).tolist(), chosen_and_best.tolist()
    for (i, (_, number)), row in zip(wanted.items(), zip(ids, values, strict=True), strict=True):
        first, *others = (Logprob(token_id, value) for token_id, value in zip(*row, strict=True))
        result[i] = TokenLogprobs(first, tuple(others[:number]))
    return result


def _best(logits: torch.Tensor, number: int) -> torch.Tensor:
    """Returns the ids of the highest logits, [rows, number], best first; of equal ones the lower id comes first.

    topk by itself takes any of equal ones, and others if more are asked for.
    """
    if not number:
        return torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
    may_be = logits >= torch.topk(logits, number, dim=-1).values[:, -1:]
    rows, ids = may_be.nonzero(as_tuple=True)
    # By row, then by logit, then as they stand, by id.
    by_logit = logits[rows, ids].sort(descending=True, stable=True).indices
    in_order = by_logit[rows[by_logit].sort(stable=True).indices]
    numbers = torch.bincount(rows, minlength=len(logits))
    first = numbers.cumsum(dim=0) - numbers
    return ids[in_order[first[:, None] + torch.arange(number, device=logits.device)]]


def unpacked(mask: bytearray, like: torch.Tensor) -> torch.Tensor:
    """Returns a mask of a bit for each token, lowest first, as bool, shaped and placed as `like`, [vocabulary]."""
    size = like.shape[0]
    packed = torch.frombuffer(mask, dtype=torch.uint8).to(like.device)
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=like.device)) & 1
    allowed = bits.flatten()[:size].bool()
    # What the model has beyond the tokenizer is no text.
    return torch.nn.functional.pad(allowed, (0, size - len(allowed)))


def _choose(scores: torch.Tensor, rows: Sequence[SampleRow], race: Race) -> torch.Tensor:
    """Returns the best token of each row, or one drawn, [rows] int64."""
    chosen = torch.zeros(len(rows), dtype=torch.int64, device=scores.device)
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        chosen[drawn] = draw(pick(scores, drawn), [rows[i] for i in drawn], race)
    if len(drawn) < len(rows):
        greedy = [i for i, row in enumerate(rows) if row.sampling.temperature <= 0]
        chosen[greedy] = torch.argmax(pick(scores, greedy), dim=-1)
    return chosen


def _adjusted(scores: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Returns scores, float64: biases added, tokens of the history penalised, minus infinity where none is allowed."""
    for score, row in zip(scores, rows, strict=True):
        sampling = row.sampling
        if sampling.logit_bias:
            score.index_add_(0, *row.state.bias(sampling.logit_bias, score))
        if sampling.repetition_penalty != 1.0:
            ids, _ = row.state.all.of(row.history, 0, score)
            seen, penalty = score[ids], sampling.repetition_penalty
            score[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
        if row.counts_generated:
            # Whatever attempts generated them: what comes before is the prompt.
            start = max(len(row.history) - row.position, 0)
            ids, counts = row.state.generated.of(row.history, start, score)
            # No count is 0.
            score[ids] = score[ids] - sampling.frequency_penalty * counts - sampling.presence_penalty
    masked = [i for i, row in enumerate(rows) if row.allowed is not None]
    if masked:
        allowed = torch.stack([row.allowed for row in rows if row.allowed is not None])
        scores[masked] = scores[masked].masked_fill(~allowed, float("-inf"))
    return scores
