"""What a policy is to the simulator: how to build it, what it asks of its workers, which layouts it is tried on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bucketserve.core.settings import CoreSettings
from bucketserve.core.types import RequestId
from bucketserve.sim.cluster import WorkerGroup, aggregated, splits
from bucketserve.sim.driver import Policy
from bucketserve.sim.sequence import WorkerMode
from bucketserve.sim.workload import SimRequest

__all__ = ["STEP_SIZES", "Layout", "PolicyContext", "PolicySpec", "apart", "either", "together"]

Layout = tuple[WorkerGroup, ...]

STEP_SIZES = (256, 512, 1024, 2048, 4096)
"""Tokens per step among which a rival's best on a device is searched (sim/operators.py)."""


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy may be built from."""

    context_tokens: int
    seed: int
    drawn: Callable[[RequestId], SimRequest]
    """The request as it was drawn, for simulated output predictors and for its prompt's block hashes."""


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A policy that can be simulated."""

    name: str
    summary: str
    build: Callable[[PolicyContext], Policy]
    mode: WorkerMode
    layouts: Callable[[int, int], Sequence[Layout]]
    """(workers, devices per worker) -> splits into roles to choose the best of."""
    settings: CoreSettings | None = None
    """Of the production core; None for a policy that is not it."""
    sized: Callable[[int], PolicySpec] | None = None
    """The same with so many tokens per step; None: it has no such choice, or what is served is fixed."""


def together(num_workers: int, devices: int) -> Sequence[Layout]:
    """Returns the layout in which every worker does both prefill and decode."""
    return [aggregated(num_workers, devices)]


def apart(num_workers: int, devices: int) -> Sequence[Layout]:
    """Returns every split into prefill and decode workers."""
    return splits(num_workers, devices)


def either(num_workers: int, devices: int) -> Sequence[Layout]:
    """Returns both."""
    return [*together(num_workers, devices), *apart(num_workers, devices)]
