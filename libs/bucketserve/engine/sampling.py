"""The next token of each row, from its logits.

Parameters are applied in the order of vLLM and transformers: logit bias, repetition penalty, frequency and presence
penalty, temperature, top_k, top_p, min_p; in float64, in which no parameter of the documented ranges overflows or
vanishes. Of equal logits the lower token id comes first.
Randomness is a function of (seed, position, token id) alone, computed by SplitMix64 (Steele, Lea, Flood 2014), so that
a row's choice does not depend on its batch, its worker or its device; the Gumbel-max trick turns it into a draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from bucketserve.ports import Logprob, Sampling, TokenLogprobs

__all__ = [
    "RowState",
    "SampleRow",
    "TokenCounts",
    "choose",
    "sample",
    "token_logprobs",
    "uniform_noise",
    "unpacked",
]


class TokenCounts:
    """How often a growing sequence contains each token of the vocabulary. Each of its tokens is looked at once."""

    def __init__(self) -> None:
        """Starts with none."""
        self._counts: torch.Tensor | None = None
        self._end = 0

    def of(self, tokens: Sequence[int], start: int, like: torch.Tensor) -> torch.Tensor:
        """Returns how often `tokens`, which begin as last time, contain each from `start` on.

        Returns:
            float64, shaped and placed as `like`, [vocabulary].
        """
        if self._counts is None:
            self._counts, self._end = torch.zeros_like(like, dtype=torch.float64), start
        if len(tokens) > self._end:
            new = torch.tensor(tokens[self._end :], dtype=torch.long, device=like.device)
            new = new[new < like.shape[0]]
            self._counts.index_add_(0, new, torch.ones_like(new, dtype=torch.float64))
            self._end = len(tokens)
        return self._counts


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


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int | None]:
    """Returns a token id for each row; None where logits are NaN or plus infinity, or exclude every token allowed.

    Args:
        logits: [rows, vocabulary], float32; minus infinity excludes a token.
        rows: one for each row of logits.
    """
    both: list[list[int]] = torch.stack(choose(logits, rows)).tolist()
    return [token_id if is_sound else None for token_id, is_sound in zip(*both, strict=True)]


def choose(logits: torch.Tensor, rows: Sequence[SampleRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `sample` chooses without waiting for the device: token ids and whether to go by them, [rows] int64.

    Args:
        logits: [rows, vocabulary], float32; minus infinity excludes a token.
        rows: one for each row of logits.
    """
    sound = logits.amax(dim=-1).isfinite()
    adjusted = [i for i, row in enumerate(rows) if row.is_adjusted]
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    scores = logits
    if adjusted:
        scores = logits.double()
        scores[adjusted] = _adjust(scores[adjusted], [rows[i] for i in adjusted])
    masked = [i for i, row in enumerate(rows) if row.allowed is not None]
    if masked:
        allowed = torch.stack([row.allowed for row in rows if row.allowed is not None])
        scores = scores.clone() if scores is logits else scores
        scores[masked] = scores[masked].masked_fill(~allowed, float("-inf"))
        sound &= scores.amax(dim=-1).isfinite()
    chosen = torch.argmax(scores, dim=-1)
    if drawn:
        chosen[drawn] = _draw(scores[drawn].double(), [rows[i] for i in drawn])
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


