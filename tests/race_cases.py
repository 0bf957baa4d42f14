"""What every kernel that draws is held against: drawing.race."""

from __future__ import annotations

import math

import torch

from bucketserve.engine.drawing import Race, noise_starts, race

__all__ = ["check_not_finite", "check_race"]


def check_race(kernel: Race, size: int, scale: float, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Twenty rows, some with half of the tokens excluded, at temperatures from none to a hundred; also strided."""
    scores = (scale * torch.randn(20, size)).to(dtype)
    scores[:5, torch.randperm(size)[: size // 2]] = -math.inf
    temperatures = torch.tensor([1.0, 0.7, 3.0, 1e-45, 100.0], dtype=torch.float64).repeat(4)[:, None]
    starts = noise_starts(range(20), range(7, 27))
    wanted = race(scores, temperatures, starts)
    there = [each.to(device) for each in (scores, temperatures, starts)]
    assert torch.equal(kernel(*there).cpu(), wanted), f"{size} {scale} {dtype}"
    assert torch.equal(kernel(*(each[::2] for each in there)).cpu(), wanted[::2]), f"{size} {scale} {dtype}, strided"


def check_not_finite(kernel: Race, device: torch.device | str = "cpu") -> None:
    """Of scores that are not finite some token wins, and one of the vocabulary."""
    for bad in (math.nan, math.inf, -math.inf):
        given = torch.full((2, 100), bad), torch.ones(2, 1, dtype=torch.float64), noise_starts([1, 2], [3, 4])
        assert all(0 <= winner < 100 for winner in kernel(*(each.to(device) for each in given)).tolist())
