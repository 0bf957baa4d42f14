"""Clients that know what they must get, count what they got, and look at the time."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import grpc

from bucketserve.client import BucketServeClient, Chunk, Finished, Started
from bucketserve.core.errors import BucketServeError, DeadlineError, OverloadedError, UnavailableError
from bucketserve.v1 import common_pb2
from tests.chaos.oracle import Oracle, Request

__all__ = ["Load", "Tally", "Wait"]

LONG_WAIT_S = 15.0
"""Nothing may wait for longer without a fault that lasted as long."""
SHARED_LABELS = 4
"""Labels that clients of all gateways use at the same time."""


@dataclass(frozen=True)
class Wait:
    """The longest time in which a request heard nothing, from its submission on; monotonic times in seconds."""

    began_s: float
    ended_s: float
    what: str

    @property
    def length_s(self) -> float:
        """How long."""
        return self.ended_s - self.began_s


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
    kinds: Counter[str] = field(default_factory=Counter)
    deadlines: Counter[str] = field(default_factory=Counter)
    """Deadlines that passed, by how far the request had come."""
    refused: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    """Accepted, but ended in none of the ways above."""
    latencies_s: list[float] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    """A request, and how its client behaves."""

    request: Request
    label: str = ""
    is_batch: bool = False
    leaves_after: int | None = None
    """Tokens after which the client goes away."""
    timeout_s: float | None = None


class Load:
    """A number of clients, each with one request at a time, until they are told to stop."""

    def __init__(
        self,
        gateways: list[str],
        oracle: Oracle,
        tally: Tally,
        seed: int,
        was_killed: Callable[[str, float, float], bool],
    ) -> None:
        """was_killed(gateway address, from, to): whether that gateway died between two monotonic times."""
        self._gateways = gateways
        self._oracle = oracle
        self._tally = tally
        self._seed = seed
        self._was_killed = was_killed
        self._is_over = False

    async def run(self, num_clients: int) -> None:
        """Runs the clients until stop()."""
        async with asyncio.TaskGroup() as tasks:
            for index in range(num_clients):
                tasks.create_task(self._client(index))

    def stop(self) -> None:
        """Lets the clients finish what they have and end."""
        self._is_over = True

    async def _client(self, index: int) -> None:
        rng = random.Random(f"{self._seed}/{index}")
        async with contextlib.AsyncExitStack() as stack:
            clients = {a: await stack.enter_async_context(BucketServeClient(a)) for a in self._gateways}
            while not self._is_over:
                for plan in self._plans(rng, f"client-{index}"):
                    address = rng.choice(self._gateways)
                    await self._one(plan, clients[address], address)
                await asyncio.sleep(rng.uniform(0, 0.2))

    def _plans(self, rng: random.Random, own_label: str) -> list[_Plan]:
        """Draws what a client does next: one request, or two that follow at once."""
        kind = rng.choices(*zip(*KINDS.items(), strict=True))[0]
        self._tally.kinds[kind] += 1
        plan = _Plan(self._oracle.request(rng, is_long=kind == "deadline in prefill"), is_batch=rng.random() < 0.3)
        leaves_after = rng.randrange(0, plan.request.max_tokens)
        match kind:
            case "goes away":
                return [replace(plan, leaves_after=leaves_after)]
            case "cancels and uses its label again":
                again = _Plan(self._oracle.request(rng), own_label)
                return [replace(plan, label=own_label, leaves_after=leaves_after), again]
            case "label in use elsewhere":
                return [replace(plan, label=f"shared-{rng.randrange(SHARED_LABELS)}")]
            case "label used before":
                return [replace(plan, label=own_label)]
            case "deadline in the queue":
                return [replace(plan, timeout_s=rng.uniform(0.001, 0.03))]
            case "deadline in prefill":
                return [replace(plan, timeout_s=rng.uniform(0.02, 0.15))]
            case "deadline in decode":
                return [replace(plan, timeout_s=rng.uniform(0.1, 1.2))]
        return [plan]

    async def _one(self, plan: _Plan, client: BucketServeClient, address: str) -> None:
        """Sends one request and books how it ended."""
        tally, request = self._tally, plan.request
        heard = _Heard(time.monotonic())
        tally.sent += 1
        try:
            await self._follow(plan, client, heard)
        except DeadlineError:
            tally.cancelled += heard.is_accepted
            tally.deadlines[heard.phase] += 1
            if not heard.is_accepted:
                tally.refused["DEADLINE"] += 1
        except (BucketServeError, grpc.aio.AioRpcError) as error:
            self._failed(error, heard, address)
        else:
            self._ended(plan, heard)
        heard.now("its end")
        tally.waits.append(heard.longest)
        if not any(heard.tokens == right[: len(heard.tokens)] for right in self._oracle.outputs(request)):
            tally.mismatched += 1

    async def _follow(self, plan: _Plan, client: BucketServeClient, heard: _Heard) -> None:
        request = plan.request
        async with contextlib.aclosing(
            client.generate(
                token_ids=request.prompt,
                max_tokens=request.max_tokens,
                ignore_eos=True,
                request_id=plan.label,
                is_batch=plan.is_batch,
                sampling=common_pb2.SamplingParams(temperature=request.temperature, seed=request.seed),
                timeout_s=plan.timeout_s,
            )
        ) as events:
            async for event in events:
                if isinstance(event, Started):
                    heard.now("acceptance")
                    heard.is_accepted = True
                    self._tally.accepted += 1
                elif isinstance(event, Chunk):
                    heard.now(f"token {len(heard.tokens)}")
                    heard.tokens += event.token_ids
                elif isinstance(event, Finished):
                    heard.ends += 1
                    self._tally.resumed += event.attempts > 1
                if plan.leaves_after is not None and len(heard.tokens) >= plan.leaves_after and heard.is_accepted:
                    break

    def _ended(self, plan: _Plan, heard: _Heard) -> None:
        tally, wanted = self._tally, plan.request.max_tokens
        if plan.leaves_after is not None and not heard.ends:
            tally.cancelled += 1
        elif heard.ends == 1:
            tally.completed += 1
            tally.latencies_s.append(time.monotonic() - heard.start_s)
            if len(heard.tokens) != wanted:
                tally.lost.append(f"{len(heard.tokens)} of {wanted} tokens")
        else:
            tally.duplicates += heard.ends > 1
            tally.lost.append(f"{heard.ends} ends")

    def _failed(self, error: BucketServeError | grpc.aio.AioRpcError, heard: _Heard, address: str) -> None:
        reason = error.reason if isinstance(error, BucketServeError) else error.code().name
        was_killed = self._was_killed(address, heard.start_s, time.monotonic())
        if was_killed and reason in ("UNAVAILABLE", "CANCELLED", "UNKNOWN"):
            if heard.is_accepted:
                self._tally.cut += 1
            else:
                self._tally.refused["gateway killed"] += 1
        elif not heard.is_accepted and isinstance(error, OverloadedError | UnavailableError):
            self._tally.refused[reason] += 1
        else:
            which = "accepted" if heard.is_accepted else "not accepted"
            clock = time.strftime("%H:%M:%S")
            self._tally.lost.append(f"{clock} {which}, {len(heard.tokens)} tokens: {reason}: {error}")


KINDS = {
    "ordinary": 60,
    "goes away": 7,
    "cancels and uses its label again": 5,
    "label in use elsewhere": 8,
    "label used before": 8,
    "deadline in the queue": 3,
    "deadline in prefill": 3,
    "deadline in decode": 6,
}
"""How clients behave, and how often."""


class _Heard:
    """What a request has heard so far."""

    def __init__(self, start_s: float) -> None:
        self.start_s = self._last_s = start_s
        self.is_accepted = False
        self.tokens: list[int] = []
        self.ends = 0
        self.longest = Wait(start_s, start_s, "")

    def now(self, what: str) -> None:
        """Something has come."""
        now_s = time.monotonic()
        if now_s - self._last_s > self.longest.length_s:
            self.longest = Wait(self._last_s, now_s, what)
        self._last_s = now_s

    @property
    def phase(self) -> str:
        """How far it has come."""
        if not self.is_accepted:
            return "before it was queued"
        return "while tokens came" if self.tokens else "before the first token"
