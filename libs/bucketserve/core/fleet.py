"""All workers of a model, ranked so that placement does not look at each of them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from bucketserve.core.messages import DispatchBatch
from bucketserve.core.outputs import OutputBook
from bucketserve.core.placement import load_score
from bucketserve.core.settings import CoreSettings
from bucketserve.core.step_times import StepTimes
from bucketserve.core.types import Batch, BatchId, Bucket, LimitedBy, Request, StepSample, WorkerId, WorkerRole
from bucketserve.core.workers import WorkerState, serves

__all__ = ["Fleet"]

CANDIDATES = 8
"""Workers that are scored for a request: the least loaded ones."""
TPOT_WEIGHT = 0.02
Kind = tuple[str, str, bool, frozenset[str]]
"""Of a worker (WorkerState.kind)."""
STALE_ENTRIES = 64
"""Of a ranking, before it is cleaned: beyond two for each worker."""


class _Ranking:
    """Workers by a value, greatest first; entries of a worker that changed since are skipped (lazy heap)."""

    def __init__(self, workers: Mapping[WorkerId, WorkerState]) -> None:
        self._workers = workers
        self._heap: list[tuple[float, WorkerId, int]] = []

    def put(self, worker: WorkerState, value: float) -> None:
        heapq.heappush(self._heap, (-value, worker.worker_id, worker.version))
        if len(self._heap) > STALE_ENTRIES + 2 * len(self._workers):
            # Below entries that stay, those that are out of date would gather for ever.
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapq.heapify(self._heap)

    def first(self, number: int, suits: Callable[[WorkerState], bool] | None = None) -> list[WorkerState]:
        """Returns the first workers whose entry is current, of those that suit."""
        found: list[WorkerState] = []
        entries = []
        heap = self._heap
        while heap and len(found) < number:
            entry = heapq.heappop(heap)
            if self._is_current(entry):
                entries.append(entry)
                worker = self._workers[entry[1]]
                if suits is None or suits(worker):
                    found.append(worker)
        for entry in entries:
            heapq.heappush(heap, entry)
        return found

    def _is_current(self, entry: tuple[float, WorkerId, int]) -> bool:
        worker = self._workers.get(entry[1])
        return worker is not None and worker.version == entry[2]


class Fleet:
    """Owns the workers' states and the rankings."""

    def __init__(self, settings: CoreSettings) -> None:
        """Starts empty."""
        self._settings = settings
        self._workers: dict[WorkerId, WorkerState] = {}
        self._num_given = 0
        """Batches."""
        self._num_changes = 0
        """Of all workers: no two states share a version, also if a worker leaves and comes again."""
        self._by_load = _Ranking(self._workers)
        self._by_memory = _Ranking(self._workers)
        self._for_small = _Ranking(self._workers)
        """Workers that take small batches only."""
        self._decoders = _Ranking(self._workers)
        self._all_round = _Ranking(self._workers)
        """Workers that do both."""
        self._for_bound = _Ranking(self._workers)
        """Workers that compute only prompts that are bound to their fingerprint."""
        self.times = StepTimes()
        """Of all workers together: for predictions before a worker is chosen."""
        self.outputs = OutputBook(settings.output_quantile)
        """How long outputs are."""
        self.tpot_s = 0.0
        """Duration of a step with decodes, exponentially weighted."""
        self.kv_total_tokens = 0
        self._starting: dict[Kind, dict[WorkerRole, int]] = {}
        """Most tokens that a worker of a kind and role could hold if it were empty, of those that compute prompts."""
        self._decoding: dict[str, int] = {}
        """The same of those that decode what others prefilled, by fingerprint."""
        self._decodable: dict[str, int] = {}
        """The same of those that stay: what drains takes nothing new over."""
        self._bound_decodable: dict[str, int] = {}
        """The same of those that go on with what is bound to their fingerprint."""
        self._bound_starting: dict[Kind, set[WorkerRole]] = {}
        """Roles of those that compute the prompts of what is bound to their fingerprint, by kind."""
        self.leaving: dict[WorkerId, WorkerState] = {}
        """Workers that drain and were not released yet."""
        self._open: set[WorkerId] = set()
        self._num_generations = 0
        self.fingerprints: set[str] = set()
        """Those of its workers."""
        self.is_computing = False
        """Whether any worker computes new prompts: one that stays, and whose KV somebody goes on with."""
        self.num_counted = 0
        """Changes so far of who is there, and in which role."""

    def __len__(self) -> int:
        """Number of workers."""
        return len(self._workers)

    def __iter__(self) -> Iterator[WorkerState]:
        """Yields the workers in order of joining."""
        return iter(self._workers.values())

    def get(self, worker_id: WorkerId) -> WorkerState | None:
        """Returns a worker."""
        return self._workers.get(worker_id)

    def join(self, worker: WorkerState) -> None:
        """Adds a worker, or puts one in its older state's place."""
        self.leave(worker.worker_id)
        like = next((other for other in self if other.fingerprint == worker.fingerprint), None)
        if like is None:
            self._num_generations += 1
        worker.generation = self._num_generations if like is None else like.generation
        self._workers[worker.worker_id] = worker
        self._count_all()
        self.changed(worker)

    def leave(self, worker_id: WorkerId) -> WorkerState | None:
        """Removes a worker."""
        worker = self._workers.pop(worker_id, None)
        if worker is not None:
            self._open.discard(worker_id)
            self.leaving.pop(worker_id, None)
            self._count_all()
        return worker

    def changed(self, worker: WorkerState) -> None:
        """Ranks a worker anew; to be called after every change of its state."""
        self._num_changes += 1
        worker.version = self._num_changes
        worker.room = worker.room_for_one(self._settings.memory_reserve)
        self._open.discard(worker.worker_id)
        if not worker.goes_on or (worker.role is WorkerRole.PREFILL and not worker.bound_tokens):
            # Nobody could go on with what it would prefill.
            return
        if worker.role is WorkerRole.DECODE:
            self._decoders.put(worker, worker.room)
            return
        if worker.role is WorkerRole.BOTH:
            self._all_round.put(worker, worker.room)
        if worker.free_sequences() > 0:
            worker.load = load_score(worker)
            if not worker.takes_new:
                self._for_bound.put(worker, worker.load)
            elif worker.has_place(self._settings, small=False):
                self._open.add(worker.worker_id)
                self._by_load.put(worker, worker.load)
                self._by_memory.put(worker, worker.room)
            elif worker.has_place(self._settings, small=True):
                self._for_small.put(worker, worker.load)

    def give(
        self, worker: WorkerState, requests: Sequence[Request], bucket: Bucket, limited_by: LimitedBy
    ) -> DispatchBatch:
        """Notes that a worker gets a batch of requests, as they are there; returns the order."""
        self._num_given += 1
        batch = Batch(
            batch_id=BatchId(f"{worker.worker_id}/{self._num_given}"),
            worker_id=worker.worker_id,
            assignment=worker.next_assignment(),
            bucket=bucket,
            request_ids=tuple(request.request_id for request in requests),
            prefill_tokens=sum(request.prefill_tokens for request in requests),
            padded_tokens=max(request.prefill_tokens for request in requests) * len(requests),
            reserved_kv_tokens=sum(request.reserved_tokens for request in requests),
            limited_by=limited_by,
            max_chunk_tokens=self._settings.max_chunk_tokens,
        )
        worker.assign(batch, requests)
        self.changed(worker)
        return DispatchBatch(batch)

    def drain(self, worker: WorkerState) -> None:
        """Notes that a worker wants to leave."""
        if worker.is_draining:
            return
        worker.is_draining = True
        self.leaving[worker.worker_id] = worker
        self._count_all()
        self.changed(worker)

    def away(self, worker: WorkerState) -> None:
        """Notes that nothing can be given to a worker until it joins again."""
        worker.is_away = True
        self.leaving.pop(worker.worker_id, None)
        self._count_all()
        self.changed(worker)

    def release(self, worker: WorkerState) -> None:
        """Notes that a draining worker gets nothing more."""
        worker.is_released = True
        del self.leaving[worker.worker_id]
        self._count_all()
        self.changed(worker)

    def switch(self, worker: WorkerState, role: WorkerRole) -> None:
        """Gives a worker another role; what it has stays booked as it is."""
        worker.role = role
        self._count_all()
        self.changed(worker)

    def resized(self) -> None:
        """Notes that a worker's memory has another size than before."""
        self._count_all()

    def set_adapters(self, worker: WorkerState, adapters: frozenset[str]) -> None:
        """Notes which adapters a worker has from now on."""
        worker.adapters = adapters
        self._count_all()
        self.changed(worker)

    @property
    def num_open(self) -> int:
        """Workers that may be given a batch of any size, memory permitting."""
        return len(self._open)

    def learn(self, worker: WorkerState, sample: StepSample) -> None:
        """Takes a measured step."""
        worker.times.learn(sample)
        self.times.learn(sample)
        if sample.decode_sequences:
            self.tpot_s += (sample.duration_s - self.tpot_s) * (TPOT_WEIGHT if self.tpot_s else 1.0)

    def could_hold(self, request: Request) -> bool:
        """Whether some worker that may serve the request could hold it if it were empty.

        True as well while there is none, or only one half of prefill and decode: the other may be on its way.
        """
        if not self._starting:
            return not self._decoding or request.reserved_tokens <= max(self._decoding.values())
        return any(
            _holds(largest, self._decoding.get(kind[0]), request)
            for kind, largest in self._starting.items()
            if serves(request, *kind)
        )

    def serves(self, request: Request) -> bool:
        """Whether some worker that computes prompts may serve the request (workers.serves).

        True as well while nobody computes any, or nobody decodes what is computed, unless it is bound to a fingerprint
        that may never come back.
        """
        if request.fingerprint:
            return any(
                serves(request, *kind) and (WorkerRole.BOTH in roles or self.decodes(request.fingerprint))
                for kind, roles in self._bound_starting.items()
            )
        return not self._starting or any(serves(request, *kind) for kind in self._starting)

    def decodes(self, fingerprint: str) -> bool:
        """Whether some worker takes over what others of its fingerprint prefilled."""
        return fingerprint in self._bound_decodable

    def could_decode(self, request: Request, fingerprint: str) -> bool:
        """Whether a worker that takes over what others of its fingerprint prefilled could hold the request if empty."""
        able = [worker for worker in self if worker.goes_on and _takes_over(worker, request, fingerprint)]
        decoders = [worker for worker in able if worker.role is WorkerRole.DECODE]
        others = [worker for worker in able if worker.role is WorkerRole.BOTH]
        return any(worker.could_hold(request) for worker in decoders or others)

    def candidates(self) -> list[WorkerState]:
        """Returns workers that may be given a batch: the least loaded, and the one with the most free KV.

        After them those that take small batches only, and those that take only what is bound to their fingerprint.
        """
        found = self._by_load.first(CANDIDATES)
        roomiest = self._by_memory.first(1)
        found += [worker for worker in roomiest if worker not in found]
        return found + self._for_small.first(CANDIDATES) + self._for_bound.first(CANDIDATES)

    def decoders(self, request: Request, fingerprint: str) -> list[WorkerState]:
        """Returns the decode workers with the most free KV that could go on with a request prefilled at a fingerprint.

        Where there is none, those that do both: they take what was prefilled before the roles changed, or they would
        leave it where it is for ever.
        """

        def suits(worker: WorkerState) -> bool:
            return _takes_over(worker, request, fingerprint)

        return self._decoders.first(CANDIDATES, suits) or self._all_round.first(CANDIDATES, suits)

    def _count_all(self) -> None:
        self.num_counted += 1
        self.fingerprints = {worker.fingerprint for worker in self._workers.values()}
        self._count_last()
        self._count_decodable()
        self.kv_total_tokens, self._starting = 0, {}
        for worker in self._workers.values():
            size = min(worker.headroom.kv_total_tokens, worker.context_tokens)
            if worker.role is not WorkerRole.DECODE:
                largest = self._starting.setdefault(worker.kind, {})
                largest[worker.role] = max(largest.get(worker.role, 0), size)
            if worker.role is not WorkerRole.PREFILL:
                self.kv_total_tokens += worker.headroom.kv_total_tokens
        self._decoding = _decoded_by(self._workers.values())
        self._decodable = _decoded_by(worker for worker in self._workers.values() if worker.stays)
        self._bound_decodable = _decoded_by(worker for worker in self._workers.values() if worker.goes_on)
        self._bound_starting = {}
        for worker in self._workers.values():
            if worker.goes_on and worker.role is not WorkerRole.DECODE:
                self._bound_starting.setdefault(worker.kind, set()).add(worker.role)
            tokens = self._decodable.get(worker.fingerprint, 0), self._bound_decodable.get(worker.fingerprint, 0)
            if (worker.decodable_tokens, worker.bound_tokens) != tokens:
                worker.decodable_tokens, worker.bound_tokens = tokens
                self.changed(worker)
        self.is_computing = any(worker.takes_new for worker in self._workers.values())

    def _count_decodable(self) -> None:
        """Finds what those can do that decode what others prefilled: their adapters, and whether there are grammars."""
        adapters: dict[str, frozenset[str]] = {}
        with_grammars = set[str]()
        for worker in self._workers.values():
            if worker.goes_on and worker.role is not WorkerRole.PREFILL:
                # One that does both takes over where no decoder could (decoders).
                adapters[worker.fingerprint] = adapters.get(worker.fingerprint, frozenset()) | worker.adapters
                if worker.has_grammars:
                    with_grammars.add(worker.fingerprint)
        for worker in self._workers.values():
            worker.decodable_adapters = adapters.get(worker.fingerprint, frozenset())
            worker.has_decodable_grammars = worker.fingerprint in with_grammars

    def _count_last(self) -> None:
        """Finds the workers that leave and do what nobody who stays could do for their fingerprint."""
        staying: dict[str, set[WorkerRole]] = {}
        for worker in self._workers.values():
            if worker.stays:
                staying.setdefault(worker.fingerprint, set()).add(worker.role)
        for worker in self._workers.values():
            is_last = worker.is_draining and not _replace(worker.role, staying.get(worker.fingerprint, ()))
            if worker.is_last != is_last:
                worker.is_last = is_last
                self.changed(worker)


