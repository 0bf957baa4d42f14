"""Engines that fail or hang, and workers that change to other weights while others serve the old ones."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from functools import partial

from tests.chaos.faults.site import Fault, NotNowError, Site
from tests.chaos.worker import STALL_S

__all__ = ["FAULTS"]

OBEYED_S = 4.0
"""A worker that has nothing to do for so long is left in peace."""
HANG_S = 30.0
"""Far more than it takes to notice that an engine hangs."""


async def _order(word: str, role: str, site: Site, rng: random.Random) -> str:
    """Lets an engine fail in a step; a worker that ends with it is started again, as anywhere."""
    with site.hold_one("worker", rng, among=site.workers_of(role)) as name:
        order, draft = site.orders / f"{name}.order", site.orders / f"{name}.draft"
        draft.write_text(word)
        draft.rename(order)
        deadline_s = time.monotonic() + OBEYED_S
        while order.exists():
            if time.monotonic() > deadline_s:
                order.unlink(missing_ok=True)
                raise NotNowError
            await asyncio.sleep(0.05)
        if word in ("raise", "hang"):
            await site.ended(name, HANG_S)
            await site.start_again(name)
        elif word == "stall":
            await asyncio.sleep(STALL_S)
        return name


async def _roll(site: Site, rng: random.Random) -> str:
    """Every worker changes to the other weights, one after the other; both serve meanwhile.

    Decode workers of the old weights go last: whoever has computed a prompt finds one of its own.
    """
    prefill, decode = site.workers_of("prefill"), site.workers_of("decode")
    first = [prefill[0], decode[0]]
    rng.shuffle(first)
    with site.hold("weights"):
        with site.hold(*first):
            site.weights = weights = "new" if site.weights == "old" else "old"
            for name in first:
                await _change(site, name, weights)
        await asyncio.sleep(rng.uniform(1, 6))
        # What has tokens of the old weights can end nowhere else: nothing else may fail while the last of them go.
        while site.busy - {"weights"}:
            await asyncio.sleep(0.1)
        with site.hold("store", *site.stack.services):
            for name in (*prefill[1:], *decode[1:]):
                await _change(site, name, weights)
    return f"to {weights}"


async def _change(site: Site, name: str, weights: str) -> None:
    site.stack.services[name].signal(signal.SIGTERM)
    await asyncio.to_thread(site.stack.services[name].wait, 40)
    (site.orders / f"{name}.weights").write_text(weights)
    await site.start_again(name)


FAULTS = (
    Fault("engine raises", 2, partial(_order, "raise", ""), aftermath_s=1),
    Fault("engine hangs", 2, partial(_order, "hang", ""), aftermath_s=1),
    Fault("engine stalls", 1, partial(_order, "stall", "")),
    Fault("engine fails what runs", 2, partial(_order, "fail", "")),
    Fault("engine refuses KV", 2, partial(_order, "refuse", "decode")),
    Fault("weights rolled", 1, _roll),
)
