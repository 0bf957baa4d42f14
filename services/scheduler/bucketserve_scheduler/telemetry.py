"""What the scheduler reports of itself: logs, metrics, spans."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from bucketserve.core.messages import DropReason, Fault, RefuseReason
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.types import Batch, WorkerRole
from bucketserve.rpc.convert import request_class_from_pb
from bucketserve.telemetry.logs import EventLog, Repeated
from bucketserve.telemetry.metrics import ProcessMetrics
from bucketserve.telemetry.tracing import Tracing
from bucketserve.v1 import scheduler_pb2
from bucketserve_scheduler.tickets import Entry

__all__ = ["LoopTelemetry"]

GAUGE_INTERVAL_S = 0.5
QUEUE_GAUGES = (
    "bucketserve_scheduler_waiting_requests",
    "bucketserve_scheduler_deferred_requests",
    "bucketserve_scheduler_waiting_tokens",
    "bucketserve_scheduler_running_requests",
    "bucketserve_scheduler_buckets",
)


class LoopTelemetry:
    """Observes; changes nothing."""

    def __init__(self, log: EventLog, metrics: ProcessMetrics, tracing: Tracing) -> None:
        """Takes the process's outlets."""
        self._log = log
        self._metrics = metrics
        self._tracing = tracing
        self._gauges_s: dict[str, float] = {}
        self._store_away = Repeated()

    @contextlib.contextmanager
    def step(self, model: str, core: SchedulerCore) -> Iterator[None]:
        """Around each core step."""
        start_s = time.perf_counter()
        yield
        end_s = time.perf_counter()
        self._metrics.observe("bucketserve_scheduler_step_seconds", end_s - start_s)
        if end_s - self._gauges_s.get(model, 0.0) < GAUGE_INTERVAL_S:
            return
        self._gauges_s[model] = end_s
        view = core.status()
        for source, waste in (("predicted", view.predicted_waste), ("observed", view.observed_waste)):
            for reading, value in (("relative", waste.relative), ("tokens", waste.padded_share)):
                self._metrics.set(
                    "bucketserve_scheduler_padding_waste_ratio", value, model=model, source=source, reading=reading
                )
        waiting_tokens = sum(bucket.waiting_tokens for bucket in view.buckets)
        self._show_queue(
            model, view.num_waiting, view.num_deferred, waiting_tokens, view.num_running, len(view.buckets)
        )

    def _show_queue(self, model: str, *values: int) -> None:
        for name, value in zip(QUEUE_GAUGES, values, strict=True):
            self._metrics.set(name, value, model=model)

    @contextlib.contextmanager
    def store_round_trip(self) -> Iterator[None]:
        """Around each write to the store."""
        start_s = time.perf_counter()
        yield
        self._metrics.observe("bucketserve_scheduler_store_seconds", time.perf_counter() - start_s)
        self.store_answers()

    def store_answers(self) -> None:
        """When the store has done what it was asked to."""
        if self._store_away.is_over():
            self._log.info("store.back")

    def store_unavailable(self, model: str, detail: str) -> None:
        """When the store can't be reached or can't write; every try says so here."""
        if self._store_away.is_due(detail):
            self._log.warning("store.unavailable", model=model, detail=detail)

    def store_evicts(self, detail: str) -> None:
        """When the store's settings allow it to lose what it was given."""
        self._log.warning("store.may_lose_keys", detail=detail)

    def leading(self, model: str, epoch: int) -> None:
        """When this scheduler takes the lead."""
        self._metrics.set("bucketserve_scheduler_leading", 1, model=model)
        self._log.info("leader.elected", model=model, epoch=epoch)

    def stepped_down(self, model: str) -> None:
        """When it loses the lead."""
        self._log.warning("leader.lost", model=model)

    def leads_no_more(self, model: str) -> None:
        """When it has stopped leading, whatever for: what waits and runs is in the gauges of whoever leads next."""
        self._metrics.set("bucketserve_scheduler_leading", 0, model=model)
        self._show_queue(model, *[0] * len(QUEUE_GAUGES))

    def worker_joined(self, model: str, worker_id: str, num_running: int) -> None:
        """When a worker's stream begins."""
        self._log.info("worker.joined", model=model, worker_id=worker_id, num_running=num_running)

    def worker_refused(self, model: str, worker_id: str) -> None:
        """When a second process comes under the id of one that is here."""
        self._log.warning("worker.id_in_use", model=model, worker_id=worker_id)

    def worker_disconnected(self, model: str, worker_id: str) -> None:
        """When a worker's stream breaks: it may come back."""
        self._log.info("worker.disconnected", model=model, worker_id=worker_id)

    def worker_lost(self, model: str, worker_id: str, cause: str) -> None:
        """When a worker is given up, and its requests with it."""
        self._log.warning("worker.lost", model=model, worker_id=worker_id, cause=cause)

    def role_switched(self, worker_id: str, role: WorkerRole) -> None:
        """When a worker is given another role."""
        self._metrics.count("bucketserve_scheduler_role_switches_total", role=role.value)
        self._log.info("worker.role_switched", worker_id=worker_id, role=role.value)

    def admitted(self, ticket: scheduler_pb2.Ticket) -> None:
        """When a ticket is in the queue."""
        request_class = request_class_from_pb(ticket.request_class).value
        self._metrics.count("bucketserve_scheduler_admitted_total", model=ticket.model, request_class=request_class)

    def refused(self, reason: RefuseReason) -> None:
        """When one is not."""
        self._metrics.count("bucketserve_scheduler_refused_total", reason=reason.value)

    def dropped(self, reason: DropReason) -> None:
        """When a queued or running request ends early."""
        self._metrics.count("bucketserve_scheduler_dropped_total", reason=reason.value)

    def fault(self, model: str, fault: Fault) -> None:
        """When the core could not take an event."""
        self._metrics.count("bucketserve_scheduler_faults_total")
        self._log.error("core.fault", error=fault.error, model=model, event_kind=type(fault.event).__name__)

    def dispatch_failed(self, model: str, num_requests: int) -> None:
        """When the store did not have what was to be dispatched: it loses keys."""
        self._log.warning("store.lost_waiting", model=model, num_requests=num_requests)

    def dispatched(self, batch: Batch, entries: Sequence[Entry], now_s: float) -> None:
        """When a batch goes to its worker: one span per request, one for the batch, linked to them."""
        self._metrics.count("bucketserve_scheduler_batches_total", limited_by=batch.limited_by.value)
        self._metrics.observe("bucketserve_scheduler_batch_requests", len(batch.request_ids))
        padding = 1.0 - batch.prefill_tokens / batch.padded_tokens if batch.padded_tokens else 0.0
        self._metrics.observe("bucketserve_scheduler_batch_padding_ratio", padding)
        if not self._tracing.is_enabled:
            return
        now_us = time.time_ns() // 1000
        attributes: dict[str, str | int] = {
            "bucketserve.batch.id": batch.batch_id,
            "bucketserve.batch.num_requests": len(batch.request_ids),
            "bucketserve.batch.prompt_tokens": batch.prefill_tokens,
            "bucketserve.batch.padded_tokens": batch.padded_tokens,
            "bucketserve.batch.reserved_kv_tokens": batch.reserved_kv_tokens,
            "bucketserve.batch.limited_by": batch.limited_by.value,
            "bucketserve.bucket.low_tokens": batch.bucket.low,
            "bucketserve.bucket.high_tokens": batch.bucket.high,
            "bucketserve.worker_id": batch.worker_id,
        }
        parents = []
        for entry in entries:
            parent = self._tracing.extract(entry.ticket.traceparent, entry.ticket.tracestate)
            if parent is None:
                continue
            parents.append(parent)
            self._tracing.record(
                "bucketserve.queue",
                now_us - round((now_s - entry.arrival_s) * 1e6),
                now_us,
                parent=parent,
                attributes={**attributes, "bucketserve.run_id": entry.ticket.run_id},
            )
        self._tracing.record("bucketserve.batch", now_us, now_us, attributes=attributes, links=parents)
