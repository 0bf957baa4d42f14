"""Which workers a simulated cluster has: how many, in which roles, on how many devices each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bucketserve.core.types import WorkerId, WorkerRole
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.latency import CostMode, DeviceModel
from bucketserve.sim.sequence import WorkerMode, WorkerSpec

__all__ = ["WorkerGroup", "aggregated", "build_workers", "layout_name", "parse_cluster", "splits"]

_PART = re.compile(r"(?P<number>\d+)\s*x?\s*(?P<role>prefill|decode|both|p|d|b)(/tp(?P<devices>\d+))?")
_ROLES = {"p": WorkerRole.PREFILL, "d": WorkerRole.DECODE, "b": WorkerRole.BOTH}


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Equal workers."""

    number: int
    role: WorkerRole
    devices: int = 1
    """Devices per worker (tensor parallelism)."""


def parse_cluster(text: str) -> tuple[WorkerGroup, ...]:
    """Returns the groups of e.g. `2xprefill+2xdecode`, `4xboth`, `2p2d` or `1xprefill/tp2+1xdecode/tp2`.

    Raises:
        SimulationError: the text is none of these, or has prefill without decode or the reverse.
    """
    groups: list[WorkerGroup] = []
    at = 0
    while at < len(text):
        match = _PART.match(text, at)
        if match is None or int(match["number"]) < 1:
            raise SimulationError(f"cluster {text!r}: expected e.g. 2xprefill+2xdecode, 4xboth or 2p2d")
        groups.append(WorkerGroup(int(match["number"]), _ROLES[match["role"][0]], int(match["devices"] or 1)))
        at = match.end() + (text[match.end() : match.end() + 1] in ("+", ","))
    check_groups(groups)
    return tuple(groups)


def check_groups(groups: Sequence[WorkerGroup]) -> None:
    """Raises SimulationError unless every prompt can be prefilled and every prefilled one decoded somewhere."""
    roles = {group.role for group in groups}
    if WorkerRole.BOTH not in roles and roles != {WorkerRole.PREFILL, WorkerRole.DECODE}:
        raise SimulationError("a cluster needs workers of role both, or of both prefill and decode")
    if WorkerRole.PREFILL in roles and WorkerRole.DECODE not in roles:
        raise SimulationError("prefill workers need decode workers to hand over to")


def layout_name(groups: Sequence[WorkerGroup]) -> str:
    """Returns the text that parse_cluster reads."""
    return "+".join(
        f"{group.number}x{group.role.value}" + (f"/tp{group.devices}" if group.devices > 1 else "") for group in groups
    )


def splits(num_workers: int, devices: int = 1) -> list[tuple[WorkerGroup, ...]]:
    """Returns every split of that many workers into prefill and decode."""
    return [
        (
            WorkerGroup(num_prefill, WorkerRole.PREFILL, devices),
            WorkerGroup(num_workers - num_prefill, WorkerRole.DECODE, devices),
        )
        for num_prefill in range(1, num_workers)
    ]


def aggregated(num_workers: int, devices: int = 1) -> tuple[WorkerGroup, ...]:
    """Returns that many workers that do both."""
    return (WorkerGroup(num_workers, WorkerRole.BOTH, devices),)


def build_workers(
    groups: Sequence[WorkerGroup], device: DeviceModel, cost: CostMode, mode: WorkerMode
) -> list[WorkerSpec]:
    """Returns a spec per worker.

    Raises:
        SimulationError: the device model has no figures for a group's parallelism.
    """
    specs: list[WorkerSpec] = []
    for group in groups:
        if group.devices not in device.latency:
            raise SimulationError(f"{device.name} has no figures for {group.devices} devices per worker")
        for _ in range(group.number):
            specs.append(
                WorkerSpec(
                    worker_id=WorkerId(f"{group.role.value[0]}{len(specs):04d}"),
                    role=group.role,
                    latency=device.latency[group.devices],
                    kv_total_tokens=device.kv_total_tokens[group.devices],
                    cost=cost,
                    mode=mode,
                )
            )
    return specs
