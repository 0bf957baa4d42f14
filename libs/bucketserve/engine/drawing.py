"""Draws of tokens by the Gumbel-max trick: the highest of score / temperature + noise, over what filters leave.

Noise is a function of (seed, position, token id) alone, computed by SplitMix64 (Steele, Lea, Flood 2014), so that a
row's choice does not depend on its batch, its worker or its device. What top_k, top_p and min_p leave is looked for
among a row's best tokens, and the vocabulary is sorted only where these are too few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from bucketserve.ports import Sampling

__all__ = ["Draw", "Race", "draw", "noise_starts", "pick", "race", "uniform_noise"]

NUM_BEST = 256
"""How many of the best tokens are looked at before all are."""
CPU_BLOCK, BLOCK = 1 << 18, 1 << 23
"""Scores that are computed with at once, in float64: on a CPU what its caches hold."""


class Draw(Protocol):
    """What is drawn for a row."""

    @property
    def sampling(self) -> Sampling:
        """Temperature, above 0, filters and seed."""

    @property
    def position(self) -> int:
        """Of the token among the generated ones."""


class Race(Protocol):
    """See race; the kernels have faster ones."""

    def __call__(self, scores: torch.Tensor, temperatures: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Returns the token of each row."""


def draw(scores: torch.Tensor, rows: Sequence[Draw], race: Race) -> torch.Tensor:
    """Returns the token of each row, [rows] int64; any where no score is finite or one is NaN.

    Args:
        scores: [rows, vocabulary], float32 or float64; minus infinity excludes a token.
        rows: one for each row of scores.
        race: draws for rows without filters.
    """
    size, device = scores.shape[1], scores.device
    temperatures = _column([row.sampling.temperature for row in rows])
    starts = noise_starts([row.sampling.seed for row in rows], [row.position for row in rows])
    chosen = torch.zeros(len(rows), dtype=torch.int64, device=device)

    def run(indices: Sequence[int], filtered: torch.Tensor) -> None:
        chosen[indices] = race(filtered, temperatures[indices].to(device), starts[indices].to(device))

    left = [i for i, row in enumerate(rows) if _is_filtered(row.sampling, size)]
    if len(left) < len(rows):
        free = sorted({*range(len(rows))}.difference(left))
        run(free, pick(scores, free))
    if left and size > NUM_BEST:
        ids, values, is_all = _among_best(pick(scores, left), temperatures[left], [rows[i].sampling for i in left])
        winners = (values + _gumbel(_noise(starts[left], ids))).argmax(dim=-1, keepdim=True)
        chosen[left] = ids.gather(1, winners)[:, 0].to(device)
        left = [i for i, is_known in zip(left, is_all.tolist(), strict=True) if not is_known]
    for part in _parts(left, size, device):
        run(part, _filtered(pick(scores, part), temperatures[part].to(device), [rows[i].sampling for i in part]))
    return chosen


