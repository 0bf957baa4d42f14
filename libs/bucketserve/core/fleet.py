"""All workers of a model, ranked so that placement does not look at each of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

from bucketserve.core.placement import load_score
from bucketserve.core.settings import CoreSettings
from bucketserve.core.step_times import StepTimes
from bucketserve.core.types import Request, StepSample, WorkerId, WorkerRole
from bucketserve.core.workers import WorkerState

__all__ = ["Fleet"]

CANDIDATES = 8
"""Workers that are scored for a request: the least loaded ones."""
TPOT_WEIGHT = 0.02


class _Ranking:
    """Workers by a value, greatest first; entries of a worker that changed since are skipped (lazy heap)."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, WorkerId, int]] = []

    def put(self, worker: WorkerState, value: float) -> None:
        heapq.heappush(self._heap, (-value, worker.worker_id, worker.version))

    def first(self, number: int, workers: Mapping[WorkerId, WorkerState]) -> list[WorkerState]:
        """Returns the first workers whose entry is current."""
        found: list[WorkerState] = []
        entries = []
        heap = self._heap
        while heap and len(found) < number:
            entry = heapq.heappop(heap)
            worker = workers.get(entry[1])
            if worker is not None and worker.version == entry[2]:
                found.append(worker)
                entries.append(entry)
        for entry in entries:
            heapq.heappush(heap, entry)
        return found


class Fleet:
    """Owns the workers' states and the rankings."""

    def __init__(self, settings: CoreSettings) -> None:
        """Starts empty."""
        self._settings = settings
        self._workers: dict[WorkerId, WorkerState] = {}
        self._by_load = _Ranking()
        self._by_memory = _Ranking()
        self._decoders = _Ranking()
        self.times = StepTimes()
        """Of all workers together: for predictions before a worker is chosen."""
        self.tpot_s = 0.0
        """Duration of a step with decodes, exponentially weighted."""
        self.kv_total_tokens = 0
        self._largest: dict[WorkerRole, int] = {}
        self._open: set[WorkerId] = set()

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
        older = self.leave(worker.worker_id)
        worker.version = older.version if older else 0
        self._workers[worker.worker_id] = worker
        self._count(worker)
        self.changed(worker)

    def leave(self, worker_id: WorkerId) -> WorkerState | None:
        """Removes a worker."""
        worker = self._workers.pop(worker_id, None)
        if worker is not None:
            self._open.discard(worker_id)
            self.kv_total_tokens, self._largest = 0, {}
            for other in self._workers.values():
                self._count(other)
        return worker

    def changed(self, worker: WorkerState) -> None:
        """Ranks a worker anew; to be called after every change of its state."""
        worker.version += 1
        worker.room = worker.room_for_one(self._settings.memory_reserve)
        self._open.discard(worker.worker_id)
        if worker.is_draining:
            return
        if worker.role is WorkerRole.DECODE:
            self._decoders.put(worker, worker.room)
        elif len(worker.outstanding) < self._settings.max_outstanding_batches and worker.free_sequences() > 0:
            self._open.add(worker.worker_id)
            worker.load = load_score(worker)
            self._by_load.put(worker, worker.load)
            self._by_memory.put(worker, worker.room)

    @property
    def num_open(self) -> int:
        """Workers that may be given a batch, memory permitting."""
        return len(self._open)

    def learn(self, worker: WorkerState, sample: StepSample) -> None:
        """Takes a measured step."""
        worker.times.learn(sample)
        self.times.learn(sample)
        if sample.decode_sequences:
            self.tpot_s += (sample.duration_s - self.tpot_s) * (TPOT_WEIGHT if self.tpot_s else 1.0)

    def could_hold(self, request: Request) -> bool:
        """Whether some worker could hold the request if it were empty; True while there is none at all."""
        if not self._workers:
            return True
        if request.reserved_tokens <= self._largest.get(WorkerRole.BOTH, 0):
            return True
        return request.prompt_tokens <= self._largest.get(
            WorkerRole.PREFILL, 0
        ) and request.reserved_tokens <= self._largest.get(WorkerRole.DECODE, 0)

    def candidates(self) -> list[WorkerState]:
        """Returns workers that may be given a batch: the least loaded, and the one with the most free KV."""
        found = self._by_load.first(CANDIDATES, self._workers)
        roomiest = self._by_memory.first(1, self._workers)
        return found + [worker for worker in roomiest if worker not in found]

    def decoders(self) -> list[WorkerState]:
        """Returns the decode workers with the most free KV, first."""
        return self._decoders.first(CANDIDATES, self._workers)

    def _count(self, worker: WorkerState) -> None:
        if worker.role is not WorkerRole.PREFILL:
            self.kv_total_tokens += worker.headroom.kv_total_tokens
        size = min(worker.headroom.kv_total_tokens, worker.context_tokens)
        self._largest[worker.role] = max(self._largest.get(worker.role, 0), size)
