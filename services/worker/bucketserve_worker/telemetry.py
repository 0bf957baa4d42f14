"""What a worker reports of itself: logs, metrics, spans."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from bucketserve.core.types import FinishReason, Headroom, WorkerRole
from bucketserve.ports import StepOutput
from bucketserve.telemetry.logs import EventLog, Repeated
from bucketserve.telemetry.metrics import ProcessMetrics
from bucketserve.telemetry.tracing import Tracing
from bucketserve.v1 import scheduler_pb2
from bucketserve_worker.engine_thread import EngineTurn
from bucketserve_worker.kv_source import Fetched
from bucketserve_worker.running import Finished, Running

__all__ = ["WorkerTelemetry"]


class WorkerTelemetry:
    """Observes; changes nothing."""

    def __init__(self, log: EventLog, metrics: ProcessMetrics, tracing: Tracing, worker_id: str, model: str) -> None:
        """Takes the process's outlets."""
        self._log = log
        self._metrics = metrics
        self._tracing = tracing
        self._scheduler_away = Repeated()
        self._worker_id = worker_id
        self._model = model
        self._num_out_of_memory = 0
        self._num_prefix_asked = self._num_prefix_reused = 0
        self._unix_offset_s = time.time() - time.monotonic()

    def watch(self, headroom: Callable[[], Headroom], held_tokens: Callable[[], int]) -> None:
        """Shows from now on what the engine has room for, read whenever somebody asks for the metrics."""

        def used() -> float:
            now = headroom()
            return 1.0 - now.kv_free_tokens / max(now.kv_total_tokens, 1)

        watch, model = self._metrics.watch, self._model
        watch("bucketserve_worker_kv_total_tokens", lambda: headroom().kv_total_tokens, model=model)
        watch("bucketserve_worker_kv_free_tokens", lambda: headroom().kv_free_tokens, model=model)
        watch("bucketserve_worker_kv_kept_tokens", lambda: headroom().kv_kept_tokens, model=model)
        watch("bucketserve_worker_kv_held_tokens", held_tokens, model=model)
        watch("vllm:num_requests_running", lambda: headroom().num_running, model_name=model)
        watch("vllm:num_requests_waiting", lambda: headroom().num_waiting, model_name=model)
        watch("vllm:kv_cache_usage_perc", used, model_name=model)

    def turn(self, turn: EngineTurn, finished: Sequence[Finished]) -> None:
        """After each engine turn."""
        self._count_step(turn.output)
        self._count_memory(turn.headroom)
        for done in finished:
            self._metrics.count("bucketserve_worker_finished_total", model=self._model, reason=done.reason.value)
            if done.reason in (FinishReason.STOP, FinishReason.LENGTH):
                self._metrics.count(
                    "vllm:request_success_total", model_name=self._model, finished_reason=done.reason.value
                )
            if self._tracing.is_enabled:
                self._record_spans(done)
        for failure in turn.output.failures:
            self._log.warning("run.failed", run=failure.request_id, detail=failure.message)

    def kv_transfer(self, pull: scheduler_pb2.PullKv, fetched: Fetched | None, start_s: float, error: str) -> None:
        """When KV has come from another worker, or could not be had."""
        if fetched is None:
            self._metrics.count("bucketserve_worker_kv_transfers_total", model=self._model, transport="failed")
            self._log.warning("kv.transfer_failed", run_id=pull.run_id, detail=error)
            return
        end_s = time.monotonic()
        self._metrics.count("bucketserve_worker_kv_transfers_total", model=self._model, transport=fetched.transport)
        self._metrics.count("bucketserve_worker_kv_transfer_bytes_total", fetched.kv_bytes, model=self._model)
        self._metrics.count(
            "bucketserve_worker_kv_transfer_known_pages_total", fetched.num_known_pages, model=self._model
        )
        self._metrics.observe("bucketserve_worker_kv_transfer_seconds", end_s - start_s, model=self._model)
        if not self._tracing.is_enabled:
            return
        spec = scheduler_pb2.RunSpec.FromString(fetched.trailer.spec)
        if parent := self._tracing.extract(spec.traceparent, spec.tracestate):
            self._tracing.record(
                "bucketserve.kv_transfer",
                self._unix_us(start_s),
                self._unix_us(end_s),
                parent=parent,
                attributes={
                    "bucketserve.run_id": pull.run_id,
                    "bucketserve.worker_id": self._worker_id,
                    "bucketserve.kv.transport": fetched.transport,
                    "bucketserve.kv.num_bytes": fetched.kv_bytes,
                },
            )

    def kv_expired(self, number: int) -> None:
        """When held KV is given up, for want of a scheduler or since its engine keeps it no longer."""
        self._metrics.count("bucketserve_worker_kv_leases_expired_total", number, model=self._model)
        self._log.warning("kv.leases_expired", number=number)

    def role_switched(self, older: WorkerRole, role: WorkerRole) -> None:
        """When the scheduler gives this worker another role."""
        self._log.info("role.switched", was=older.value, role=role.value)

    def adapter_loaded(self, name: str, fingerprint: str) -> None:
        """When requests may name an adapter from now on."""
        self._log.info("adapter.loaded", name=name, fingerprint=fingerprint)

    def adapter_unloaded(self, fingerprint: str) -> None:
        """When an adapter that nobody may name any more has left the engine."""
        self._log.info("adapter.unloaded", fingerprint=fingerprint)

    def adapter_refused(self, name: str, problem: str) -> None:
        """When something in the adapters' directory can't be served; once for each state of it."""
        self._log.error("adapter.refused", name=name, detail=problem)

    def run_began(self, key: str, epoch: int) -> None:
        """When a run is given to the engine: with run_ended the history that tests check for double execution."""
        self._log.debug("run.began", run=key, epoch=epoch)

    def run_ended(self, key: str, how: str) -> None:
        """When the engine is done with it, or is told to be."""
        self._log.debug("run.ended", run=key, how=how)

    def preempted(self, finished: Sequence[Finished], cause: str) -> None:
        """When runs were let go: for want of KV (memory), or because the scheduler said so (order)."""
        self._metrics.count("bucketserve_worker_preempted_total", len(finished), model=self._model, cause=cause)
        for done in finished:
            self._log.debug(
                "run.preempted", run_id=done.running.run_id, cause=cause, output_tokens=done.running.num_output_tokens
            )

    def scheduler_state(self, is_connected: bool, detail: str) -> None:
        """When the scheduler's stream comes or goes."""
        if is_connected:
            self._scheduler_away.is_over()
            self._log.info("scheduler.connected", detail=detail)
        elif self._scheduler_away.is_due(detail):
            self._log.warning("scheduler.disconnected", detail=detail)

    def gateway_lost(self, address: str, num_requests: int) -> None:
        """When a gateway can't be reached."""
        self._log.warning("gateway.lost", address=address, num_requests=num_requests)

    def _count_step(self, output: StepOutput) -> None:
        sample = output.sample
        if sample is None:
            return
        model = self._model
        self._metrics.count("bucketserve_worker_steps_total", model=model)
        self._metrics.observe("bucketserve_worker_step_seconds", sample.duration_s, model=model)
        self._metrics.count("bucketserve_worker_prefill_tokens_total", sample.prefill_tokens, model=model)
        self._metrics.count("bucketserve_worker_decode_tokens_total", sample.decode_sequences, model=model)
        self._metrics.count("vllm:prompt_tokens_total", sample.prefill_tokens, model_name=model)
        self._metrics.count("vllm:generation_tokens_total", len(output.tokens), model_name=model)

    def _count_memory(self, headroom: Headroom) -> None:
        model = self._model
        if headroom.num_out_of_memory > self._num_out_of_memory:
            new = headroom.num_out_of_memory - self._num_out_of_memory
            self._metrics.count("bucketserve_worker_out_of_memory_total", new, model=model)
            self._log.warning("device.out_of_memory", num_new=new, kv_total_tokens=headroom.kv_total_tokens)
            self._num_out_of_memory = headroom.num_out_of_memory

        asked, reused = headroom.num_prefix_asked_tokens, headroom.num_prefix_reused_tokens
        self._metrics.count("vllm:prefix_cache_queries_total", asked - self._num_prefix_asked, model_name=model)
        self._metrics.count("vllm:prefix_cache_hits_total", reused - self._num_prefix_reused, model_name=model)
        self._num_prefix_asked, self._num_prefix_reused = asked, reused

    def handed_over(self, running: Running) -> None:
        """When a prompt has been computed here for another worker to go on with."""
        if self._tracing.is_enabled:
            self._record_span("bucketserve.prefill", running, running.received_s, time.monotonic())

    def _record_spans(self, done: Finished) -> None:
        running, finished_s = done.running, done.finished_s
        prefilled_s = finished_s if running.prefilled_s is None else running.prefilled_s
        reason = done.reason.value
        if not running.was_pulled:
            self._record_span("bucketserve.prefill", running, running.received_s, prefilled_s, reason)
        if running.prefilled_s is not None:
            self._record_span("bucketserve.decode", running, prefilled_s, finished_s, reason)

    def _record_span(self, name: str, running: Running, start_s: float, end_s: float, reason: str = "") -> None:
        """Records what this worker did for a run, under its gateway's span."""
        parent = self._tracing.extract(running.spec.traceparent, running.spec.tracestate)
        if parent is None:
            return
        attributes: dict[str, str | int] = {
            "bucketserve.run_id": running.run_id,
            "bucketserve.worker_id": self._worker_id,
            "bucketserve.batch.id": running.batch.batch_id,
            "bucketserve.output_tokens": running.num_output_tokens,
            "bucketserve.cached_prompt_tokens": running.cached_prompt_tokens,
        }
        if reason:
            attributes["bucketserve.finish_reason"] = reason
        self._tracing.record(name, self._unix_us(start_s), self._unix_us(end_s), parent=parent, attributes=attributes)

    def _unix_us(self, monotonic_s: float) -> int:
        return round((monotonic_s + self._unix_offset_s) * 1e6)
