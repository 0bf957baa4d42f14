"""Where faults happen: the stack with all that it stands on, and who has which part of it in hand."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import redis.asyncio as aioredis

from bucketserve.store.embedded import EmbeddedServer
from bucketserve_cli.stack import LocalStack
from tests.chaos.clocks import Clocks
from tests.chaos.links import Links

__all__ = ["Fault", "Interval", "NotNowError", "Site"]


class NotNowError(Exception):
    """What the fault would hurt is in hand of another one, or not there."""


@dataclass(frozen=True)
class Fault:
    """A way to hurt a stack."""

    name: str
    weight: int
    """How often it comes, among the others."""
    inject: Callable[[Site, random.Random], Awaitable[str]]
    """Hurts, waits, and returns what it hurt once it is undone.

    Raises:
        NotNowError: nothing was done.
    """
    aftermath_s: float = 0.0
    """How much longer a request may wait: leases and limits that begin to run with the fault or end after it."""


@dataclass
class Interval:
    """A fault as it happened; monotonic times in seconds."""

    fault: str
    began_s: float
    aftermath_s: float
    at: str = ""
    """What it hurt."""
    ended_s: float = float("inf")


@dataclass
class Site:
    """The stack, what it stands on, and what is in hand."""

    stack: LocalStack
    store: EmbeddedServer
    links: Links
    clocks: Clocks | None
    """None where there is no compiler."""
    orders: Path
    """Folder with the orders for engines, see tests/chaos/worker.py."""
    kills: list[tuple[str, float]] = field(default_factory=list)
    """(service, monotonic time) of each process killed."""
    busy: set[str] = field(default_factory=set)
    weights: str = "old"
    """What workers serve, or change to."""

    def services(self, kind: str) -> list[str]:
        """Names of the services of a kind."""
        return [name for name in self.stack.services if name.partition("-")[0] == kind]

    def workers_of(self, role: str) -> list[str]:
        """Names of the workers of a role."""
        return [f"worker-{index}" for index, its in enumerate(self.stack.spec.worker_roles) if its == role]

    @contextlib.contextmanager
    def hold(self, *names: str):
        """Keeps other faults from some services, or from the store.

        Raises:
            NotNowError: another one has one of them.
        """
        if self.busy & set(names):
            raise NotNowError
        self.busy.update(names)
        try:
            yield
        finally:
            self.busy.difference_update(names)

    @contextlib.contextmanager
    def hold_one(self, kind: str, rng: random.Random, among: Sequence[str] = ()):
        """Yields a service that no other fault has in hand. At least one of a kind is left alone.

        Raises:
            NotNowError: there is none.
        """
        names = self.services(kind)
        free = [name for name in names if name not in self.busy]
        choice = [name for name in free if name in among] if among else free
        if len(free) < 2 or not choice:
            raise NotNowError
        name = rng.choice(choice)
        with self.hold(name):
            yield name

    async def start_again(self, name: str) -> None:
        """Starts a service that has ended; returns once it serves."""
        service = self.stack.restart(name)
        while not await asyncio.to_thread(self.stack.is_serving, name):
            if service.exit_status is not None:
                raise RuntimeError(f"{name} ended with status {service.exit_status}:\n{service.log_tail()}")
            await asyncio.sleep(0.1)

    async def ended(self, name: str, timeout_s: float) -> None:
        """Returns once a service has ended by itself.

        Raises:
            RuntimeError: it has not within timeout_s.
        """
        deadline_s = time.monotonic() + timeout_s
        while self.stack.services[name].exit_status is None:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{name} goes on:\n{self.stack.services[name].log_tail()}")
            await asyncio.sleep(0.1)

    @contextlib.asynccontextmanager
    async def store_client(self) -> AsyncIterator[aioredis.Redis]:
        """A connection of our own to the store."""
        client = aioredis.from_url(self.store.url)
        try:
            yield client
        finally:
            await client.aclose()
