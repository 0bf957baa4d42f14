"""Values for tests of the core."""

from __future__ import annotations

from bucketserve.core.messages import WorkerJoined, WorkerReported
from bucketserve.core.types import Headroom, Request, RequestId, RunningRequest, WorkerId, WorkerRole


def a_request(
    name: str = "r", prompt_tokens: int = 10, max_new_tokens: int = 10, arrival_s: float = 0.0, **more
) -> Request:
    return Request(
        request_id=RequestId(name),
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        arrival_s=arrival_s,
        **more,
    )


def headroom(free: int = 1000, total: int | None = None, **more) -> Headroom:
    values = {"max_sequences": 64, **more}
    return Headroom(kv_total_tokens=free if total is None else total, kv_free_tokens=free, **values)


def joined(name: str = "w", free: int = 1000, total: int | None = None, **more) -> WorkerJoined:
    running = more.pop("running", ())
    return WorkerJoined(
        worker_id=WorkerId(name),
        role=WorkerRole.BOTH,
        headroom=headroom(free, total, **more),
        context_tokens=4096,
        pays_padding=False,
        running=running,
    )


def at(name: str, *, is_held: bool = False) -> RunningRequest:
    return RunningRequest(request_id=RequestId(name), is_held=is_held)


def reported(name: str = "w", free: int = 1000, total: int = 1000, **more) -> WorkerReported:
    steps = more.pop("steps", ())
    return WorkerReported(worker_id=WorkerId(name), headroom=headroom(free, total, **more), steps=steps)
