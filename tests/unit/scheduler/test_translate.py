"""From what the core decides to what the store and the workers are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bucketserve.core.messages import CancelAtWorker, Decision, PreemptAtWorker, SaveOutputs
from bucketserve.core.types import RequestId, WorkerId
from bucketserve.ports import Leadership, SetOutputs
from bucketserve.rpc.outbox import Outbox
from bucketserve.telemetry.names import Service
from bucketserve.telemetry.process import open_telemetry
from bucketserve.v1 import scheduler_pb2
from bucketserve_scheduler.peers import GatewayPeers, WorkerPeer
from bucketserve_scheduler.telemetry import LoopTelemetry
from bucketserve_scheduler.tickets import TicketTable
from bucketserve_scheduler.translate import Announcer, Written, writes_of

LEADERSHIP = Leadership(owner="s", epoch=1)


def a_worker(name: str) -> WorkerPeer:
    return WorkerPeer(
        worker_id=WorkerId(name),
        hello=scheduler_pb2.WorkerHello(),
        outbox=Outbox(100),
        report=scheduler_pb2.WorkerReport(),
        reported_s=0.0,
        is_joined=True,
    )


@contextmanager
def an_announcer(workers: dict[WorkerId, WorkerPeer]) -> Iterator[Announcer]:
    gateways = GatewayPeers()
    with open_telemetry(Service.SCHEDULER, "s", metrics_address=None) as outlets:
        telemetry = LoopTelemetry(outlets.log, outlets.metrics, outlets.tracing)
        yield Announcer(TicketTable(gateways), gateways, workers, telemetry, on_undeliverable=lambda failure: None)


async def said_to(worker: WorkerPeer) -> list[scheduler_pb2.WorkResponse]:
    worker.outbox.finish()
    return [message async for message in worker.outbox.messages()]


async def test_each_worker_is_told_once_whom_to_stop_and_then_whom_to_let_go() -> None:
    workers = {peer.worker_id: peer for peer in (a_worker("v"), a_worker("w"))}
    v, w = workers
    commands = (
        PreemptAtWorker(v, RequestId("a.1")),
        PreemptAtWorker(w, RequestId("b.1")),
        CancelAtWorker(v, RequestId("c.1")),
        PreemptAtWorker(v, RequestId("d.1")),
        PreemptAtWorker(WorkerId("gone"), RequestId("e.1")),
    )
    with an_announcer(workers) as announcer:
        announcer.announce(Decision(commands), Written(), LEADERSHIP, 0.0)
    cancel = scheduler_pb2.CancelRuns(run_ids=["c.1"])
    assert await said_to(workers[v]) == [
        scheduler_pb2.WorkResponse(cancel=cancel),
        scheduler_pb2.WorkResponse(preempt=scheduler_pb2.PreemptRuns(run_ids=["a.1", "d.1"])),
    ]
    assert await said_to(workers[w]) == [scheduler_pb2.WorkResponse(preempt=scheduler_pb2.PreemptRuns(run_ids=["b.1"]))]


def test_what_is_known_of_outputs_is_stored() -> None:
    counts = {"interactive 3": (1, 2)}
    tickets = TicketTable(GatewayPeers())
    assert writes_of(Decision((SaveOutputs(counts),)), tickets) == [SetOutputs(counts=counts)]
    # What a worker is asked to let go stays where it is until it says so.
    assert writes_of(Decision((PreemptAtWorker(WorkerId("w"), RequestId("a.1")),)), tickets) == []