def _takes_over(worker: WorkerState, request: Request, fingerprint: str) -> bool:
    """Whether a worker that decodes goes on with a request prefilled at a fingerprint."""
    return worker.fingerprint == fingerprint and serves(request, *worker.kind)


def _replace(role: WorkerRole, roles: Collection[WorkerRole]) -> bool:
    """Whether workers of those roles together do what one of that role does."""
    return WorkerRole.BOTH in roles or role in roles or {WorkerRole.PREFILL, WorkerRole.DECODE} <= set(roles)


def _decoded_by(workers: Iterable[WorkerState]) -> dict[str, int]:
    """Returns the most tokens that one of the workers that decode what others prefilled could hold, by fingerprint."""
    sizes: dict[WorkerRole, dict[str, int]] = {role: {} for role in WorkerRole}
    for worker in workers:
        of_role, size = sizes[worker.role], min(worker.headroom.kv_total_tokens, worker.context_tokens)
        of_role[worker.fingerprint] = max(of_role.get(worker.fingerprint, 0), size)
    # Those that do both take over only where nobody decodes alone (Fleet.decoders).
    return sizes[WorkerRole.BOTH] | sizes[WorkerRole.DECODE]


def _holds(largest: Mapping[WorkerRole, int], decode: int | None, request: Request) -> bool:
    """Whether workers of one kind could hold a request, given the largest that each role could."""
    both, prefill = largest.get(WorkerRole.BOTH), largest.get(WorkerRole.PREFILL)
    if both is not None and request.reserved_tokens <= both:
        return True
    if prefill is None or request.prompt_tokens > prefill:
        return False
    # The decode side may be on its way.
    return decode is None or request.reserved_tokens <= decode
