"""Draws of tokens on a CUDA device, in one kernel."""

from __future__ import annotations

import torch

from bucketserve.engine.cuda import kernels

__all__ = ["race"]

BLOCK = 2048
WARPS = 8


def race(scores: torch.Tensor, temperatures: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Returns the winner of each row; see drawing.race."""
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    rows, size = scores.shape
    winners = torch.empty(rows, dtype=torch.int64, device=scores.device)
    kernels.race[(rows,)](
        scores,
        scores.amax(dim=-1),
        temperatures.contiguous(),
        starts.contiguous(),
        winners,
        scores.stride(0),
        size,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return winners
