"""Placement of requests whose beginning some worker has computed already (core/prefixes.py).

Such a request goes to the worker with the least

    (prompt tokens given to it and not computed + tokens of this prompt that it lacks) x (sequences there + 1)

(LMetric, arXiv 2603.15202), so that a worker that has much of the prompt is preferred until it is loaded by so much
more than others. If that worker has no room, the request comes later for the others, by a multiple of the seconds that
it would spare: so long it waits for it, and so much later it counts in the order of what they take. It is overtaken by
nothing whose key is later than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from bucketserve.core.fleet import Fleet
from bucketserve.core.placement import can_take, place
from bucketserve.core.prefixes import PrefixIndex
from bucketserve.core.settings import CoreSettings, QueueOrder
from bucketserve.core.types import Request, WorkerId, WorkerRole
from bucketserve.core.workers import WorkerState

__all__ = ["MAX_LOOKED_AT", "Affinity", "Pick"]

WAITS = 4.0
"""Times what a worker would spare, for which a request waits for it.

What is computed twice delays everybody at the other worker, and what is forgotten there to make room is computed twice
as well: under load, waiting for so long pays (docs/adr/0022-placement-by-prefix.md).
"""
MAX_HOLDERS = 8
"""Of a prompt's beginning that are scored beside the candidates."""
MAX_LOOKED_AT = 32
"""Requests of a bucket that are looked at or passed over for one that fits a worker."""


@dataclass(frozen=True, slots=True)
class Pick:
    """Who goes next out of a bucket, and where."""

    request: Request
    worker: WorkerState | None
    """None: no worker can take it now."""


class Affinity:
    """Reads the workers; owns what is known of their prefixes."""

    def __init__(self, settings: CoreSettings, fleet: Fleet) -> None:
        """Knows of no prefix."""
        self._settings = settings
        self._fleet = fleet
        self.index = PrefixIndex()

    def expected(self, request: Request) -> Request:
        """Returns a new request as it counts in the queue: with what the worker has that has most of its prompt."""
        tokens, holders = self.index.holders(request.block_hashes)
        return _with_cached(request, tokens if self._serving(request, holders) else 0)

    def at(self, request: Request, worker_id: WorkerId) -> Request:
        """Returns a request with what that worker has of its prompt."""
        if not request.block_hashes:
            return request
        return _with_cached(request, self.index.tokens_at(worker_id, request.block_hashes))

    def cold(self, request: Request) -> Request:
        """Returns a request as it is at a worker that has nothing of its prompt."""
        return _with_cached(request, 0) if request.block_hashes else request

    def computed(self, request: Request, worker_id: WorkerId, found: int | None) -> None:
        """Notes that a worker has computed a request's prompt, and how many tokens it had of it, if it says so."""
        if found is not None:
            self.index.correct(worker_id, request.cached_tokens, found)
        self.index.note(worker_id, request.block_hashes)

    def knows(self, request: Request) -> bool:
        """Whether some worker has a beginning of the request's prompt."""
        return bool(request.block_hashes) and self.index.holders(request.block_hashes)[0] > 0

    def belongs_elsewhere(self, request: Request, worker: WorkerState) -> bool:
        """Whether another worker has so much more of a prompt that it should be asked first."""
        if not request.block_hashes:
            return False
        most, holders = self.index.holders(request.block_hashes)
        gain = most - self.index.tokens_at(worker.worker_id, request.block_hashes)
        return gain > self._settings.min_batch_tokens and bool(self._serving(request, holders))

    def pick(
        self,
        waiting: Iterable[tuple[float, Request]],
        candidates: Sequence[WorkerState],
        now_s: float,
        may_join: Callable[[Request, WorkerState], bool],
    ) -> tuple[Pick | None, float | None]:
        """Returns who goes next, if anybody should, and when to look again at what waits for a worker.

        Args:
            waiting: keys and requests of a bucket, in order.
            candidates: workers that may be given a batch.
            now_s: the time.
            may_join: whether a request may go to a worker beside what that has.
        """
        best: Pick | None = None
        best_s, wake_s = float("inf"), None
        for number, (key_s, request) in enumerate(islice(waiting, MAX_LOOKED_AT)):
            if key_s >= best_s:
                break
            worker, wait_s = self._choose(request, candidates, may_join)
            if worker is None:
                # What is behind one that fits nowhere would take the room that it needs, each time.
                best = Pick(request, None) if not number else best
                break
            if self._settings.queue_order is QueueOrder.FCFS:
                return Pick(request, worker), None
            until_s = request.arrival_s + wait_s
            if wait_s and until_s > now_s:
                wake_s = until_s if wake_s is None else min(wake_s, until_s)
            elif key_s + wait_s < best_s:
                best, best_s = Pick(request, worker), key_s + wait_s
        return best, wake_s

    def _choose(
        self,
        request: Request,
        candidates: Sequence[WorkerState],
        may_join: Callable[[Request, WorkerState], bool],
    ) -> tuple[WorkerState | None, float]:
        """Returns the best of the workers that can take a request, and for how many seconds a better one is awaited."""
        most, names = self.index.holders(request.block_hashes)
        if not most:
            return place(self.cold(request), candidates, self._settings), 0.0
        holders = self._serving(request, names)
        able = [*candidates, *(worker for worker in holders if worker not in candidates)]
        if request.avoid:
            able = [worker for worker in able if worker.suits(request)] or able
        least = max(request.prompt_tokens - most, 1)
        # First who may take it at best: most workers have no room at all.
        able = [worker for worker in able if can_take(request, least, worker, self._settings)]
        lacking = {worker.worker_id: self._lacking(request, worker) for worker in able}
        able = [
            w
            for w in able
            if can_take(request, lacking[w.worker_id], w, self._settings) and may_join(self.at(request, w.worker_id), w)
        ]
        if not able:
            return None, 0.0
        best = min(able, key=lambda w: (-w.generation, _load(w, lacking[w.worker_id]), -w.load, w.worker_id))
        lacks = lacking[best.worker_id]
        if lacks - least <= self._settings.min_batch_tokens:
            return best, 0.0
        load = _load(best, lacks)
        if not any(worker not in able and _load(worker, least) < load for worker in holders):
            return best, 0.0
        spared_s = self._fleet.times.prefill_s(lacks) - self._fleet.times.prefill_s(least)
        return best, WAITS * spared_s

    def _lacking(self, request: Request, worker: WorkerState) -> int:
        """Returns how many tokens of a prompt a worker would have to compute."""
        return max(request.prompt_tokens - self.index.tokens_at(worker.worker_id, request.block_hashes), 1)

    def _serving(self, request: Request, names: Iterable[WorkerId]) -> list[WorkerState]:
        """Returns those of the workers that compute prompts and may serve the request."""
        found = []
        for name in islice(names, MAX_HOLDERS):
            worker = self._fleet.get(name)
            if worker is None or worker.role is WorkerRole.DECODE:
                continue
            if worker.suits(request):
                found.append(worker)
        return found


def _load(worker: WorkerState, lacking: int) -> int:
    return (worker.backlog_tokens() + lacking) * (worker.num_sequences() + 1)


def _with_cached(request: Request, tokens: int) -> Request:
    """The last token of a prompt is always computed."""
    tokens = min(tokens, request.prompt_tokens - 1)
    return request if tokens == request.cached_tokens else replace(request, cached_tokens=tokens)
