"""What happens to the store: it ends, hangs, forgets, is full."""

from __future__ import annotations

import asyncio
import os
import random
import signal

from tests.chaos.faults.site import Fault, NotNowError, Site

__all__ = ["FAULTS"]


async def _restart(site: Site, rng: random.Random) -> str:
    with site.hold("store"):
        await asyncio.to_thread(site.store.kill)
        await asyncio.sleep(rng.uniform(0, 8))
        await asyncio.to_thread(site.store.start)
    return "store"


async def _wipe(site: Site, rng: random.Random) -> str:
    with site.hold("store"):
        async with site.store_client() as client:
            await client.flushall()
    return "store"


async def _evict(site: Site, rng: random.Random) -> str:
    """Some keys of a queue are gone, as with a policy that evicts."""
    with site.hold("store"):
        async with site.store_client() as client:
            keys = sorted([key async for key in client.scan_iter("bs:*") if b"/jobs}" not in key and b"/" in key])
            if not keys:
                raise NotNowError
            evicted = rng.sample(keys, rng.randint(1, min(3, len(keys))))
            await client.delete(*evicted)
    return b" ".join(evicted).decode()


async def _pause(site: Site, rng: random.Random) -> str:
    with site.hold("store"):
        os.kill(site.store.pid, signal.SIGSTOP)
        await asyncio.sleep(rng.uniform(0.5, 10))
        os.kill(site.store.pid, signal.SIGCONT)
    return "store"


async def _cut(site: Site, rng: random.Random) -> str:
    with site.hold("store"):
        async with site.store_client() as client:
            await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    return "store"


async def _fill(site: Site, rng: random.Random) -> str:
    """Reaches maxmemory, under a policy that evicts nothing."""
    with site.hold("store"):
        async with site.store_client() as client:
            used = (await client.info("memory"))["used_memory"]
            await client.config_set("maxmemory", used // 2)
            try:
                await asyncio.sleep(rng.uniform(0.5, 8))
            finally:
                await client.config_set("maxmemory", 0)
    return "store"


FAULTS = (
    Fault("store restarted with its data", 2, _restart, aftermath_s=5),
    Fault("store wiped", 1, _wipe, aftermath_s=5),
    Fault("store's keys evicted", 2, _evict, aftermath_s=5),
    Fault("store paused", 2, _pause, aftermath_s=5),
    Fault("store's connections cut", 1, _cut, aftermath_s=5),
    Fault("store full", 2, _fill, aftermath_s=2),
)