def race(scores: torch.Tensor, temperatures: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Returns the token of each row with the highest sum of scaled score and noise, [rows] int64.

    Args:
        scores: [rows, vocabulary], float32 or float64.
        temperatures: [rows, 1], float64.
        starts: [rows], see noise_starts.
    """
    size, chosen = scores.shape[1], []
    columns = torch.arange(size, device=scores.device)[None]
    for at in _slices(scores):
        noise = _gumbel(_noise(starts[at], columns))
        chosen.append(torch.argmax(_scaled(scores[at], temperatures[at]).add_(noise), dim=-1))
    return torch.cat(chosen)


def noise_starts(seeds: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """Returns what the noise of rows begins with: a function of seed and position, [rows] int64."""
    mixed = _mix(torch.tensor([_signed(seed & ((1 << 64) - 1)) for seed in seeds]))
    return _mix(mixed ^ torch.tensor(positions))


def uniform_noise(starts: torch.Tensor, size: int) -> torch.Tensor:
    """Returns [rows, size] numbers in (0, 1), float64, each a function of a row's start and of its column."""
    return _noise(starts, torch.arange(size, device=starts.device)[None])


def _among_best(
    scores: torch.Tensor, temperatures: torch.Tensor, samplings: Sequence[Sampling]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what filters leave of the best tokens of each row, and whether that is all that they leave; on the CPU.

    Only what is as long as the vocabulary is computed on the scores' device.

    Returns:
        Ids, [rows, n] int64; their scores by the temperature, minus infinity for what is out, float64; [rows] bool.
    """
    size = scores.shape[1]
    ids = torch.topk(scores, NUM_BEST, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = scores.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    values, ids = values.cpu(), ids.gather(1, order).cpu()
    # Without top_k, top_p is a share of all tokens.
    of_all = [i for i, s in enumerate(samplings) if s.top_p < 1 and not 0 < s.top_k < size]
    totals = torch.zeros(len(scores), 1, dtype=torch.float64)
    if of_all:
        totals[of_all] = _total(pick(scores, of_all), temperatures[of_all].to(scores.device)).cpu()
    number = _num_kept(values, temperatures, samplings, size, totals)
    # Those that are no better than the last are not all here, unless it is excluded by itself.
    last = values[:, -1:]
    is_share_known = torch.tensor([s.top_p >= 1 or not NUM_BEST < s.top_k < size for s in samplings])[:, None]
    is_all = (last == -math.inf) | (is_share_known & (values.gather(1, number - 1) > last))
    width = int(number.max())
    kept = torch.arange(width) < number
    return ids[:, :width], _scaled(values, temperatures)[:, :width].masked_fill(~kept, -math.inf), is_all[:, 0]


def _filtered(scores: torch.Tensor, temperatures: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Returns scores with minus infinity for what filters exclude."""
    values = _sorted(scores)
    number = _num_kept(values, temperatures, samplings, scores.shape[1])
    last = values.gather(1, number - 1)
    # Of those that equal the last one kept the first stay, as many as there is room for.
    better, equal = scores > last, scores == last
    is_kept = better | (equal & (equal.cumsum(dim=-1) <= number - better.sum(dim=-1, keepdim=True)))
    return scores.masked_fill(~is_kept, -math.inf)


def _num_kept(
    values: torch.Tensor,
    temperatures: torch.Tensor,
    samplings: Sequence[Sampling],
    size: int,
    totals: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns how many of each row's best tokens top_k leaves, top_p of what that leaves, and min_p; [rows, 1], >= 1.

    Args:
        values: [rows, n], the best scores in order.
        temperatures: [rows, 1].
        samplings: one for each row.
        size: of the vocabulary.
        totals: [rows, 1], of which top_p is a share where it is not 0; else of what top_k leaves of the values.
    """
    device = values.device
    scaled = _scaled(values, temperatures)
    top_k = torch.tensor([s.top_k or size for s in samplings], device=device)[:, None]
    kept = torch.arange(values.shape[1], device=device) < top_k
    if any(s.top_p < 1 for s in samplings):
        weights = scaled.exp().masked_fill_(~kept, 0.0)
        own = weights.sum(dim=-1, keepdim=True)
        shares = weights / (own if totals is None else torch.where(totals > 0, totals, own))
        # A token is out when those before it already reach top_p.
        top_p = _column([s.top_p for s in samplings]).to(device)
        kept &= (shares.cumsum(dim=-1) - shares < top_p) | (top_p >= 1)
    if any(s.min_p for s in samplings):
        # Relative to the best, whose logarithm is 0.
        kept &= scaled >= torch.log(_column([s.min_p for s in samplings])).to(device)
    # The first one always stays.
    return kept.sum(dim=-1, keepdim=True).clamp_(min=1)


def _sorted(scores: torch.Tensor) -> torch.Tensor:
    """Returns each row's scores, the best first."""
    if scores.device.type != "cpu":
        return scores.sort(dim=-1, descending=True).values
    # A tenth of the time that torch takes for it.
    ascending = torch.from_numpy(np.sort(scores.numpy(), axis=-1))
    return ascending.flip(-1)


def _total(scores: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Returns the sum of exp(scaled score) of each row, [rows, 1] float64."""
    return torch.cat([_scaled(scores[at], temperatures[at]).exp_().sum(dim=-1, keepdim=True) for at in _slices(scores)])


def _scaled(scores: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Returns scores by the temperature, float64; the best is 0, so that no temperature makes it infinite."""
    return (scores.double() - scores.amax(dim=-1, keepdim=True)).div_(temperatures)


def _is_filtered(sampling: Sampling, size: int) -> bool:
    return 0 < sampling.top_k < size or sampling.top_p < 1 or sampling.min_p > 0


def pick(scores: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
    """Returns those rows; all of them as they are, without a copy."""
    return scores if len(indices) == len(scores) else scores[list(indices)]


def _slices(scores: torch.Tensor) -> list[slice]:
    return [slice(part[0], part[-1] + 1) for part in _parts(range(len(scores)), scores.shape[1], scores.device)]


def _parts(indices: Sequence[int], width: int, device: torch.device) -> list[Sequence[int]]:
    """Returns rows in parts whose scores are computed with at once."""
    step = max((CPU_BLOCK if device.type == "cpu" else BLOCK) // width, 1)
    return [indices[start : start + step] for start in range(0, len(indices), step)]


def _gumbel(noise: torch.Tensor) -> torch.Tensor:
    return noise.log_().neg_().log_().neg_()


def _noise(starts: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Returns numbers in (0, 1) for columns, [rows or 1, n] int64, of each row; float64 [rows, n]."""
    bits = _mix(starts[:, None] + columns * _GOLDEN)
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


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]
