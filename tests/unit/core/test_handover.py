"""Prefill and decode on different workers, on literal events."""

from __future__ import annotations

from dataclasses import replace

from bucketserve.core.messages import (
    BatchPrefilled,
    CancelAtWorker,
    DispatchBatch,
    Drop,
    DropReason,
    ForgetRequest,
    KvMoved,
    MoveKv,
    RequestCancelled,
    RequestFinished,
    RequestSubmitted,
    WorkerLost,
)
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings, EdgeRule
from bucketserve.core.types import Batch, RequestId, WorkerId, WorkerRole
from tests.builders import a_request, joined, reported

P, D = WorkerId("p"), WorkerId("d")


def world(decode_tokens: int = 1000) -> SchedulerCore:
    core = SchedulerCore(CoreSettings(edges=EdgeRule.NONE), 4096)
    prefill = replace(joined("p", free=500), role=WorkerRole.PREFILL)
    decode = replace(joined("d", free=decode_tokens), role=WorkerRole.DECODE)
    core.step([prefill, decode], 0.0)
    return core


def start(core: SchedulerCore, *names: str, prompt: int = 100, output: int = 300, now_s: float = 0.1) -> list[Batch]:
    events = [RequestSubmitted(a_request(name, prompt, output, now_s)) for name in names]
    return [c.batch for c in core.step(events, now_s).commands if isinstance(c, DispatchBatch)]


def prefilled(batch: Batch) -> BatchPrefilled:
    return BatchPrefilled(worker_id=P, batch_id=batch.batch_id, request_ids=batch.request_ids, duration_s=0.1)


def moved(name: str, is_ok: bool = True) -> KvMoved:
    return KvMoved(request_id=RequestId(name), attempt=1, source_id=P, target_id=D, is_ok=is_ok)


def test_prompts_are_computed_on_one_worker_and_go_on_at_the_other() -> None:
    core = world()
    (batch,) = start(core, "a", "b", "c", "d")
    # The prefill worker reserves prompts only: 400 of 450 safe tokens, though the outputs are three times as long.
    assert (batch.worker_id, len(batch.request_ids)) == (P, 4)
    moves = [c for c in core.step([prefilled(batch)], 0.2).commands if isinstance(c, MoveKv)]
    # The decode worker has 900 safe tokens: two requests of 400. The rest stays where it is.
    assert [(m.request_id, m.source_id, m.target_id) for m in moves] == [("a", P, D), ("b", P, D)]
    assert not [c for c in core.step([reported("d", free=1000)], 0.3).commands if isinstance(c, MoveKv)]
    core.step([moved("a"), moved("b"), reported("d", free=200, num_running=2)], 0.4)
    done = RequestFinished(request_id=RequestId("a"), attempt=1, worker_id=D, output_tokens=300)
    later = core.step([done, reported("d", free=600, num_running=1)], 0.5)
    assert ForgetRequest(RequestId("a")) in later.commands
    assert [c.request_id for c in later.commands if isinstance(c, MoveKv)] == ["c"]


def test_a_failed_transfer_ends_the_attempt_on_both_sides() -> None:
    core = world()
    (batch,) = start(core, "a")
    core.step([prefilled(batch)], 0.2)
    decision = core.step([moved("a", is_ok=False)], 0.3)
    assert decision.drops == (Drop(RequestId("a"), 1, DropReason.WORKER_FAILED),)
    # Room is free again: the next attempt goes through.
    again = core.step([RequestSubmitted(a_request("a", 100, 800, 0.4, attempt=2))], 0.4)
    assert [c.batch.request_ids for c in again.commands if isinstance(c, DispatchBatch)] == [("a",)]


def test_losing_either_side_while_kv_moves_drops_the_request_and_stops_the_other() -> None:
    for lost, other in ((P, D), (D, P)):
        core = world()
        (batch,) = start(core, "a")
        core.step([prefilled(batch)], 0.2)
        decision = core.step([WorkerLost(lost)], 0.3)
        assert decision.drops == (Drop(RequestId("a"), 1, DropReason.WORKER_LOST),)
        assert CancelAtWorker(other, RequestId("a")) in decision.commands
        assert CancelAtWorker(lost, RequestId("a")) not in decision.commands


def test_cancelling_while_kv_moves_reaches_both_sides() -> None:
    core = world()
    (batch,) = start(core, "a")
    core.step([prefilled(batch)], 0.2)
    decision = core.step([RequestCancelled(RequestId("a"))], 0.3)
    assert set(decision.commands) == {CancelAtWorker(P, RequestId("a")), CancelAtWorker(D, RequestId("a"))}


def test_a_request_too_large_for_any_decode_worker_is_refused() -> None:
    core = world(decode_tokens=200)
    decision = core.step([RequestSubmitted(a_request("a", 100, 300))], 0.1)
    assert [command.reason.value for command in decision.commands] == ["too_large"]
