"""Which of the ways to draw a token (drawing.Race) is used where scores are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from bucketserve.core.errors import EngineError
from bucketserve.engine.drawing import Race, noise_starts, race
from bucketserve.engine.native.compiler import KernelBuildError
from bucketserve.engine.native.kernels import Kernels, load_kernels

__all__ = ["race_of", "race_on"]

TRIAL = (4, 3000)
"""Rows and tokens that a kernel is tried with."""


def race_of(
    kernels: Kernels | None,
    device: torch.device,
    *,
    is_by_triton: bool,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Race:
    """Returns the race of the CPU kernels, or of Triton's on a CUDA device, or torch's where there are neither.

    Triton's is compiled here, and compared with torch's; if that fails, on_progress is told, and it is not used.
    """
    if kernels is not None:
        return kernels.race
    if not is_by_triton:
        return race
    try:
        from bucketserve.engine.cuda.race import race as cuda_race

        for dtype in (torch.float32, torch.float64):
            scores = torch.randn(TRIAL, generator=torch.Generator().manual_seed(1)).to(device, dtype)
            temperatures = torch.ones(TRIAL[0], 1, dtype=torch.float64, device=device)
            starts = noise_starts(range(TRIAL[0]), range(TRIAL[0])).to(device)
            if not torch.equal(cuda_race(scores, temperatures, starts), race(scores, temperatures, starts)):
                raise EngineError("its tokens differ from torch's")
    except Exception as error:  # of Triton, or of the compiler
        on_progress(f"drawing tokens without Triton's kernel: {type(error).__name__}: {error}")
        return race
    return cuda_race


def race_on(device: torch.device) -> Race:
    """Returns the fastest race on a device; compiles the CPU kernels if need be, and does without if that fails."""
    kernels = None
    if device.type == "cpu":
        with contextlib.suppress(KernelBuildError):
            kernels = load_kernels()
    return race_of(kernels, device, is_by_triton=device.type == "cuda")
