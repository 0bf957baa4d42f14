"""Which of the ways to draw a token (drawing.Race) is the fastest where scores are."""

from __future__ import annotations

from bucketserve.engine.drawing import Race, race
from bucketserve.engine.native.kernels import Kernels

__all__ = ["race_of"]


def race_of(kernels: Kernels | None, *, is_by_triton: bool) -> Race:
    """Returns the race of the CPU kernels, or of Triton's on a CUDA device, or torch's where there are neither."""
    if kernels is not None:
        return kernels.race
    if is_by_triton:
        from bucketserve.engine.cuda.race import race as cuda_race

        return cuda_race
    return race
