"""The worker's hub: batches from the scheduler to the engine, tokens from the engine to the gateways, reports back.

SchedulerLink --batch, pull, cancel, preempt--> Worker --> EngineThread
EngineThread --turn--> Worker --> RunningTable --> DeliveryPool --> gateways
                         ├--> KvHolder: KV for decode workers
                         └--> SchedulerLink: prefilled, finished, report
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from bucketserve.core.types import FinishReason, Headroom, RequestId, StepSample, WorkerRole
from bucketserve.rpc.convert import (
    finish_reason_to_pb,
    headroom_to_pb,
    role_to_pb,
    sequence_from_spec,
)
from bucketserve.rpc.deployment import Deployment
from bucketserve.v1 import scheduler_pb2
from bucketserve_worker.adapters import AdapterDirectory
from bucketserve_worker.delivery import DeliveryPool
from bucketserve_worker.engine_thread import EngineStarted, EngineThread, EngineTurn
from bucketserve_worker.kv_holder import Held, KvHolder
from bucketserve_worker.kv_puller import KvPuller
from bucketserve_worker.kv_source import KvSources
from bucketserve_worker.running import Finished, Running, RunningTable
from bucketserve_worker.scheduler_link import SchedulerLink
from bucketserve_worker.settings import WorkerSettings
from bucketserve_worker.telemetry import WorkerTelemetry

__all__ = ["Worker"]

SWEEP_S = 1.0

MAX_STEP_SAMPLES = 256
"""Samples kept between two reports; older ones give way, since the fit wants the present."""


class Worker:
    """Owns the requests at this process. Everything runs in the event loop; only EngineThread has another thread."""

    def __init__(
        self, settings: WorkerSettings, deployment: Deployment, worker_id: str, telemetry: WorkerTelemetry
    ) -> None:
        """Connects to nothing yet; attach() completes it once the engine is warm."""
        self.worker_id = worker_id
        self.role = WorkerRole(settings.role)
        self._settings = settings
        self._telemetry = telemetry
        self._deployment = deployment
        self._instance = uuid.uuid4().hex
        self.delivery = DeliveryPool(
            worker_id,
            deployment,
            fingerprint=lambda: self._info.fingerprint,
            flush_s=settings.flush_ms / 1e3,
            give_up_s=settings.gateway_timeout_s,
            on_stop=self._on_stop,
            on_lost=self._on_gateway_lost,
        )
        self.running = RunningTable(self.delivery, time.monotonic)
        self.holder = KvHolder(settings.kv_lease_s, time.monotonic)
        self.link = SchedulerLink(
            settings.model_name,
            settings.scheduler_address.split(","),
            deployment,
            hello=self._hello,
            report=self._report,
            on_batch=self._on_batch,
            on_cancel=self._on_cancel,
            on_preempt=self._on_preempt,
            on_pull=self._on_pull,
            on_role=self._on_role,
            on_heard=self.holder.heard,
            on_state=telemetry.scheduler_state,
        )
        self._steps: deque[StepSample] = deque(maxlen=MAX_STEP_SAMPLES)
        self._last_received = 0
        """Number of the last order, batch or pull; they count up as long as this process lives."""
        self._last_accounted = 0
        """Number of the last batch that the headroom accounts for."""

    def attach(self, engine: EngineThread, started: EngineStarted) -> None:
        """Takes the warm engine."""
        self.adapters = AdapterDirectory(self._settings.adapters_dir, engine, self.link.adapters, self._telemetry)
        self._engine = engine
        self._info = started.info
        self._puller = KvPuller(
            KvSources(
                self.worker_id,
                self._deployment,
                self.holder,
                engine.staging,
                started.info.kv_layout,
                started.info.kv_page_bytes,
                engine.known_pages,
            ),
            engine,
            self.running,
            on_pulled=self._on_pulled,
            on_transfer=self._telemetry.kv_transfer,
            on_began=self._telemetry.run_began,
        )
        self._headroom: Headroom = started.headroom
        self._telemetry.watch(lambda: self._headroom, lambda: self.holder.num_tokens)

    async def drained(self, timeout_s: float) -> bool:
        """Waits until no request is left or can come and all output is sent; False if timeout_s were too short."""
        deadline_s, was_delivering = time.monotonic() + timeout_s, False
        while self._has_work() and time.monotonic() < deadline_s:
            if was_delivering and not self.delivery.is_delivering:
                # It is waited for with the word that the last output has arrived.
                self.link.report_soon()
            was_delivering = self.delivery.is_delivering
            await asyncio.sleep(0.05)
        await self.delivery.flush(max(deadline_s - time.monotonic(), 0.2))
        return not len(self.running)

    def _has_work(self) -> bool:
        is_coming = self.link.is_draining and self.link.can_bring_work
        return bool(len(self.running) or len(self._puller) or is_coming)

    async def close(self) -> None:
        """Ends all streams and transfers."""
        await self._puller.close()
        await self.delivery.close()

    async def sweep(self) -> None:
        """Frees for ever held KV whose lease is over, and what is kept of other workers that are gone.

        Of the former the scheduler is gone, and whoever wanted it starts anew.
        """
        while True:
            await asyncio.sleep(SWEEP_S)
            await self._puller.sweep()
            if expired := self.holder.expired(self._info.kv_kept_s):
                self._telemetry.kv_expired(len(expired))
                for key in expired:
                    self.holder.release(key)
                self._tell_finished(self.running.fail(expired, "the lease of its KV is over"))

    def engine_failed(self, error: BaseException) -> None:
        """Hands every request back: the engine is gone."""
        self._tell_finished(self.running.fail_all(f"engine failed: {type(error).__name__}"))

    # --- from the engine ----------------------------------------------------------------------------------------

    def on_turn(self, turn: EngineTurn) -> None:
        """Takes what one turn of the engine brought."""
        output = turn.output
        # While prompts are left the engine has begun the next step by now, which is like this one.
        computing = min(turn.headroom.waiting_prefill_tokens, output.sample.prefill_tokens if output.sample else 0)
        self._headroom = replace(turn.headroom, computing_prefill_tokens=computing)
        self._last_accounted = turn.last_assignment
        if turn.resumed:
            # The report that counts them comes first: there is no moment in which nobody does.
            self.link.report(self._report())
            for resumed in turn.resumed:
                self._tell_finished(self._puller.resumed(resumed))
                if resumed.error is not None:
                    self._telemetry.run_ended(resumed.key, "refused")
        for handed_over in turn.handed_over:
            self._telemetry.run_ended(handed_over.key, "handed over")
            running = self.running.get(handed_over.key)
            if running is None:
                handed_over.block.release()
            else:
                running.is_handed_over = True
                self.holder.hold(running, handed_over)
                self._telemetry.handed_over(running)
        for key in turn.cancelled:
            self.holder.release(key)
        self._note_ends(turn)
        if output.sample is not None:
            self._steps.append(output.sample)
        # Looked up first: a request of one token is prefilled and finished in the same turn.
        prefilled = [(key, running) for key in output.prefilled if (running := self.running.get(key))]
        finished = [*self.running.take_output(output), *self.running.take_cancelled(turn.cancelled)]
        for cause, keys in (("memory", output.preempted), ("order", turn.preempted)):
            if keys:
                finished += (preempted := self.running.take_preempted(keys))
                self._telemetry.preempted(preempted, cause)
        self._telemetry.turn(turn, finished)
        self._tell_prefilled(prefilled)
        self._tell_finished(finished)
        has_computed = output.sample is not None and output.sample.prefill_tokens > 0
        if finished or output.prefilled or turn.cancelled or has_computed:
            self.link.report_soon()

    def _note_ends(self, turn: EngineTurn) -> None:
        """Logs which runs are the engine's no more."""
        for key in turn.cancelled:
            self._telemetry.run_ended(key, "cancelled")
        for token in turn.output.tokens:
            if token.finish_reason is not None:
                self._telemetry.run_ended(token.request_id, "finished")
        for failure in turn.output.failures:
            self._telemetry.run_ended(failure.request_id, "failed")
        for key in (*turn.output.preempted, *turn.preempted):
            self._telemetry.run_ended(key, "preempted")

    def _tell_prefilled(self, prefilled: Sequence[tuple[RequestId, Running]]) -> None:
        batches: dict[int, scheduler_pb2.BatchPrefilled] = {}
        for key, running in prefilled:
            number = running.assignment
            message = batches.setdefault(number, scheduler_pb2.BatchPrefilled(assignment=number))
            message.run_ids.append(running.run_id)
            message.cached_prompt_tokens.append(running.cached_prompt_tokens)
            if held := self.holder.get(key):
                message.held.append(self._describe(held))
        for message in batches.values():
            self.link.prefilled(message)

    def _tell_finished(self, finished: Sequence[Finished]) -> None:
        for done in finished:
            self.link.finished(
                scheduler_pb2.RunFinished(
                    run_id=done.running.run_id,
                    assignment=done.running.assignment,
                    reason=finish_reason_to_pb(done.reason),
                    output_tokens=done.running.num_output_tokens,
                    is_retryable=done.is_retryable,
                )
            )

    # --- from the scheduler and the gateways ----------------------------------------------------------------------

    def _on_batch(self, assignment: scheduler_pb2.BatchAssignment) -> None:
        self._last_received = assignment.assignment
        older = [key for run in assignment.runs for key in self.running.replace(run.run_id)]
        self._puller.cancel([run.run_id for run in assignment.runs])
        if older:
            self._engine.cancel(older)
        hands_over = self.role is WorkerRole.PREFILL
        added, batch_id = self.running.add(assignment), assignment.batch.batch_id
        for key, _ in added:
            self._telemetry.run_began(key, assignment.epoch)
        self._engine.add(
            assignment.assignment,
            [sequence_from_spec(running.spec, key, batch_id, hands_over=hands_over) for key, running in added],
            assignment.max_chunk_tokens,
            # What is handed over takes its spec along.
            specs={key: run.spec for (key, _), run in zip(added, assignment.runs, strict=True)} if hands_over else {},
        )

    def _on_pull(self, pull: scheduler_pb2.PullKv) -> None:
        self._last_received = pull.assignment
        held = self.holder.find(pull.run_id)
        # What is to be pulled may be here already: a role switch may order that.
        older = self.running.replace(pull.run_id, except_key=held.key if held is not None else None)
        if older:
            self._engine.cancel(older)
        self._puller.pull(pull)

    def _on_pulled(self, pulled: scheduler_pb2.KvPulled) -> None:
        self.link.pulled(pulled)
        self.link.report_soon()

    def _on_role(self, role: WorkerRole) -> None:
        self._telemetry.role_switched(self.role, role)
        self.role = role

    def _on_cancel(self, run_ids: list[str]) -> None:
        self._puller.give_up(run_ids)
        keys = [key for run_id in run_ids for key in self.running.keys_of(run_id)]
        if held := [key for key in keys if self.holder.release(key)]:
            self._tell_finished(self.running.give_up(held, FinishReason.CANCELLED))
            self.link.report_soon()
        self._engine.cancel([key for key in keys if key not in held])

    def _on_preempt(self, run_ids: list[str]) -> None:
        self._engine.preempt([key for run_id in run_ids for key in self.running.keys_of(run_id)])

    def _on_stop(self, run_ids: list[str]) -> None:
        self._engine.cancel([key for run_id in run_ids for key in self.running.keys_of(run_id)])

    def _on_gateway_lost(self, address: str, run_ids: set[str]) -> None:
        lost = self.running.of_gateway(address, run_ids)
        self._telemetry.gateway_lost(address, len(lost))
        given_up = self.running.give_up(lost, FinishReason.ERROR)
        self._tell_finished(given_up)
        self._engine.cancel(lost)
        for run_id in run_ids.difference(done.running.run_id for done in given_up):
            # It has ended here, but its output has not arrived.
            reason = finish_reason_to_pb(FinishReason.ERROR)
            self.link.finished(scheduler_pb2.RunFinished(run_id=run_id, reason=reason, is_retryable=True))

    # --- what the scheduler is told -------------------------------------------------------------------------------

    def _hello(self) -> scheduler_pb2.WorkerHello:
        self._puller.cancel_all()
        report = self._report()
        report.last_assignment = self._last_received
        return scheduler_pb2.WorkerHello(
            worker_id=self.worker_id,
            model=self._settings.model_name,
            role=role_to_pb(self.role),
            address=self._settings.address or self._settings.listen,
            engine=self._info.name,
            context_tokens=self._info.context_tokens,
            report=report,
            running=[self._running_run(key, running) for key, running in self.running],
            is_draining=self.link.is_draining,
            fingerprint=self._info.fingerprint,
            tokenizer=self._info.tokenizer,
            step_tokens=self._info.step_tokens,
            has_grammars=self._info.has_grammars,
            instance=self._instance,
            keeps_kv=not self._info.kv_layout,
            adapters=self.adapters.served(),
        )

    def _running_run(self, key: RequestId, running: Running) -> scheduler_pb2.RunningRun:
        held = self.holder.get(key)
        run = scheduler_pb2.RunningRun(run_id=running.run_id, assignment=running.assignment)
        if held is not None:
            run.held.CopyFrom(self._describe(held))
            run.held_us = round((time.monotonic() - (running.prefilled_s or running.received_s)) * 1e6)
        return run

    def _describe(self, held: Held) -> scheduler_pb2.HeldKv:
        return held.describe(self._info.kv_layout, self._engine.staging.path)

    def _report(self) -> scheduler_pb2.WorkerReport:
        headroom = replace(self._headroom, kv_free_tokens=self._headroom.kv_free_tokens - self.holder.num_tokens)
        report = headroom_to_pb(headroom, self._steps, last_assignment=self._last_accounted)
        report.is_delivering = self.delivery.is_delivering
        self._steps.clear()
        return report