def uniform_noise(seeds: torch.Tensor, positions: torch.Tensor, size: int) -> torch.Tensor:
    """Returns [rows, size] numbers in (0, 1), float64, each a function of (seed, position, column).

    Args:
        seeds: [rows] int64.
        positions: [rows] int64.
        size: columns.
    """
    start = _mix(_mix(seeds) ^ positions)
    columns = torch.arange(size, device=seeds.device, dtype=torch.int64)
    bits = _mix(start[:, None] + columns[None, :] * _GOLDEN)
    # The largest would be rounded up to 1.
    return ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64).add_(0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-53)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _mix(value: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, whose multiplication wraps; shifts are made logical by masks."""
    value = value + _GOLDEN
    value = (value ^ ((value >> 30) & ((1 << 34) - 1))) * _FIRST
    value = (value ^ ((value >> 27) & ((1 << 37) - 1))) * _SECOND
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def _adjust(scores: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Returns scores, float64, with biases added and tokens penalised that are in the history."""
    for score, row in zip(scores, rows, strict=True):
        if row.sampling.logit_bias:
            score.index_add_(0, *row.state.bias(row.sampling.logit_bias, score))
    repeated = [i for i, row in enumerate(rows) if row.sampling.repetition_penalty != 1.0]
    if repeated:
        scores[repeated] = _penalise_repeated(scores[repeated], [rows[i] for i in repeated])
    counted = [i for i, row in enumerate(rows) if row.counts_generated]
    if counted:
        scores[counted] = _penalise_generated(scores[counted], [rows[i] for i in counted])
    return scores


def _penalise_repeated(scores: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Returns scores, those of seen tokens divided by the penalty if positive, else multiplied."""
    seen = torch.stack([row.state.all.of(row.history, 0, scores[0]) for row in rows]) > 0
    penalty = _column([row.sampling.repetition_penalty for row in rows], scores)
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def _penalise_generated(scores: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Returns scores, those of generated tokens less the presence penalty, and the frequency penalty for each time."""
    # Whatever attempts generated them: what comes before is the prompt.
    starts = [max(len(row.history) - row.position, 0) for row in rows]
    counts = torch.stack(
        [row.state.generated.of(row.history, start, scores[0]) for row, start in zip(rows, starts, strict=True)]
    )
    frequency = _column([row.sampling.frequency_penalty for row in rows], scores)
    presence = _column([row.sampling.presence_penalty for row in rows], scores)
    return scores - frequency * counts - presence * (counts > 0)


def _draw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    device = logits.device
    # The best score is 0, so that no temperature makes it infinite.
    scores = logits - logits.amax(dim=-1, keepdim=True)
    scores = _filter(scores / _column([row.sampling.temperature for row in rows], scores), rows)
    seeds = torch.tensor([_signed(row.sampling.seed & ((1 << 64) - 1)) for row in rows], device=device)
    positions = torch.tensor([row.position for row in rows], device=device)
    gumbel = -torch.log(-torch.log(uniform_noise(seeds, positions, logits.shape[1])))
    return torch.argmax(scores + gumbel, dim=-1)


def _filter(scores: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Returns scores, the best of each row 0, with what top_k, top_p and min_p exclude at minus infinity."""
    size = scores.shape[1]
    # Only these rows pay for being sorted.
    ordered = [i for i, row in enumerate(rows) if 0 < row.sampling.top_k < size or row.sampling.top_p < 1]
    if ordered:
        scores[ordered] = _keep_best(scores[ordered], [rows[i] for i in ordered])
    if any(row.sampling.min_p for row in rows):
        # Relative to the best, whose logarithm is 0.
        floor = torch.log(_column([row.sampling.min_p for row in rows], scores))
        scores = scores.masked_fill(scores < floor, float("-inf"))
    return scores


def _keep_best(scores: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    size = scores.shape[1]
    ordered, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
    top_k = _column([float(min(row.sampling.top_k or size, size)) for row in rows], scores)
    ordered = ordered.masked_fill(torch.arange(size, device=scores.device) >= top_k, float("-inf"))
    probabilities = torch.softmax(ordered, dim=-1)
    top_p = _column([row.sampling.top_p for row in rows], scores)
    # A token is out when those before it already reach top_p; the first one always stays.
    out = (probabilities.cumsum(dim=-1) - probabilities >= top_p) & (top_p < 1)
    out[:, 0] = False
    return torch.empty_like(scores).scatter(1, indices, ordered.masked_fill(out, float("-inf")))


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
