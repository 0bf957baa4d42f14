"""A seeded schedule of faults against a live stack. Each one is undone after a while; two may overlap."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import redis.asyncio as aioredis

from bucketserve.store.embedded import EmbeddedServer
from bucketserve_cli.stack import LocalStack
from tests.chaos.proxy import Relay

__all__ = ["Faults"]


class Faults:
    """Knows every way to hurt a stack."""

    def __init__(self, stack: LocalStack, store: EmbeddedServer, relays: list[Relay], seed: int) -> None:
        """Does nothing yet."""
        self._stack = stack
        self._store = store
        self._relays = relays
        self._rng = random.Random(seed)
        self._busy: set[str] = set()
        self.injected: Counter[str] = Counter()
        self.kills: list[tuple[str, float]] = []
        """(service, monotonic time) of each process killed."""
        self.log: list[str] = []
        workers, gateways = stack.worker_names(), [n for n in stack.services if n.startswith("gateway")]
        schedulers = [name for name in stack.services if name.startswith("scheduler")]
        self._menu: list[tuple[str, int, Callable[[], Awaitable[bool]]]] = [
            ("worker killed", 4, lambda: self._kill(workers)),
            ("worker paused", 3, lambda: self._pause(workers, 9.0)),
            ("worker drained", 2, lambda: self._drain(workers)),
            ("scheduler killed", 3, lambda: self._kill(schedulers)),
            ("scheduler paused", 2, lambda: self._pause(schedulers, 6.0)),
            ("scheduler drained", 1, lambda: self._drain(schedulers)),
            ("gateway killed", 2, lambda: self._kill(gateways)),
            ("gateway drained", 1, lambda: self._drain(gateways)),
            ("connections cut", 3, self._cut),
            ("store restarted with its data", 2, self._restart_store),
            ("store wiped", 1, self._wipe_store),
            ("store paused", 2, self._pause_store),
            ("store connections cut", 1, self._cut_store),
        ]

    def was_killed(self, gateway_address: str, from_s: float, to_s: float) -> bool:
        """Whether the gateway at that address ended between two monotonic times."""
        index = self._stack.gateway_addresses.index(gateway_address)
        name = f"gateway-{index}" if index else "gateway"
        return any(killed == name and from_s - 1.0 <= at_s <= to_s + 1.0 for killed, at_s in self.kills)

    async def run(self, until_s: float) -> None:
        """Injects faults until that monotonic time; returns when all of them are undone."""
        weights = [weight for _, weight, _ in self._menu]
        async with asyncio.TaskGroup() as tasks:
            while (now_s := time.monotonic()) < until_s:
                await asyncio.sleep(min(self._rng.uniform(1.0, 5.0), until_s - now_s))
                if len(self._busy) < 2:
                    name, _, inject = self._rng.choices(self._menu, weights)[0]
                    tasks.create_task(self._inject(name, inject))

    async def _inject(self, name: str, inject: Callable[[], Awaitable[bool]]) -> None:
        self.log.append(f"{time.strftime('%H:%M:%S')} {name}")
        if await inject():
            self.injected[name] += 1

    @contextlib.asynccontextmanager
    async def _one_of(self, names: list[str]):
        """Yields a service that no other fault has in hand, or None. At least one of a kind is left alone."""
        free = [name for name in names if name not in self._busy]
        if len(names) - len(free) >= len(names) - 1:
            yield None
            return
        name = self._rng.choice(free)
        self._busy.add(name)
        try:
            self.log[-1] += f": {name}"
            yield name
        finally:
            self._busy.discard(name)

    async def _kill(self, names: list[str]) -> bool:
        async with self._one_of(names) as name:
            if name is None:
                return False
            # Noted first: its clients may be told before we go on.
            self.kills.append((name, time.monotonic()))
            self._stack.services[name].signal(signal.SIGKILL)
            await asyncio.to_thread(self._stack.services[name].wait, 10)
            await asyncio.sleep(self._rng.uniform(0, 4))
            await self._start_again(name)
            return True

    async def _drain(self, names: list[str]) -> bool:
        """SIGTERM: finishes what it has and goes."""
        async with self._one_of(names) as name:
            if name is None:
                return False
            self._stack.services[name].signal(signal.SIGTERM)
            await asyncio.to_thread(self._stack.services[name].wait, 40)
            await self._start_again(name)
            return True

    async def _start_again(self, name: str) -> None:
        service = self._stack.restart(name)
        while not await asyncio.to_thread(self._stack.is_serving, name):
            if service.exit_status is not None:
                raise RuntimeError(f"{name} ended with status {service.exit_status}:\n{service.log_tail()}")
            await asyncio.sleep(0.1)

    async def _pause(self, names: list[str], most_s: float) -> bool:
        async with self._one_of(names) as name:
            if name is None:
                return False
            self._stack.services[name].signal(signal.SIGSTOP)
            await asyncio.sleep(self._rng.uniform(0.5, most_s))
            self._stack.services[name].signal(signal.SIGCONT)
            return True

    async def _cut(self) -> bool:
        return self._rng.choice(self._relays).cut() > 0

    @contextlib.asynccontextmanager
    async def _store_in_hand(self):
        if "store" in self._busy:
            yield False
            return
        self._busy.add("store")
        try:
            yield True
        finally:
            self._busy.discard("store")

    async def _restart_store(self) -> bool:
        async with self._store_in_hand() as is_ours:
            if is_ours:
                await asyncio.to_thread(self._store.kill)
                await asyncio.sleep(self._rng.uniform(0, 8))
                await asyncio.to_thread(self._store.start)
            return is_ours

    async def _wipe_store(self) -> bool:
        async with self._store_in_hand() as is_ours:
            if is_ours:
                client = aioredis.from_url(self._store.url)
                await client.flushall()
                await client.aclose()
            return is_ours

    async def _pause_store(self) -> bool:
        async with self._store_in_hand() as is_ours:
            if is_ours:
                os.kill(self._store.pid, signal.SIGSTOP)
                await asyncio.sleep(self._rng.uniform(0.5, 10))
                os.kill(self._store.pid, signal.SIGCONT)
            return is_ours

    async def _cut_store(self) -> bool:
        async with self._store_in_hand() as is_ours:
            if is_ours:
                client = aioredis.from_url(self._store.url)
                await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await client.aclose()
            return is_ours
