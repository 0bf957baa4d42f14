"""Clients that know what they must get, and count what they got."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from bucketserve.client import BucketServeClient, Chunk, Finished, Started
from bucketserve.core.errors import BucketServeError, DeadlineError, OverloadedError, UnavailableError
from bucketserve.v1 import common_pb2
from tests.chaos.oracle import expected_tokens

__all__ = ["Load", "Tally"]

IMPATIENT, SHORT_DEADLINE = 0.08, 0.04
"""Shares of requests whose client goes away half-way, or sets a deadline that is too short."""


@dataclass
class Tally:
    """What became of the requests."""

    sent: int = 0
    accepted: int = 0
    completed: int = 0
    cancelled: int = 0
    """By their client: it went away, or its deadline passed."""
    cut: int = 0
    """With their gateway, which was killed."""
    resumed: int = 0
    """Completed in more than one attempt."""
    mismatched: int = 0
    duplicates: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    """Accepted, but ended in none of the ways above."""
    latencies_s: list[float] = field(default_factory=list)


class Load:
    """A number of clients, each with one request at a time, until they are told to stop."""

    def __init__(
        self, gateways: list[str], tally: Tally, seed: int, was_killed: Callable[[str, float, float], bool]
    ) -> None:
        """was_killed(gateway address, from, to): whether that gateway died between two monotonic times."""
        self._gateways = gateways
        self._tally = tally
        self._seed = seed
        self._was_killed = was_killed
        self._is_over = False

    async def run(self, num_clients: int) -> None:
        """Runs the clients until stop()."""
        async with asyncio.TaskGroup() as tasks:
            for index in range(num_clients):
                tasks.create_task(self._client(random.Random(f"{self._seed}/{index}")))

    def stop(self) -> None:
        """Lets the clients finish what they have and end."""
        self._is_over = True

    async def _client(self, rng: random.Random) -> None:
        async with contextlib.AsyncExitStack() as stack:
            clients = {a: await stack.enter_async_context(BucketServeClient(a)) for a in self._gateways}
            while not self._is_over:
                address = rng.choice(self._gateways)
                await self._one(rng, clients[address], address)
                await asyncio.sleep(rng.uniform(0, 0.2))

    async def _one(self, rng: random.Random, client: BucketServeClient, address: str) -> None:  # noqa: PLR0912
        """Sends one request and books how it ended."""
        length = min(max(int(rng.lognormvariate(3.5, 1.0)), 1), 900)
        prompt = [rng.randrange(2, 250) for _ in range(length)]
        max_tokens = rng.randrange(1, 150)
        temperature, seed = (0.7, rng.randrange(1 << 30)) if rng.random() < 0.3 else (0.0, 0)
        kind = rng.random()
        leaves_after = rng.randrange(0, max_tokens) if kind < IMPATIENT else None
        timeout_s = rng.uniform(0.05, 0.5) if IMPATIENT <= kind < IMPATIENT + SHORT_DEADLINE else None
        tally, start_s, is_accepted, tokens, ends = self._tally, time.monotonic(), False, list[int](), 0
        tally.sent += 1
        try:
            async with contextlib.aclosing(
                client.generate(
                    token_ids=prompt,
                    max_tokens=max_tokens,
                    ignore_eos=True,
                    is_batch=rng.random() < 0.3,
                    sampling=common_pb2.SamplingParams(temperature=temperature, seed=seed),
                    timeout_s=timeout_s,
                )
            ) as events:
                async for event in events:
                    if isinstance(event, Started):
                        is_accepted = True
                        tally.accepted += 1
                    elif isinstance(event, Chunk):
                        tokens += event.token_ids
                    elif isinstance(event, Finished):
                        ends += 1
                        tally.resumed += event.attempts > 1
                    if leaves_after is not None and len(tokens) >= leaves_after and is_accepted:
                        break
        except DeadlineError:
            tally.cancelled += is_accepted
            if not is_accepted:
                tally.refused["DEADLINE"] += 1
        except (BucketServeError, grpc.aio.AioRpcError) as error:
            self._failed(error, is_accepted, address, start_s)
        else:
            if leaves_after is not None and not ends:
                tally.cancelled += 1
            elif ends == 1:
                tally.completed += 1
                tally.latencies_s.append(time.monotonic() - start_s)
                if len(tokens) != max_tokens:
                    tally.lost.append(f"{len(tokens)} of {max_tokens} tokens")
            else:
                tally.duplicates += ends > 1
                tally.lost.append(f"{ends} ends")
        wanted = expected_tokens(prompt, max_tokens, temperature, seed)
        if tokens != wanted[: len(tokens)]:
            tally.mismatched += 1

    def _failed(
        self, error: BucketServeError | grpc.aio.AioRpcError, is_accepted: bool, address: str, start_s: float
    ) -> None:
        reason = error.reason if isinstance(error, BucketServeError) else error.code().name
        if self._was_killed(address, start_s, time.monotonic()) and reason in ("UNAVAILABLE", "CANCELLED", "UNKNOWN"):
            if is_accepted:
                self._tally.cut += 1
            else:
                self._tally.refused["gateway killed"] += 1
        elif not is_accepted and isinstance(error, OverloadedError | UnavailableError):
            self._tally.refused[reason] += 1
        else:
            self._tally.lost.append(f"{'accepted' if is_accepted else 'not accepted'}: {reason}: {error}")
