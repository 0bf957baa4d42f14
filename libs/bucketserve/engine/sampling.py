"""The next token of each row, from its logits.

Filters are applied in the order of transformers: repetition penalty, temperature, top_k, top_p, min_p. Randomness is a
function of (seed, position, token id) alone, computed by SplitMix64 (Steele, Lea, Flood 2014), so that a row's choice
does not depend on its batch, its worker or its device; the Gumbel-max trick turns it into a draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bucketserve.ports import Logprob, Sampling, TokenLogprobs

__all__ = ["SampleRow", "sample", "token_logprobs", "uniform_noise"]


@dataclass(frozen=True, slots=True)
class SampleRow:
    """How to choose one row's token."""

    sampling: Sampling
    position: int
    """Position of the token among the generated ones, over all attempts."""
    history: Sequence[int]
    """Prompt and generated tokens, for the repetition penalty."""


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Returns a token id for each row.

    Args:
        logits: [rows, vocabulary], float32.
        rows: one for each row of logits.
    """
    penalised = [i for i, row in enumerate(rows) if row.sampling.repetition_penalty != 1.0]
    if penalised:
        logits = logits.clone()
    for i in penalised:
        _penalise(logits[i], rows[i])
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    chosen = torch.argmax(logits, dim=-1)
    if drawn:
        chosen[drawn] = _draw(logits[drawn], [rows[i] for i in drawn])
    tokens: list[int] = chosen.tolist()
    return tokens


def token_logprobs(
    logits: torch.Tensor, chosen: Sequence[int], numbers: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """Returns the log-probabilities of each row that wants them, from the model's own distribution.

    Args:
        logits: [rows, vocabulary], float32, untouched by filters.
        chosen: the tokens chosen.
        numbers: alternatives wanted for each row; None for no log-probabilities.
    """
    result: list[TokenLogprobs | None] = [None] * len(chosen)
    wanted = [i for i, number in enumerate(numbers) if number is not None]
    if not wanted:
        return result
    logprobs = torch.log_softmax(logits[wanted], dim=-1)
    most = max(numbers[i] or 0 for i in wanted)
    top = torch.topk(logprobs, most, dim=-1) if most else None
    for place, i in enumerate(wanted):
        alternatives: tuple[Logprob, ...] = ()
        if top is not None and numbers[i]:
            number = numbers[i]
            values, ids = top.values[place, :number].tolist(), top.indices[place, :number].tolist()
            alternatives = tuple(Logprob(token_id, value) for token_id, value in zip(ids, values, strict=True))
        own = Logprob(chosen[i], float(logprobs[place, chosen[i]]))
        result[i] = TokenLogprobs(own, alternatives)
    return result


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
    return ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64).add_(0.5).mul_(2.0**-53)


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


def _penalise(logits: torch.Tensor, row: SampleRow) -> None:
    """Divides positive logits of seen tokens by the penalty and multiplies negative ones, in place."""
    seen = torch.tensor(sorted(set(row.history)), device=logits.device)
    values = logits[seen]
    penalty = row.sampling.repetition_penalty
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty)


def _draw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    device = logits.device
    temperature = torch.tensor([row.sampling.temperature for row in rows], device=device)
    scores = _filter(logits / temperature[:, None], rows)
    seeds = torch.tensor([_signed(row.sampling.seed & ((1 << 64) - 1)) for row in rows], device=device)
    positions = torch.tensor([row.position for row in rows], device=device)
    gumbel = -torch.log(-torch.log(uniform_noise(seeds, positions, logits.shape[1])))
    return torch.argmax(scores.to(torch.float64) + gumbel, dim=-1)


def _filter(scores: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Sets what top_k, top_p and min_p exclude to minus infinity."""
    size = scores.shape[1]
    device = scores.device
    excluded = float("-inf")
    if any(row.sampling.top_k for row in rows):
        keep = torch.tensor([min(row.sampling.top_k or size, size) for row in rows], device=device)
        threshold = torch.sort(scores, dim=-1, descending=True).values.gather(1, keep[:, None] - 1)
        scores = scores.masked_fill(scores < threshold, excluded)
    if any(row.sampling.top_p < 1 for row in rows):
        top_p = torch.tensor([row.sampling.top_p for row in rows], device=device)
        ordered, indices = torch.sort(scores, dim=-1, descending=True)
        probabilities = torch.softmax(ordered, dim=-1)
        # A token is out when those before it already reach top_p; the first one always stays.
        out = (probabilities.cumsum(dim=-1) - probabilities >= top_p[:, None]) & (top_p[:, None] < 1)
        out[:, 0] = False
        scores = scores.masked_fill(torch.zeros_like(out).scatter(1, indices, out), excluded)
    if any(row.sampling.min_p for row in rows):
        min_p = torch.tensor([row.sampling.min_p for row in rows], device=device)
        probabilities = torch.softmax(scores, dim=-1)
        floor = min_p[:, None] * probabilities.max(dim=-1, keepdim=True).values
        scores = scores.masked_fill(probabilities < floor, excluded)
    return scores
