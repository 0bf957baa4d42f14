"""What must be true when everything is quiet again: nothing left over, nothing executed twice."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bucketserve.store.redis import connect
from bucketserve_cli.stack import LocalStack
from tests.e2e.observe import metric, status

__all__ = ["double_executions", "leaks", "usage"]

FILES, TASKS = 30, 12
"""What a service may have more than when it was first measured: connections, and their tasks, not made by then."""
TOLERANCE_S = 0.005
"""Logs are written to the millisecond."""


def usage(stack: LocalStack) -> dict[str, dict[str, float]]:
    """Returns open files, tasks and resident bytes of each service."""
    return {
        name: {
            "files": metric(stack, name, "process_open_fds"),
            "tasks": metric(stack, name, "process_asyncio_tasks"),
            "bytes": metric(stack, name, "process_resident_memory_bytes"),
        }
        for name in stack.services
    }


async def leaks(stack: LocalStack, redis_url: str, before: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Returns what is left over though nobody asks for anything: KV, leases, keys, requests, files, tasks."""
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
    if not redis_url.startswith("memory"):
        found += await _keys(redis_url)
    after = usage(stack)
    for name, values in after.items():
        for what, slack in (("files", FILES), ("tasks", TASKS)):
            # Measured against the first life of the one of its kind that had most: the leader may be another one now.
            kind = name.partition("-")[0]
            first = max(each[what] for other, each in before.items() if other.partition("-")[0] == kind)
            if values[what] > first + slack:
                found.append(f"{name}: {values[what]:.0f} {what}, {first:.0f} at first")
    return found


async def _keys(redis_url: str) -> list[str]:
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
            elif kind in ("waiting", "lease", "pending"):
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


def double_executions(stack: LocalStack) -> tuple[int, list[str]]:
    """Returns (runs, violations): the same attempt at two workers at once under one fencing epoch.

    The history is what workers log when a run is given to the engine and when it has left it. A process that ended took
    its runs with it: the next life's first line ends them.
    """
    runs: dict[str, list[_Run]] = defaultdict(list)
    for worker in stack.worker_names():
        _read(worker, stack.services[worker].log_path, runs)
    bad = []
    for run_id, of_request in runs.items():
        of_request.sort(key=lambda run: run.began_s)
        for i, first in enumerate(of_request):
            for second in of_request[i + 1 :]:
                is_at_once = second.began_s < first.ended_s - TOLERANCE_S
                if is_at_once and first.worker != second.worker and first.epoch == second.epoch:
                    bad.append(f"{run_id} at {first.worker} and {second.worker}")
    return sum(len(of_request) for of_request in runs.values()), bad


def _read(worker: str, log: Path, runs: dict[str, list[_Run]]) -> None:
    open_runs: dict[str, _Run] = {}
    last_s = 0.0
    for line in log.read_text(errors="replace").splitlines():
        if not re.search(r'"event": "(run\.|worker\.ready)', line):
            continue
        entry = json.loads(line)
        at_s = datetime.fromisoformat(entry["time"]).timestamp()
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
