"""What must be true when everything is quiet again: nothing left over, nothing executed twice."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import grpc

from bucketserve.client import BucketServeClient, Chunk
from bucketserve.core.settings import CoreSettings
from bucketserve.store.redis import connect
from bucketserve_cli.stack import LocalStack, ServiceProcess
from tests.e2e.observe import eventually, metric, models, status

__all__ = ["Usage", "double_executions", "leaks", "usage", "warm_up"]

TOLERANCE_S = 0.005
"""Logs are written to the millisecond."""
STORE_CONNECTIONS = 128
"""The pool of a client of the store never shrinks, so it is bounded by what was asked at once, not by what is now."""
STORE = "connection to the store, or to whoever collects spans"
PEER_AREA = "KV area of another worker"
UNTRACED = ("traceparent", f"00-{'1' * 32}-{'1' * 16}-00")
"""Says that spans of this request are not wanted."""
WARM_UP_ROUNDS = 5
ESTABLISHED, LISTEN = "01", "0A"
IPV4 = len("0100007F:1F90")

Hops = Callable[[], Mapping[str, str]]
"""Returns whom each end of a relay between services stands for; addresses as the kernel writes them."""


@dataclass(frozen=True)
class Usage:
    """What a service holds: tasks, resident bytes, and open files by what they are."""

    tasks: float
    resident_bytes: float
    files: Counter[str]


def usage(stack: LocalStack, hops: Hops = dict) -> dict[str, Usage]:
    """Returns what each service of a stack holds."""
    # Before anybody is asked: that takes connections.
    files = _open_files(stack, hops)
    return {
        name: Usage(
            metric(stack, name, "process_asyncio_tasks"),
            metric(stack, name, "process_resident_memory_bytes"),
            files[name],
        )
        for name in stack.services
    }


def _open_files(stack: LocalStack, hops: Hops) -> dict[str, Counter[str]]:
    """Open files of each service by kind; connections by the kind of service at their other end."""
    sockets, unix, beyond = _tcp_sockets(), _unix_sockets(), hops()
    links = {name: _links(service) for name, service in stack.services.items()}
    owned = [(sockets[link], _kind(name)) for name in links for link in links[name] if link in sockets]
    served = {local: kind for (local, _, _), kind in owned}
    # Connections to different places may share a local port: only both ends tell whose one is.
    callers = {(local, beyond.get(remote, remote)): kind for (local, remote, _), kind in owned}
    listening = {local for local, _, state in sockets.values() if state == LISTEN}

    def kind(link: str) -> str:
        if link in unix:
            return "unix socket"
        if link not in sockets:
            # A connection that was cut is in no table. Clients of the store notice when they use it next.
            return STORE if link.startswith("socket:") else re.sub(r"pipe:.*", "pipe", link)
        local, remote, state = sockets[link]
        remote = beyond.get(remote, remote)
        if state == LISTEN:
            return "listening"
        if local in listening:
            caller = callers.get((remote, local), "a client")
            return f"connection of {caller}" + ("" if state == ESTABLISHED else ", half-closed")
        return f"connection to {served[remote]}" if remote in served else STORE

    return {name: Counter(map(kind, of_service)) for name, of_service in links.items()}


def _links(service: ServiceProcess) -> list[str]:
    """What a process has open."""
    links = []
    for entry in Path(f"/proc/{service.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            link = str(entry.readlink()).replace(str(service.log_path), "its log")
            links.append(PEER_AREA if link.startswith("/memfd:") and _is_read_only(entry) else link)
    return links


def _is_read_only(entry: Path) -> bool:
    """Whether a descriptor, given by its entry in /proc/PID/fd, was opened for reading alone."""
    fields = dict(line.split(":\t") for line in (entry.parents[1] / "fdinfo" / entry.name).read_text().splitlines())
    return int(fields["flags"], 8) & os.O_ACCMODE == os.O_RDONLY


def _tcp_sockets() -> dict[str, tuple[str, str, str]]:
    """Link of an open file -> local address, remote address and state, as the kernel writes them for IPv4."""
    tables = (Path(f"/proc/net/{name}") for name in ("tcp", "tcp6"))
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return {f"socket:[{row[9]}]": (row[1][-IPV4:], row[2][-IPV4:], row[3]) for row in rows}


def _unix_sockets() -> set[str]:
    """Links of open sockets within this machine."""
    rows = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return {f"socket:[{row[6]}]" for row in rows}


def _kind(name: str) -> str:
    """Kind of the service of that name."""
    return name.partition("-")[0]


async def _reach_all(stack: LocalStack, gateway: str, client: BucketServeClient, hops: Hops) -> None:
    """Sends requests through a gateway until every worker has brought it something.

    Raises:
        TimeoutError: it takes long; those that came first may have ended meanwhile.
    """
    num_prefill = stack.spec.roles.count("prefill")
    # A prefill worker that has done its part is as idle as the others: all of them are given as much as one takes.
    num_tokens = CoreSettings().min_batch_tokens if num_prefill else 1
    async with asyncio.timeout(20), contextlib.AsyncExitStack() as streams:

        async def send(token_id: int) -> None:
            prompt, rest = [token_id] * num_tokens, 400 - num_tokens
            events = client.generate(token_ids=prompt, max_tokens=rest, ignore_eos=True, metadata=[UNTRACED])
            await streams.enter_async_context(contextlib.aclosing(events))
            num_seen = 0
            # The second token comes from a decode worker, if prefill and decode are apart.
            async for event in events:
                num_seen += len(event.token_ids) if isinstance(event, Chunk) else 0
                if num_seen >= 2:
                    break

        # Each stays until all workers have one: who has none is given the next. No two prompts are alike, or who has
        # computed the first would be given the second.
        token_ids = itertools.cycle(range(5, 105))
        while _open_files(stack, hops)[gateway]["connection of worker"] < len(stack.worker_names()):
            await asyncio.gather(*(send(next(token_ids)) for _ in range(num_prefill or 1)))


async def warm_up(stack: LocalStack, hops: Hops = dict) -> dict[str, Usage]:
    """Opens every connection that a stack opens when first needed; returns what its services hold when quiet.

    Raises:
        AssertionError: some worker got nothing of some gateway, or it is not quiet after half a minute.
    """
    for index, address in enumerate(stack.gateway_addresses):
        name = f"gateway-{index}" if index else "gateway"
        key = stack.spec.environ.get("BUCKETSERVE_API_KEY", "")
        async with BucketServeClient(address, tls=stack.deployment.tls, api_key=key) as client:
            for _ in range(WARM_UP_ROUNDS):
                with contextlib.suppress(TimeoutError):
                    await _reach_all(stack, name, client, hops)
                    break
            else:
                raise AssertionError(f"not every worker got something of {name}: {_open_files(stack, hops)[name]}")
    seen: dict[str, Usage] = {}

    async def is_quiet() -> bool:
        """Whether nothing runs, and nothing changes any more."""
        seen_before = dict(seen)
        try:
            seen.update(usage(stack, hops))
            # Neither more nor less: the kernel's table of connections may lack some while it changes.
            return not await _at_work(stack) and not _compared(seen, seen_before) and not _compared(seen_before, seen)
        except (AssertionError, grpc.aio.AioRpcError, OSError):
            return False

    await eventually(is_quiet, 30)
    return seen


async def leaks(stack: LocalStack, before: Mapping[str, Usage], hops: Hops = dict) -> list[str]:
    """Returns what is left over though nobody asks for anything: KV, leases, keys, requests, files, tasks."""
    after = usage(stack, hops)
    found = await _at_work(stack)
    if not stack.redis_url.startswith("memory"):
        found += await leased(stack.redis_url)
    return found or _compared(after, before, len(await models(stack)) - 1)


async def _at_work(stack: LocalStack) -> list[str]:
    """What runs, waits or holds KV."""
    found: list[str] = []
    now = await status(stack)
    if now.num_running or now.num_waiting:
        found.append(f"scheduler: {now.num_running} running, {now.num_waiting} waiting")
    if len(now.workers) != len(stack.worker_names()):
        found.append(f"scheduler: {len(now.workers)} of {len(stack.worker_names())} workers")
    for worker in now.workers:
        if worker.report.kv_free_tokens != worker.report.kv_total_tokens:
            found.append(
                f"{worker.worker_id}: {worker.report.kv_total_tokens - worker.report.kv_free_tokens} KV tokens"
            )
    for name in stack.worker_names():
        if held := metric(stack, name, "bucketserve_worker_kv_held_tokens"):
            found.append(f"{name}: {held:.0f} held KV tokens")
    for name in (n for n in stack.services if n.startswith("gateway")):
        if number := metric(stack, name, "bucketserve_gateway_open_requests"):
            found.append(f"{name}: {number:.0f} open requests")
    return found


def _compared(after: Mapping[str, Usage], before: Mapping[str, Usage], num_unserved: int = 0) -> list[str]:
    """What services hold more than before; each is compared with the one of its kind that held most.

    Who leads may have changed, and with it who holds the connections of all workers and gateways. What workers keep for
    each other is opened when first needed: one for each other worker, however often that is started again. A scheduler
    has a loop for every model that it has heard of; num_unserved: how many there are beside the served one.
    """
    found: list[str] = []
    others = sum(_kind(name) == "worker" for name in before) - 1
    limits = {
        STORE: STORE_CONNECTIONS,
        PEER_AREA: others,
        "connection to worker": others,
        "connection of worker": others,
    }
    for name, now in after.items():
        peers = [usage for other, usage in before.items() if _kind(other) == _kind(name)]
        most = max((usage.tasks for usage in peers), default=0) + (num_unserved if _kind(name) == "scheduler" else 0)
        if now.tasks > most:
            found.append(f"{name}: {now.tasks:.0f} tasks, {most:.0f} at first")
        for kind, number in now.files.items():
            first = max((usage.files[kind] for usage in peers), default=0)
            if number > max(first, limits.get(kind, 0)):
                found.append(f"{name}: {number} x {kind}, {first} at first")
    return found


async def leased(redis_url: str) -> list[str]:
    """Queue keys that hold something, and requests of jobs that somebody still has a lease on."""
    found = []
    client = connect(redis_url)
    try:
        async for key in client.scan_iter("bs:*"):
            name = key.decode()
            kind = name.rpartition(":")[2]
            number, which = 0, ""
            if kind in ("ticket", "place", "owner"):
                number = await client.hlen(key)
                if kind == "place":
                    # Enough to follow them in the logs.
                    which = f": {dict(list((await client.hgetall(key)).items())[:5])}"
            elif kind in ("waiting", "lease", "pending", "running"):
                number = await client.zcard(key)
            if number:
                found.append(f"store: {number} in {name}{which}")
    finally:
        await client.aclose()
    return found


@dataclass
class _Run:
    worker: str
    epoch: int
    began_s: float
    ended_s: float = float("inf")


def double_executions(
    stack: LocalStack, clock: Callable[[str], Callable[[float], float]] = lambda worker: float
) -> tuple[int, list[str]]:
    """Returns (runs, violations): the same attempt at two workers at once under one fencing epoch.

    clock(worker) is a function from what that worker's clock showed to the true time, called in order.

    The history is what workers log when a run is given to the engine and when it has left it. A process that ended took
    its runs with it: the next life's first line ends them.
    """
    runs: dict[str, list[_Run]] = defaultdict(list)
    for worker in stack.worker_names():
        _read(worker, stack.services[worker].log_path, runs, clock(worker))
    bad = []
    for run_id, of_request in runs.items():
        of_request.sort(key=lambda run: run.began_s)
        for i, first in enumerate(of_request):
            for second in of_request[i + 1 :]:
                is_at_once = second.began_s < first.ended_s - TOLERANCE_S
                if is_at_once and first.worker != second.worker and first.epoch == second.epoch:
                    bad.append(f"{run_id} at {first.worker} and {second.worker}")
    return sum(len(of_request) for of_request in runs.values()), bad


def _read(worker: str, log: Path, runs: dict[str, list[_Run]], true_time: Callable[[float], float]) -> None:
    open_runs: dict[str, _Run] = {}
    last_s = 0.0
    for line in log.read_text(errors="replace").splitlines():
        if not re.search(r'"event": "(run\.|worker\.ready)', line):
            continue
        entry = json.loads(line)
        at_s = true_time(datetime.fromisoformat(entry["time"]).timestamp())
        match entry["event"]:
            case "worker.ready":
                for run in open_runs.values():
                    run.ended_s = last_s
                open_runs.clear()
            case "run.began":
                run = _Run(worker, entry["epoch"], at_s)
                open_runs[entry["run"]] = run
                runs[entry["run"].partition("#")[0]].append(run)
            case "run.ended":
                if run := open_runs.pop(entry["run"], None):
                    run.ended_s = at_s
        last_s = at_s
