"""The worker's stream to the scheduler: hello, reports and finished requests out; batches and cancellations in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from bucketserve.core.types import WorkerRole
from bucketserve.rpc.convert import role_from_pb
from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.leader import LeaderSearch
from bucketserve.rpc.listening import hang_up, messages_while_alive
from bucketserve.rpc.outbox import Outbox
from bucketserve.tasks import end_task
from bucketserve.v1 import scheduler_pb2, scheduler_pb2_grpc

__all__ = ["SchedulerLink"]

OUTBOX_LIMIT = 65_536
TAKEOVER_S = 10.0
"""How long a worker that leaves looks for a scheduler when none is there, not even one that waits for its store: what
others of its weights have may need it."""

Work = scheduler_pb2.WorkRequest


class SchedulerLink:
    """Keeps one Work stream open, reconnecting for ever.

    What is sent while there is no stream is lost on purpose: the next hello names what still runs, which tells the
    scheduler everything.
    """

    def __init__(
        self,
        model: str,
        addresses: list[str],
        deployment: Deployment,
        *,
        hello: Callable[[], scheduler_pb2.WorkerHello],
        report: Callable[[], scheduler_pb2.WorkerReport],
        on_batch: Callable[[scheduler_pb2.BatchAssignment], None],
        on_cancel: Callable[[list[str]], None],
        on_preempt: Callable[[list[str]], None],
        on_pull: Callable[[scheduler_pb2.PullKv], None],
        on_role: Callable[[WorkerRole], None],
        on_heard: Callable[[], None],
        on_state: Callable[[bool, str], None],
    ) -> None:
        """on_state(connected, detail) on every change, on_heard() on every message."""
        self._deployment = deployment
        self._search = LeaderSearch(model, addresses, deployment.tls, on_state)
        self._hello = hello
        self._new_report = report
        self._on_batch = on_batch
        self._on_cancel = on_cancel
        self._on_preempt = on_preempt
        self._on_pull = on_pull
        self._on_role = on_role
        self._on_heard = on_heard
        self._outbox: Outbox[Work] | None = None
        self._report_soon = asyncio.Event()
        self._is_released = False
        """Whether the scheduler has said NoMoreWork."""
        self.is_draining = False

    def finished(self, message: scheduler_pb2.RunFinished) -> None:
        """Says that a run has left."""
        self._send(Work(finished=message))

    def prefilled(self, message: scheduler_pb2.BatchPrefilled) -> None:
        """Says that prompts are computed."""
        self._send(Work(prefilled=message))

    def pulled(self, message: scheduler_pb2.KvPulled) -> None:
        """Says how a transfer ended."""
        self._send(Work(kv_pulled=message))

    def report(self, report: scheduler_pb2.WorkerReport) -> None:
        """Reports now."""
        self._send(Work(report=report))

    def adapters(self, message: scheduler_pb2.WorkerAdapters) -> None:
        """Says which adapters are here from now on."""
        self._send(Work(adapters=message))

    def report_soon(self) -> None:
        """Asks for a report with the next turn of the event loop, rather than at the next interval."""
        self._report_soon.set()

    def drain(self) -> None:
        """Asks to leave. Until can_bring_work is false work may come: what was on its way, or nobody else could do."""
        self.is_draining = True
        self._send(Work(draining=scheduler_pb2.WorkerDraining()))

    @property
    def can_bring_work(self) -> bool:
        """Whether a scheduler may yet assign something: none has said NoMoreWork, and one is there or may soon be."""
        return not self._is_released and self._search.may_come(TAKEOVER_S)

    def is_present(self, grace_s: float) -> bool:
        """Whether a scheduler is there, or was not long ago."""
        return self._search.is_present(grace_s)

    async def run(self) -> None:
        """Stays connected; ends only by cancellation."""
        await self._search.run(self._converse)

    async def _converse(self, stub: scheduler_pb2_grpc.SchedulerServiceStub, address: str) -> None:
        outbox: Outbox[Work] = Outbox(OUTBOX_LIMIT)
        outbox.send(Work(hello=self._hello()))
        # From here on, not from the welcome on: what ends now is in the hello as running.
        self._outbox = outbox
        self._is_released = False
        call = stub.Work(outbox.messages(), metadata=self._deployment.metadata)
        reporter: asyncio.Task[None] | None = None
        try:
            async for response in messages_while_alive(call):
                self._on_heard()
                match response.WhichOneof("message"):
                    case "welcome":
                        self._search.welcomed(response.welcome.scheduler, address)
                        interval_s = response.welcome.report_interval_ms / 1e3
                        reporter = asyncio.create_task(self._report_for_ever(interval_s))
                    case "batch":
                        self._on_batch(response.batch)
                    case "cancel":
                        self._on_cancel(list(response.cancel.run_ids))
                    case "preempt":
                        self._on_preempt(list(response.preempt.run_ids))
                    case "pull":
                        self._on_pull(response.pull)
                    case "switch_role":
                        self._on_role(role_from_pb(response.switch_role.role))
                    case "no_more_work":
                        self._is_released = True
        finally:
            self._outbox = None
            outbox.close()
            hang_up(call)
            if reporter is not None:
                await end_task(reporter)

    async def _report_for_ever(self, interval_s: float) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._report_soon.wait()
            self._report_soon.clear()
            self.report(self._new_report())

    def _send(self, message: Work) -> None:
        if self._outbox is not None:
            self._outbox.send(message)
