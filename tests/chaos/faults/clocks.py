"""Wall clocks that are set: of a service, or of the store."""

from __future__ import annotations

import asyncio
import random
from functools import partial

from tests.chaos.faults.site import Fault, NotNowError, Site

__all__ = ["FAULTS"]

LEAST_S, MOST_S = 30.0, 3600.0


async def _step(kind: str, site: Site, rng: random.Random) -> str:
    """Puts a clock ahead or back for a while."""
    if site.clocks is None:
        raise NotNowError
    name = "store" if kind == "store" else rng.choice(site.services(kind))
    with site.hold(f"clock of {name}"):
        offset_s = rng.choice((-1, 1)) * rng.uniform(LEAST_S, MOST_S)
        site.clocks.step(name, offset_s)
        await asyncio.sleep(rng.uniform(1, 12))
        site.clocks.step(name, 0.0)
    return f"{name}, {offset_s:+.0f} s"


FAULTS = tuple(
    Fault(f"{kind}'s clock stepped", 1, partial(_step, kind), aftermath_s=5 if kind == "store" else 0)
    for kind in ("gateway", "scheduler", "worker", "store")
)
