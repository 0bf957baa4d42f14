"""Errors of the simulator."""

from __future__ import annotations

from bucketserve.core.errors import BucketServeError

__all__ = ["SimulationError"]


class SimulationError(BucketServeError):
    """A policy or an input broke a rule of the simulated world: the result would mean nothing."""

    reason = "SIMULATION"
