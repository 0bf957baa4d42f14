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
    """Every worker changes to the other weights, one after the other; both serve meanwhile, and whatever else may fail.

    New weights have come before the last of the old ones go, in either order of their roles. A worker that fails before
    its turn comes back with the weights that it had, as from whoever deploys it, and what has tokens of them goes on.
    Only a worker that is about to leave is not killed as well: nobody starts it with its old weights again, and with
    the last one that computes or decodes for them would go what nobody else can finish.
    """
    prefill, decode = site.workers_of("prefill"), site.workers_of("decode")
    first, last = [prefill[0], decode[0]], [prefill[1], decode[1]]
    rng.shuffle(first)
    rng.shuffle(last)
    with site.hold("weights"):
        weights = "new" if site.weights == "old" else "old"
        with site.hold(first[0]):
            site.weights = weights
            await _change(site, first[0], weights)
        await _change_when_free(site, first[1], weights)
        await asyncio.sleep(rng.uniform(1, 6))
        for name in last:
            await _change_when_free(site, name, weights)
    return f"to {weights}"


async def _change_when_free(site: Site, name: str, weights: str) -> None:
    while name in site.busy:
        await asyncio.sleep(0.1)
    with site.hold(name):
        await _change(site, name, weights)


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
