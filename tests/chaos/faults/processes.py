"""Processes that end, hang or are told to go."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from functools import partial

from tests.chaos.faults.site import Fault, Site

__all__ = ["FAULTS"]


async def _kill(kind: str, site: Site, rng: random.Random) -> str:
    with site.hold_one(kind, rng) as name:
        # Noted first: its clients may be told before we go on.
        site.kills.append((name, time.monotonic()))
        site.stack.services[name].signal(signal.SIGKILL)
        await asyncio.to_thread(site.stack.services[name].wait, 10)
        await asyncio.sleep(rng.uniform(0, 4))
        await site.start_again(name)
        return name


async def _pause(kind: str, most_s: float, site: Site, rng: random.Random) -> str:
    with site.hold_one(kind, rng) as name:
        site.stack.services[name].signal(signal.SIGSTOP)
        await asyncio.sleep(rng.uniform(0.5, most_s))
        site.stack.services[name].signal(signal.SIGCONT)
        return name


async def _drain(kind: str, site: Site, rng: random.Random) -> str:
    """SIGTERM: finishes what it has and goes."""
    with site.hold_one(kind, rng) as name:
        site.stack.services[name].signal(signal.SIGTERM)
        await asyncio.to_thread(site.stack.services[name].wait, 40)
        await site.start_again(name)
        return name


FAULTS = (
    Fault("worker killed", 4, partial(_kill, "worker"), aftermath_s=4),
    Fault("worker paused", 3, partial(_pause, "worker", 9.0), aftermath_s=4),
    Fault("worker drained", 2, partial(_drain, "worker")),
    Fault("scheduler killed", 3, partial(_kill, "scheduler"), aftermath_s=5),
    Fault("scheduler paused", 2, partial(_pause, "scheduler", 6.0), aftermath_s=5),
    Fault("scheduler drained", 1, partial(_drain, "scheduler")),
    Fault("gateway killed", 2, partial(_kill, "gateway")),
    Fault("gateway drained", 1, partial(_drain, "gateway")),
)
