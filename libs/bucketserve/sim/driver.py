"""The event loop of virtual time: arrivals and workers' steps in, a policy's decisions out.

The policy is anything with `step(events, now_s) -> Decision`: the production core itself, or a baseline. The driver
plays the parts of gateway, store, network and workers, each without delay of its own; KV transfers take their time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Protocol

from bucketserve.core.messages import (
    AdmitRequest,
    BatchPrefilled,
    CancelAtWorker,
    ChangeEdges,
    Command,
    Decision,
    DispatchBatch,
    Event,
    ForgetRequest,
    KvPulled,
    PlaceRequest,
    PreemptAtWorker,
    PullKv,
    RefuseRequest,
    ReleaseKv,
    RequestFinished,
    RequestResumed,
    RequestSubmitted,
    SaveOutputs,
    SwitchRole,
    WorkerJoined,
    WorkerReported,
)
from bucketserve.core.types import Batch, FinishReason, Request, RequestClass, RequestId, WorkerId
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.latency import DeviceModel
from bucketserve.sim.ledger import Ledger, Outcome, Record
from bucketserve.sim.sequence import SimSequence, StepOutcome, WorkerSpec
from bucketserve.sim.slo import Slo
from bucketserve.sim.window import Window
from bucketserve.sim.worker import SimWorker
from bucketserve.sim.workload import SimRequest, Workload

__all__ = ["Policy", "RunStats", "Simulation"]

MIN_WAKE_S = 1e-6
MAX_IDLE_CALLS = 100_000
STOP_CHECK_STEPS = 2048
"""Calls of the policy between two looks at whether a run is lost."""
FAR_S = 1e6
"""Batch-class requests are due in the end."""


class Policy(Protocol):
    """Decides; the production core and every baseline alike."""

    def step(self, events: Sequence[Event], now_s: float) -> Decision:
        """Returns what to do about the events at that time."""
        ...


@dataclass(slots=True)
class RunStats:
    """How the policy was called."""

    num_steps: int = 0
    num_edge_changes: int = 0
    policy_wall_s: float = 0.0
    longest_step_wall_s: float = 0.0


@dataclass(slots=True)
class _Move:
    sequence: SimSequence
    command: PullKv
    source_kv_tokens: int


class Simulation:
    """One run of one policy over one workload. Used once."""

    def __init__(
        self,
        policy: Policy,
        workers: Sequence[WorkerSpec],
        workload: Workload,
        device: DeviceModel,
        slo: Slo,
        *,
        turn_s: float = 0.0,
        stop_below: float = 0.0,
        stopwatch: Callable[[], float] = lambda: 0.0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Sets the stage.

        Args:
            policy: called for every instant at which something happens.
            workers: the cluster.
            workload: what arrives.
            device: for KV transfers and the unloaded prefill that SLOs refer to.
            slo: targets of every request.
            turn_s: least virtual time between two calls of the policy; events in between are handed over together,
                as the scheduler service does under load. 0: every instant.
            stop_below: the run ends early once its attainment is certain to be below that share; a search for a
                capacity needs to know no more of a rate that is too high. 0: it never does.
            stopwatch: real seconds, to time the policy with.
            on_progress: called now and then with (requests ended, requests in all).
        """
        self.ledger = Ledger()
        self.stats = RunStats()
        self.workers = {spec.worker_id: SimWorker(spec) for spec in workers}
        self.now_s = 0.0
        self._policy = policy
        self._workload = workload
        self._device = device
        self._slo = slo
        self._turn_s = turn_s
        longest_s = max((device.alone_s(r.prompt_tokens, r.output_tokens) for r in workload.requests), default=0.0)
        self.window = Window.of(workload.span_s, longest_s)
        self.has_stopped = False
        """It ended early: attainment is below stop_below, and most figures mean nothing."""
        self._stop_below = stop_below
        self._stopwatch = stopwatch
        self._on_progress = on_progress
        self._requests: dict[RequestId, Request] = {}
        self._heap: list[tuple[float, int, SimWorker | _Move | None]] = []
        self._pushed = 0
        self._link_free_s: dict[WorkerId, float] = {}
        self._moving: dict[RequestId, _Move] = {}
        self._stopping: set[RequestId] = set()
        """Cancelled at their worker; their end there is not a completion."""
        self._touched: dict[WorkerId, SimWorker] = {}
        self._wake_s = inf
        self._num_idle_calls = 0

    def run(self) -> Ledger:
        """Runs until every request has ended.

        Raises:
            SimulationError: the policy lost or doubled a request, overfilled a worker, or lets requests wait for ever.
        """
        self._call([self._joined(worker) for worker in self.workers.values()])
        arrivals = self._workload.requests
        num_arrived, next_turn_s, waiting_events = 0, 0.0, list[Event]()
        while self.ledger.num_open or num_arrived < len(arrivals) or waiting_events:
            now_s = self._next_s(arrivals, num_arrived, waiting_events, next_turn_s)
            if now_s is None:
                raise SimulationError(f"{self.ledger.num_open} requests wait and nothing will ever happen")
            self.now_s = now_s
            events = waiting_events
            while num_arrived < len(arrivals) and arrivals[num_arrived].arrival_s <= now_s:
                events.append(self._submitted(num_arrived, arrivals[num_arrived]))
                num_arrived += 1
            while self._heap and self._heap[0][0] <= now_s:
                self._happen(heapq.heappop(self._heap), events)
            if now_s >= next_turn_s and (events or self._wake_s <= now_s):
                self._wake_s = inf if self._wake_s <= now_s else self._wake_s
                self._call(events)
                waiting_events, next_turn_s = [], now_s + self._turn_s
                if self._on_progress is not None and self.stats.num_steps % 512 == 0:
                    self._on_progress(num_arrived - self.ledger.num_open, len(arrivals))
                if self._stop_below and self.stats.num_steps % STOP_CHECK_STEPS == 0 and self._is_lost():
                    self.has_stopped = True
                    break
            self._plan_workers()
        return self.ledger

    def _is_lost(self) -> bool:
        measured = [
            drawn
            for drawn in self._workload.requests
            if drawn.request_class is RequestClass.INTERACTIVE and drawn.arrival_s in self.window
        ]
        num_missed = sum(
            record.is_interactive and record.request.arrival_s in self.window and record.is_missed(self.now_s)
            for record in self.ledger.records.values()
        )
        return num_missed > (1 - self._stop_below) * len(measured) > 0

    def _next_s(
        self, arrivals: Sequence[SimRequest], num_arrived: int, waiting: Sequence[Event], turn_s: float
    ) -> float | None:
        times = [self._heap[0][0]] if self._heap else []
        if num_arrived < len(arrivals):
            times.append(arrivals[num_arrived].arrival_s)
        if waiting:
            times.append(turn_s)
        return max(min(times), self.now_s) if times else None

    def _call(self, events: Sequence[Event]) -> None:
        start = self._stopwatch()
        decision = self._policy.step(events, self.now_s)
        took_s = self._stopwatch() - start
        self.stats.num_steps += 1
        self.stats.policy_wall_s += took_s
        self.stats.longest_step_wall_s = max(self.stats.longest_step_wall_s, took_s)
        for command in decision.commands:
            self._obey(command)
        for drop in decision.drops:
            self.ledger.ended(drop.request_id, Outcome.DROPPED, self.now_s, drop.reason)
            self._requests.pop(drop.request_id, None)
        if decision.wake_s is not None and decision.wake_s < self._wake_s:
            # A wake-up in the past would stop the clock.
            self._wake_s = max(decision.wake_s, self.now_s + MIN_WAKE_S)
            self._push(self._wake_s, None)
        self._num_idle_calls = 0 if events or decision.commands else self._num_idle_calls + 1
        if self._num_idle_calls > MAX_IDLE_CALLS:
            raise SimulationError(f"{self.ledger.num_open} requests wait and the policy only asks to be woken again")

    # --- events -------------------------------------------------------------------------------------------------

    def _submitted(self, index: int, drawn: SimRequest) -> RequestSubmitted:
        request_id = RequestId(f"r{index:07d}")
        ttft_s = self._slo.ttft_s(self._device, drawn.prompt_tokens)
        request = self._slo.request(request_id, drawn, ttft_s)
        self.ledger.open(request_id, Record(drawn, ttft_s, self._slo.tpot_s))
        self._requests[request_id] = request
        return RequestSubmitted(request)

    def _joined(self, worker: SimWorker) -> WorkerJoined:
        return WorkerJoined(
            worker_id=worker.spec.worker_id,
            role=worker.role,
            headroom=worker.headroom(),
            context_tokens=self._device.context_tokens,
            step_tokens=worker.spec.mode.max_step_tokens,
        )

    def _happen(self, entry: tuple[float, int, SimWorker | _Move | None], events: list[Event]) -> None:
        at_s, _, thing = entry
        if isinstance(thing, SimWorker):
            # A leap that was cut or extended left its old end in the heap.
            if thing.end_s == at_s:
                self._tell(thing, thing.finish(), events)
        elif thing is not None:
            self._moved(thing, events)

    def _tell(self, worker: SimWorker, outcome: StepOutcome, events: list[Event]) -> None:
        """Turns what a worker's step brought into what the worker would say."""
        worker_id = worker.spec.worker_id
        by_batch: dict[int, list[SimSequence]] = {}
        for sequence in outcome.prefilled:
            self.ledger.first_token(sequence.request_id, self.now_s)
            by_batch.setdefault(sequence.assignment, []).append(sequence)
        for assignment, sequences in by_batch.items():
            events.append(
                BatchPrefilled(
                    worker_id=worker_id,
                    assignment=assignment,
                    request_ids=tuple(sequence.request_id for sequence in sequences),
                    held=tuple(s.request_id for s in sequences if worker.held(s.request_id) is not None),
                    cached_tokens=tuple(sequence.num_reused for sequence in sequences),
                )
            )
        for sequence in outcome.finished:
            if sequence.request_id in self._stopping:
                self._stopping.discard(sequence.request_id)
            else:
                self.ledger.ended(sequence.request_id, Outcome.FINISHED, self.now_s)
                self.ledger.records[sequence.request_id].num_evictions += sequence.num_evictions
            self._requests.pop(sequence.request_id, None)
            events.append(
                RequestFinished(
                    request_id=sequence.request_id,
                    worker_id=worker_id,
                    assignment=sequence.assignment,
                    output_tokens=sequence.num_generated,
                )
            )
        for sequence in outcome.preempted:
            events += self._preempted(worker_id, sequence)
        events.append(WorkerReported(worker_id=worker_id, headroom=worker.headroom(), steps=tuple(outcome.samples)))
        self._touched[worker_id] = worker

    def _preempted(self, worker_id: WorkerId, sequence: SimSequence) -> Iterator[Event]:
        """Yields what worker and gateway say of a request that was let go: it goes on as its next attempt."""
        request_id = sequence.request_id
        yield RequestFinished(
            request_id=request_id,
            worker_id=worker_id,
            assignment=sequence.assignment,
            output_tokens=sequence.num_generated,
            reason=FinishReason.PREEMPTED,
        )
        request = self._requests.pop(request_id)
        resumed = replace(
            request,
            request_id=RequestId(f"{request_id.partition('.')[0]}.{request.num_preemptions + 1}"),
            prompt_tokens=request.prompt_tokens + sequence.num_generated,
            max_new_tokens=request.max_new_tokens - sequence.num_generated,
            is_resumed=True,
            num_preemptions=request.num_preemptions + 1,
        )
        self._requests[resumed.request_id] = resumed
        self.ledger.preempted(request_id, resumed.request_id, sequence.num_generated)
        yield RequestResumed(resumed)

    def _moved(self, move: _Move, events: list[Event]) -> None:
        command = move.command
        source, target = self.workers[command.source_id], self.workers[command.target_id]
        if source is not target:
            source.release(command.request_id, move.source_kv_tokens)
        move.sequence.assignment = command.assignment
        target.join(move.sequence)
        del self._moving[command.request_id]
        if command.request_id in self._stopping:
            target.cancel(command.request_id)
        events.append(
            KvPulled(
                request_id=command.request_id,
                target_id=command.target_id,
                assignment=command.assignment,
                is_ok=True,
            )
        )
        for worker in (source, target):
            events.append(WorkerReported(worker_id=worker.spec.worker_id, headroom=worker.headroom()))
            self._touched[worker.spec.worker_id] = worker

    # --- commands -----------------------------------------------------------------------------------------------

    def _obey(self, command: Command) -> None:
        match command:
            case AdmitRequest(request=request):
                self.ledger.admitted(request.request_id)
            case RefuseRequest(request_id=request_id, reason=reason):
                self.ledger.ended(request_id, Outcome.REFUSED, self.now_s, reason)
                self._requests.pop(request_id, None)
            case DispatchBatch(batch=batch):
                self._dispatch(batch)
            case PullKv():
                self._move(command)
            case CancelAtWorker(worker_id=worker_id, request_id=request_id):
                self._cancel(self.workers[worker_id], request_id)
            case PreemptAtWorker(worker_id=worker_id, request_id=request_id):
                self.workers[worker_id].preempt(request_id)
                self._touched[worker_id] = self.workers[worker_id]
            case ChangeEdges():
                self.stats.num_edge_changes += 1
            case SwitchRole(worker_id=worker_id, role=role):
                self.workers[worker_id].role = role
            case ForgetRequest() | PlaceRequest() | ReleaseKv() | SaveOutputs():
                pass

    def _dispatch(self, batch: Batch) -> None:
        self.ledger.dispatched(batch, self.now_s)
        worker = self.workers[batch.worker_id]
        worker.add((self._sequence(request_id, batch) for request_id in batch.request_ids), batch.assignment)
        self._touched[batch.worker_id] = worker

    def _sequence(self, request_id: RequestId, batch: Batch) -> SimSequence:
        request, record = self._requests[request_id], self.ledger.records[request_id]
        drawn = record.request
        return SimSequence(
            request_id=request_id,
            prompt_tokens=request.prompt_tokens,
            output_tokens=min(drawn.output_tokens - record.num_generated, request.max_new_tokens),
            max_new_tokens=request.max_new_tokens,
            batch_id=batch.batch_id,
            assignment=batch.assignment,
            max_chunk_tokens=batch.max_chunk_tokens,
            due_s=drawn.arrival_s + (record.ttft_slo_s if record.is_interactive else FAR_S),
            tpot_slo_s=record.tpot_slo_s if record.is_interactive else inf,
            is_batch=not record.is_interactive,
            num_preemptions=request.num_preemptions,
            block_hashes=drawn.block_hashes,
        )

    def _move(self, command: PullKv) -> None:
        source, target = self.workers[command.source_id], self.workers[command.target_id]
        sequence = source.held(command.request_id)
        if sequence is None or command.request_id in self._moving:
            raise SimulationError(f"{command.request_id} has no KV to pull from {command.source_id}")
        move = _Move(sequence, command, sequence.kv_tokens)
        self._moving[command.request_id] = move
        self._touched[command.target_id] = target
        if source is target:
            # Its role has changed, and it goes on with what it holds: nothing is there twice, and nothing moves.
            source.release(command.request_id, move.source_kv_tokens)
            target.expect(sequence)
            self._push(self.now_s, move)
            return
        target.expect(sequence)
        # Transfers into one worker share its link, one after the other.
        start_s = max(self.now_s, self._link_free_s.get(command.target_id, 0.0))
        end_s = start_s + self._device.kv_transfer_s(sequence.prompt_tokens)
        self._link_free_s[command.target_id] = end_s
        self._push(end_s, move)

    def _cancel(self, worker: SimWorker, request_id: RequestId) -> None:
        if request_id in self._requests:
            self._stopping.add(request_id)
            if request_id not in self._moving:
                worker.cancel(request_id)
                self._touched[worker.spec.worker_id] = worker

    # --- workers ------------------------------------------------------------------------------------------------

    def _plan_workers(self) -> None:
        """Lets every worker that something happened to go on."""
        touched: Iterable[SimWorker] = list(self._touched.values())
        self._touched.clear()
        for worker in touched:
            before_s = worker.end_s
            worker.plan(self.now_s)
            if worker.end_s is not None and worker.end_s != before_s:
                self._push(worker.end_s, worker)

    def _push(self, at_s: float, thing: SimWorker | _Move | None) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (at_s, self._pushed, thing))
