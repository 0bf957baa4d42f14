"""A world around the core: what store, workers and gateways do with its decisions, and what must hold of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from bucketserve.core.lifecycle import State
from bucketserve.core.messages import (
    AdaptersChanged,
    AdmitFailed,
    AdmitRequest,
    CancelAtWorker,
    ChangeEdges,
    ContextExtended,
    Decision,
    DispatchBatch,
    DispatchFailed,
    Drop,
    DropReason,
    Event,
    ForgetRequest,
    KvPulled,
    PlaceRequest,
    PreemptAtWorker,
    PullKv,
    RefuseReason,
    RefuseRequest,
    ReleaseKv,
    ReleaseWorker,
    RequestCancelled,
    RequestResumed,
    RequestSubmitted,
    SaveOutputs,
    SwitchRole,
    WorkerAway,
    WorkerDraining,
    WorkerLost,
)
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings, Placement
from bucketserve.core.types import Batch, Request, RequestClass, RequestId, WorkerId, WorkerRole
from tests.builders import a_request
from tests.property.core.books import check_agreement, check_empty
from tests.property.core.peers import Client, Phase, Worker

CONTEXT = 2048
HALVES = (WorkerRole.PREFILL, WorkerRole.DECODE)
RESUMABLE = (DropReason.WORKER_LOST, DropReason.WORKER_FAILED)


class World:
    """One model's world. Every turn checks the decision and the core's books."""

    def __init__(
        self,
        core_settings: CoreSettings,
        workers: list[Worker],
        outputs: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """outputs: what is known of them, true or not."""
        self.settings = core_settings
        self.workers = {worker.worker_id: worker for worker in workers}
        self.clients: dict[str, Client] = {}
        self.client_of: dict[RequestId, Client] = {}
        self.resumptions: list[Request] = []
        for worker in workers:
            worker.clients = self.client_of
            worker.resumptions = self.resumptions
            worker.is_queueing = core_settings.placement is not Placement.LATE
        self.ends: Counter[RequestId] = Counter()
        self.store: dict[RequestId, tuple[Request, WorkerId | None]] = {}
        self.edges: tuple[int, ...] = ()
        self.context_tokens = CONTEXT
        self.expected: set[WorkerId] = set()
        """Workers whose stream broke and that are not lost yet."""
        self.own_events: list[Event] = []
        self.num_not_stored = 0
        """Admissions that the store will refuse."""
        self.placed_at: dict[RequestId, WorkerId] = {}
        """As gateways were told."""
        self.now_s = 0.0
        self.logs: list[tuple[tuple, list[tuple[float, list[Event], Decision]]]] = []
        self.outputs = dict(outputs or {})
        self.begin((), {}, ())

    def __repr__(self) -> str:
        workers = ", ".join(
            f"{w.worker_id} {w.role.value} {w.capacity} {w.context_tokens} {w.fingerprint}/{w.tokenizer}"
            for w in self.workers.values()
        )
        return f"World({workers}; {self.settings})"

    def begin(self, parked: tuple, running: dict, edges: tuple[int, ...]) -> None:
        self.core = SchedulerCore(self.settings, self.context_tokens)
        self.core.restore(parked=parked, running=running, edges=edges, outputs=self.outputs)
        self.dispatched: Counter[RequestId] = Counter()
        self.logs.append(((self.context_tokens, parked, running, edges, dict(self.outputs)), []))

    # --- turns --------------------------------------------------------------------------------------------------

    def turn(self, events: list[Event] = (), elapsed_s: float = 0.1) -> None:
        self.now_s += elapsed_s
        events = [*self.own_events, *events]
        self.own_events = []
        decision = self.core.step(events, self.now_s)
        self.logs[-1][1].append((self.now_s, events, decision))
        assert decision.faults == ()
        dispatched = self.write(decision)
        self.tell(decision, dispatched)
        self.check_books()
        self.check_workers()

    def write(self, decision: Decision) -> dict[str, list[Request]]:
        """Does what the store does; returns the requests of each batch that it had as waiting."""
        ended = [c for c in decision.commands if isinstance(c, ForgetRequest | RefuseRequest)] + list(decision.drops)
        for end in ended:
            self.store.pop(end.request_id, None)
        gone = {end.request_id for end in ended}
        refused, dispatched = [], {}
        for command in decision.commands:
            match command:
                case AdmitRequest(request=request) if request.request_id not in gone:
                    if self.num_not_stored:
                        self.num_not_stored -= 1
                        refused.append(request.request_id)
                    else:
                        self.store[request.request_id] = request, None
                case DispatchBatch(batch=batch):
                    dispatched[batch.batch_id] = self.store_dispatch(batch, refused)
                case PlaceRequest(request_id=request_id, worker_id=worker_id) if request_id in self.store:
                    self.store[request_id] = self.store[request_id][0], worker_id
                case SaveOutputs(counts=counts):
                    self.outputs |= counts
                case ChangeEdges(edges=edges):
                    assert list(edges) == sorted(set(edges))
                    self.edges = edges
        # A full store may have a ticket of an earlier leader: that was dispatched, and is not to be refused.
        sent = {request.request_id for requests in dispatched.values() for request in requests}
        refused = [request_id for request_id in refused if request_id not in sent]
        if refused:
            self.own_events.append(AdmitFailed(tuple(refused)))
        return dispatched

    def store_dispatch(self, batch: Batch, refused: list[RequestId]) -> list[Request]:
        had, lost = [], []
        for request_id in batch.request_ids:
            assert not self.ends[request_id]
            request, worker_id = self.store.get(request_id, (None, None))
            if request is not None and worker_id is None:
                self.store[request_id] = request, batch.worker_id
                had.append(request)
            elif request_id not in refused:
                lost.append(request_id)
        if lost:
            self.own_events.append(DispatchFailed(worker_id=batch.worker_id, request_ids=tuple(lost)))
        requests = [self.client_of[request_id].attempts[request_id] for request_id in batch.request_ids]
        if any(request.block_hashes for request in requests):
            # Of what is known somewhere less is computed, how much depends on where.
            assert len(requests) <= batch.prefill_tokens <= sum(request.prompt_tokens for request in requests)
        else:
            assert all(batch.bucket.low <= request.prefill_tokens < batch.bucket.high for request in requests)
            assert batch.prefill_tokens == sum(request.prefill_tokens for request in requests)
        assert batch.reserved_kv_tokens == sum(request.reserved_tokens for request in requests)
        self.check_engine(batch, requests)
        return had

    def check_engine(self, batch: Batch, requests: list[Request]) -> None:
        """Only the same fingerprint goes on with an output, and no tokenizer's ids are read as another's."""
        worker = self.workers[batch.worker_id]
        for request in requests:
            assert request.fingerprint in ("", worker.fingerprint)
            assert not (request.tokenizer and worker.tokenizer) or request.tokenizer == worker.tokenizer
            known = self.core._fleet.get(batch.worker_id)
            assert known is not None
            assert not request.adapter or request.adapter in known.adapters == worker.adapters
            assert known.kv_tokens(request) <= worker.context_tokens

    def tell(self, decision: Decision, dispatched: dict[str, list[Request]]) -> None:
        """Does what gateways and workers do, as the scheduler tells them: whatever frees memory before the rest."""
        self.free(decision)
        for command in decision.commands:
            match command:
                case RefuseRequest(request_id=request_id, reason=reason):
                    client = self.client_of[request_id]
                    assert reason is RefuseReason.STORE_FULL or client.attempts[request_id].is_resumed is False
                    self.end(request_id, "refused")
                case DispatchBatch(batch=batch):
                    self.send(batch, dispatched[batch.batch_id])
                case PullKv():
                    self.order_pull(command)
                case PlaceRequest(request_id=request_id, worker_id=worker_id):
                    self.placed_at[request_id] = worker_id
                case SwitchRole(worker_id=worker_id, role=role):
                    self.to_worker(worker_id, role)
                case ReleaseWorker(worker_id=worker_id):
                    self.release(self.workers[worker_id])
                case ForgetRequest(request_id=request_id, was_cancelled=was_cancelled):
                    if not was_cancelled or not self.resume_later(request_id):
                        self.end(request_id, "given up")
        for drop in decision.drops:
            self.drop(drop)

    def free(self, decision: Decision) -> None:
        for command in decision.commands:
            if isinstance(command, CancelAtWorker | ReleaseKv):
                self.to_worker(command.worker_id, command.request_id)
        for command in decision.commands:
            if isinstance(command, PreemptAtWorker):
                self.order_preemption(command)
        sent = {rid for c in decision.commands if isinstance(c, DispatchBatch) for rid in c.batch.request_ids}
        let_go = {command.request_id for command in decision.commands if isinstance(command, PreemptAtWorker)}
        # The order would come before what it is about.
        assert not sent & let_go

    def release(self, worker: Worker) -> None:
        """A worker hears that it may go: whatever only its fingerprint can finish, others could."""
        assert worker.is_connected
        assert worker.is_draining
        assert not worker.is_released
        worker.is_released = True
        known = [(w, self.core._fleet.get(w.worker_id)) for w in self.workers.values() if w.is_connected]
        staying = {
            state.role
            for other, state in known
            if state is not None and other.fingerprint == worker.fingerprint and not other.is_draining
        }
        if WorkerRole.BOTH in staying or staying >= (set(HALVES) if worker.role is WorkerRole.BOTH else {worker.role}):
            return
        assert not [life for life in self.core._lives if life.request.fingerprint == worker.fingerprint]
        for other, state in known:
            assert other.fingerprint != worker.fingerprint or not state or not state.requests

    def check_leaving(self, worker_id: WorkerId, requests: list[Request]) -> None:
        """One that leaves gets only what is bound to its fingerprint, and nothing once it was told so."""
        worker = self.workers[worker_id]
        if worker.is_draining and worker.is_connected:
            assert not worker.is_released
            assert {request.fingerprint for request in requests} <= {worker.fingerprint}

    def send(self, batch: Batch, requests: list[Request]) -> None:
        self.check_leaving(batch.worker_id, requests)
        for request in requests:
            self.dispatched[request.request_id] += 1
            # Under one leader a run is never sent twice.
            assert self.dispatched[request.request_id] == 1
            self.placed_at[request.request_id] = batch.worker_id
        if requests:
            self.to_worker(batch.worker_id, (batch, requests))

    def to_worker(self, worker_id: WorkerId, order: object) -> None:
        if self.workers[worker_id].is_connected:
            self.workers[worker_id].inbox.append(order)

    def order_preemption(self, order: PreemptAtWorker) -> None:
        """Only who may be, never somebody who waits for each token, and nobody twice at one worker."""
        request = self.client_of[order.request_id].attempts[order.request_id]
        assert request.request_class is RequestClass.BATCH
        assert request.may_be_preempted
        assert order not in self.workers[order.worker_id].inbox
        self.to_worker(order.worker_id, order)

    def order_pull(self, pull: PullKv) -> None:
        source, target = self.workers[pull.source_id], self.workers[pull.target_id]
        assert source.fingerprint == target.fingerprint
        request = self.client_of[pull.request_id].attempts[pull.request_id]
        assert not request.adapter or request.adapter in target.adapters
        self.check_leaving(pull.target_id, [])
        if source.is_connected:
            self.to_worker(pull.target_id, pull)
        else:
            failed = KvPulled(
                request_id=pull.request_id, target_id=pull.target_id, assignment=pull.assignment, is_ok=False
            )
            self.own_events.append(failed)

    def end(self, request_id: RequestId, outcome: str) -> None:
        """Notes the end of a run, and of its client's request, unless that had ended by what was delivered."""
        self.ends[request_id] += 1
        assert self.ends[request_id] == 1
        client = self.client_of[request_id]
        if client.request.num_preemptions > client.attempts[request_id].num_preemptions:
            # Its client heard from its worker that it was let go, and waits for the next attempt.
            return
        assert client.request.request_id == request_id or not client.is_open
        # A client that waits hears how it ended, and it is not over before the last attempt.
        assert not client.is_open or client.is_gone or outcome != "given up" or client.is_last_attempt
        if client.is_open:
            client.outcomes.append(outcome)

    def drop(self, drop: Drop) -> None:
        if drop.reason not in RESUMABLE or not self.resume_later(drop.request_id):
            self.end(drop.request_id, f"dropped: {drop.reason.value}")

    def resume_later(self, request_id: RequestId) -> bool:
        """Ends a run whose client goes on with the next attempt; returns False if nobody waits, or it was the last."""
        client = self.client_of[request_id]
        if not client.is_of(request_id) or client.is_last_attempt:
            return False
        worker_id = self.placed_at.get(request_id)
        fingerprint = self.workers[worker_id].fingerprint if worker_id is not None else ""
        request = client.next_attempt(worker_id, fingerprint)
        self.ends[request_id] += 1
        assert self.ends[request_id] == 1
        self.client_of[request.request_id] = client
        self.resumptions.append(request)
        return True

    def check_books(self) -> None:
        """What the core's parts know of its requests agrees at every moment."""
        assert not any(self.ends[life.request.request_id] for life in self.core._lives)
        check_agreement(self.core, self.now_s)

    def check_workers(self) -> None:
        """What runs at a worker is known to be there, or is told to stop; who may not be let go has room there."""
        for worker in self.workers.values():
            known = [run for run in worker.runs.values() if worker.has_begun(run) or not worker.is_queueing]
            stays = [run.reserved_tokens for run in known if not run.is_growing]
            assert sum(stays) <= worker.capacity
            for request_id in worker.runs if worker.is_connected else ():
                life = self.core._lives.get(request_id)
                is_known = life is not None and worker.worker_id in life.workers
                assert is_known or request_id in worker.inbox

    # --- what happens -------------------------------------------------------------------------------------------

    def request(self, prompt_tokens: int, max_new_tokens: int, life_s: float | None = None, **more) -> Request:
        """Returns a new client's request."""
        name = f"r{len(self.clients):03}"
        deadline_s = None if life_s is None else self.now_s + life_s
        output_tokens = more.pop("output_tokens", max_new_tokens)
        request = a_request(f"{name}.1", prompt_tokens, max_new_tokens, self.now_s, deadline_s=deadline_s, **more)
        client = Client(name, request, output_tokens, {request.request_id: request})
        self.clients[name] = self.client_of[request.request_id] = client
        return request

    def submit(self, requests: list[Request]) -> None:
        self.turn([RequestSubmitted(request) for request in requests])

    def cancel(self, client: Client) -> None:
        client.is_gone = True
        if client.request in self.resumptions:
            self.resumptions.remove(client.request)
            client.outcomes.append("cancelled")
        self.turn([RequestCancelled(client.request.request_id)])

    def resume(self) -> None:
        """Gateways say the next attempts of what was lost or let go, and that nobody waits for those before."""
        events: list[Event] = []
        for request in self.resumptions:
            *_, former, _ = self.client_of[request.request_id].attempts
            events += [RequestCancelled(former), RequestResumed(request)]
        self.resumptions.clear()
        self.turn(events)

    def deliver(self, worker: Worker, elapsed_s: float = 0.1) -> None:
        """Lets through what a worker was told and what it says."""
        worker.obey()
        events, worker.outbox = worker.outbox, []
        self.turn(events, elapsed_s)

    def connect(self, worker: Worker) -> None:
        self.expected.discard(worker.worker_id)
        events: list[Event] = [worker.connect()]
        if worker.is_draining:
            events.append(WorkerDraining(worker.worker_id))
        self.context_tokens = max(self.context_tokens, worker.context_tokens)
        self.turn(events)

    def change_adapters(self, worker: Worker, adapters: frozenset[str]) -> None:
        """A worker that is connected says so; of another one its next hello does."""
        worker.adapters = adapters
        if worker.is_connected:
            self.turn([AdaptersChanged(worker.worker_id, adapters)])

    def cut(self, worker: Worker) -> None:
        worker.hang_up()
        self.expected.add(worker.worker_id)
        self.turn([WorkerAway(worker.worker_id)])

    def lose(self, worker_id: WorkerId) -> None:
        self.workers[worker_id].hang_up()
        self.expected.discard(worker_id)
        self.turn([WorkerLost(worker_id)])

    def extend(self, context_tokens: int) -> None:
        self.context_tokens = max(self.context_tokens, context_tokens)
        self.turn([ContextExtended(context_tokens)])

    def end_pull(self, worker: Worker, *, is_ok: bool) -> None:
        """Ends the first transfer; one whose source has nothing any more can't succeed."""
        if (request_id := worker.first(Phase.PULLING)) is None:
            return
        pull = worker.runs[request_id].pull
        assert pull is not None
        source = self.workers[pull.source_id]
        kept = source.runs.get(request_id)
        is_there = source is worker or (kept is not None and kept.phase is Phase.HELD)
        worker.end_pull(request_id, is_ok=is_ok and is_there)

    def take_over(self) -> None:
        """Another scheduler leads: it knows what the store holds, without times; every stream breaks."""
        self.own_events = []
        for worker in self.workers.values():
            worker.hang_up()
        timeless = [
            (replace(request, arrival_s=self.now_s, deadline_s=None), worker_id)
            for request, worker_id in self.store.values()
        ]
        running = {request: worker_id for request, worker_id in timeless if worker_id is not None}
        parked = tuple(request for request, worker_id in timeless if worker_id is None)
        self.expected = set(running.values())
        self.begin(parked, running, self.edges)

    def is_known(self, request_id: RequestId) -> bool:
        """Whether the scheduler knows of a run: what it took over and nobody says again, it ends itself."""
        return request_id in self.store or self.core._lives.get(request_id) is not None

    def say_again(self) -> None:
        """Gateways say what is open to a new leader, and what nobody waits for any more."""
        events: list[Event] = []
        for client in self.clients.values():
            request = client.request
            former = [rid for rid in client.attempts if rid != request.request_id and self.is_known(rid)]
            events += [RequestCancelled(request_id) for request_id in former]
            if request in self.resumptions or not (client.is_open or self.is_known(request.request_id)):
                continue
            life = self.core._lives.get(request.request_id)
            if client.is_gone or not client.is_open:
                events.append(RequestCancelled(request.request_id))
                if life is None and client.is_open:
                    client.outcomes.append("cancelled")
            elif life is None or (
                life.state is State.PARKED and request.request_id not in self.core._patience._orphans
            ):
                events.append(RequestResumed(request))
        self.turn(events)

    # --- the end ------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Lets everything come to its end: all that is away comes, and nothing goes wrong any more."""
        self.num_not_stored = 0
        for worker_id in sorted(self.expected):
            self.lose(worker_id)
        for worker in self.workers.values():
            if worker.is_draining or not worker.is_connected:
                worker.is_draining = False
                self.connect(worker)
        self.complete()
        self.say_again()
        for _ in range(4 * len(self.clients) + 200):
            self.resume()
            for worker in self.workers.values():
                worker.obey()
                for _ in range(4):
                    worker.prefill_one()
                    self.end_pull(worker, is_ok=True)
                    worker.finish_one(ends_alone=False)
                worker.decode(20)
                worker.report()
                self.deliver(worker, elapsed_s=1.0)
            if not list(self.core._lives) and not self.resumptions:
                break

    def complete(self) -> None:
        """Brings the decode workers of those fingerprints that only prefill."""
        roles = {worker.worker_id: worker.role for worker in self.core._fleet}
        workers = list(self.workers.values())
        able = {worker.fingerprint for worker in workers if roles[worker.worker_id] is not WorkerRole.PREFILL}
        for fingerprint in sorted({worker.fingerprint for worker in workers} - able):
            worker_id = WorkerId(f"decode-{fingerprint}")
            self.workers[worker_id] = Worker(
                worker_id, 9000, WorkerRole.DECODE, fingerprint, "", self.context_tokens, self.client_of
            )
            self.connect(self.workers[worker_id])

    def check_end(self) -> None:
        """Everything has ended, once, and no book remembers anything of it."""
        assert {name: client.outcomes for name, client in self.clients.items() if len(client.outcomes) != 1} == {}
        assert not self.store
        for worker in self.workers.values():
            self.deliver(worker)
            assert worker.runs == {}
        check_empty(self.core)

    def check_replay(self) -> None:
        """The same events at the same times bring the same decisions."""
        for (context_tokens, parked, running, edges, outputs), steps in self.logs:
            core = SchedulerCore(self.settings, context_tokens)
            core.restore(parked=parked, running=running, edges=edges, outputs=outputs)
            for now_s, events, decision in steps:
                assert core.step(events, now_s) == decision
