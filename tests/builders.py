"""Values for tests of the core."""

from __future__ import annotations

from bucketserve.core.messages import RequestFinished, WorkerJoined, WorkerReported
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
    more.setdefault("last_assignment", max((each.assignment for each in running), default=0))
    return WorkerJoined(
        worker_id=WorkerId(name),
        role=WorkerRole.BOTH,
        headroom=headroom(free, total, **more),
        context_tokens=4096,
        running=running,
    )


def at(name: str, *, assignment: int = 1, is_held: bool = False, **more) -> RunningRequest:
    return RunningRequest(request_id=RequestId(name), assignment=assignment, is_held=is_held, **more)


def finished(name: str = "r", worker: str = "w", assignment: int = 1, **more) -> RequestFinished:
    values = {"output_tokens": 5, **more}
    return RequestFinished(request_id=RequestId(name), worker_id=WorkerId(worker), assignment=assignment, **values)


def reported(name: str = "w", free: int = 1000, total: int = 1000, **more) -> WorkerReported:
    steps = more.pop("steps", ())
    return WorkerReported(worker_id=WorkerId(name), headroom=headroom(free, total, **more), steps=steps)
