"""Partitions between every pair of services: refused, half-open, one-way; of one link, or of all of a service."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from functools import partial

import grpc

from tests.chaos.faults.site import Fault, NotNowError, Site
from tests.chaos.links import KINDS
from tests.chaos.proxy import Relay
from tests.e2e.observe import leader

__all__ = ["FAULTS"]

MOST_S = 10.0
WAYS = ("cut", "refused", "half-open", "one-way there", "one-way back")
AFTERMATH_S = {
    "gateway to scheduler": 5.0,
    "worker to scheduler": 5.0,
    "workers to gateway": 5.0,
    "workers to worker": 0.0,
    "to store": 5.0,
}


async def _partition(relays: Sequence[Relay], way: str, rng: random.Random) -> None:
    """Breaks links in one way for a while. Then what was held goes on, or is lost with its connections."""
    for relay in relays:
        match way:
            case "cut":
                relay.cut()
            case "refused":
                relay.is_refusing = True
                relay.cut()
            case "half-open" | "one-way back":
                relay.there.clear() if way == "half-open" else None
                relay.back.clear()
            case "one-way there":
                relay.there.clear()
    try:
        if way != "cut":
            await asyncio.sleep(rng.uniform(0.5, MOST_S))
    finally:
        is_lost = rng.random() < 0.5
        for relay in relays:
            if is_lost:
                relay.cut()
            relay.resume()


async def _link(kind: str, way: str, site: Site, rng: random.Random) -> str:
    of_kind = {name: relays for name, relays in site.links.of[kind].items() if name not in site.busy}
    if not of_kind:
        raise NotNowError
    name = rng.choice(sorted(of_kind))
    relays = of_kind[name] if rng.random() < 0.5 else [rng.choice(of_kind[name])]
    with site.hold(name):
        await _partition(relays, way, rng)
    return f"{name}, {len(relays)} of {len(of_kind[name])}"


async def _leader_alone(site: Site, rng: random.Random) -> str:
    """Whoever leads does not reach the store; everybody else does."""
    with contextlib.suppress(AssertionError, grpc.aio.AioRpcError):
        name = await leader(site.stack)
        with site.hold(name):
            way = rng.choice(WAYS[1:])
            await _partition(site.links.of["to store"][name], way, rng)
        return f"{name}, {way}"
    raise NotNowError


async def _store_alone(site: Site, rng: random.Random) -> str:
    """Nobody reaches the store."""
    with site.hold("store"):
        relays = [relay for of_service in site.links.of["to store"].values() for relay in of_service]
        way = rng.choice(WAYS[1:])
        await _partition(relays, way, rng)
    return way


FAULTS = (
    *(
        Fault(f"{kind}: {way}", 1, partial(_link, kind, way), aftermath_s=AFTERMATH_S[kind])
        for kind in KINDS
        for way in WAYS
    ),
    Fault("leader to store", 3, _leader_alone, aftermath_s=5),
    Fault("everybody to store", 2, _store_alone, aftermath_s=5),
)
