"""What batch class leaves to interactive requests, and what it gives back: it may use all that is idle.

Beside interactive requests it takes a part of a worker's memory and of its steps, or their prompts would wait for the
one and be computed in slivers beside all that decodes. Of the memory that it had before they came it keeps what nobody
wants: an interactive request that finds no room anywhere takes it at the worker where least has to be computed again
for it; one that is late already takes only what is beyond batch class's part. What decodes beyond its part of the steps
is let go as soon as an interactive request comes there. Whoever was let go twice stays (core/preemption.py). HyGen
(arXiv 2501.14808) and ConServe (arXiv 2410.01228) share workers so between both classes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from bucketserve.core.lifecycle import Life, Lifecycle, State
from bucketserve.core.messages import PreemptAtWorker
from bucketserve.core.preemption import loss
from bucketserve.core.types import Request, RequestClass, RequestId, WorkerRole
from bucketserve.core.workers import WorkerState

__all__ = ["Reclaimer", "has_more_than_its_part", "leaves_enough"]

LEFT_SHARE = 0.5
"""Of a worker's KV, and of the least TPOT promised there less a step without sequences: batch class leaves so much
beside interactive requests."""


def leaves_enough(request: Request, worker: WorkerState, kv_tokens: int = 0, number: int = 0) -> bool:
    """Whether a request may go to a worker as far as interactive ones are concerned; one of these always may.

    Batch class shares no step with prompts that are left there: whoever comes next would wait for a longer one. Beside
    interactive requests memory stays free as well, and decodes leave time to prompts. Where only prompts are computed
    memory stays free in any case, since what waits there for a decode worker can't be let go.

    Args:
        request: who may go.
        worker: where.
        kv_tokens: what others need that go with it.
        number: how many these are.
    """
    if request.request_class is RequestClass.INTERACTIVE:
        return True
    if worker.left_tokens():
        return False
    decodes = worker.role is not WorkerRole.PREFILL
    if len(worker.requests) == len(worker.batch_class) and (decodes or not (worker.requests or number)):
        return True
    spare_tokens = worker.room - kv_tokens - LEFT_SHARE * worker.headroom.kv_total_tokens
    # Most workers have none, and what a request needs costs more to ask.
    if spare_tokens <= 0 or worker.kv_tokens(request) > spare_tokens:
        return False
    if not decodes:
        return True
    context_tokens = worker.context_tokens_held() + kv_tokens + worker.kv_tokens(request)
    return worker.times.decode_s(worker.num_sequences() + number + 1, context_tokens) <= _most_decode_s(worker)


def has_more_than_its_part(worker: WorkerState) -> bool:
    """Whether batch class holds more of a worker's KV than it leaves to interactive requests."""
    held = sum(worker.kv.tokens(request_id) for request_id in worker.batch_class)
    return held > (1 - LEFT_SHARE) * worker.headroom.kv_total_tokens


def _most_decode_s(worker: WorkerState) -> float:
    """Returns how long a step may take that leaves what batch class leaves there."""
    least_s = worker.times.decode_s(0, 0)
    # A target that nobody could keep asks for nothing.
    tpot_s = min((tpot_s for tpot_s in worker.promised.values() if tpot_s > least_s), default=float("inf"))
    return least_s + (1 - LEFT_SHARE) * (tpot_s - least_s)


class Reclaimer:
    """Chooses whom to let go for a request."""

    def __init__(self, lives: Lifecycle) -> None:
        """Reads the requests at the workers."""
        self._lives = lives

    def room_for(self, request: Request, workers: Iterable[WorkerState], reserve: float) -> list[PreemptAtWorker]:
        """Returns whom to let go so that the request fits somewhere; nobody if that is not possible, or under way."""
        best: tuple[int, list[Life], WorkerState] | None = None
        for worker in workers:
            if not worker.could_serve(request):
                continue
            if worker.kv_tokens(request) <= worker.room and worker.free_sequences() > 0:
                return []
            # What becomes free at one that is saved is another's.
            may_give = worker.batch_class and not worker.is_saved
            victims = self._victims(request, worker, reserve) if may_give else None
            if victims is None:
                continue
            if not victims:
                return []
            held = sum(worker.tokens_held(life.request) for life in victims)
            if best is None or held < best[0]:
                best = held, victims, worker
        if best is None:
            return []
        _, victims, worker = best
        return _let_go(worker, _needed(request, worker, reserve, victims, self._leaving(worker)))

    def time_for(self, requests: Iterable[Request], worker: WorkerState) -> list[PreemptAtWorker]:
        """Returns whom to let go at a worker that was given the requests, so that what decodes leaves them time."""
        comes = any(request.request_class is RequestClass.INTERACTIVE for request in requests)
        if not (comes and worker.batch_class) or worker.role is WorkerRole.PREFILL:
            return []
        leaving, most_s = self._leaving(worker), _most_decode_s(worker)
        number = worker.num_sequences() - len(leaving)
        tokens = worker.context_tokens_held() - sum(worker.tokens_held(request) for request in leaving.values())
        chosen: list[Life] = []
        for life in self._movable(worker) if worker.times.decode_s(number, tokens) > most_s else ():
            number, tokens = number - 1, tokens - worker.tokens_held(life.request)
            chosen.append(life)
            if worker.times.decode_s(number, tokens) <= most_s:
                break
        return _let_go(worker, chosen)

    def _leaving(self, worker: WorkerState) -> dict[RequestId, Request]:
        """Returns the requests there that were told to go."""
        lives = (self._lives.in_state(rid, State.PREFILL, State.DECODE) for rid in worker.batch_class)
        return {life.request.request_id: life.request for life in lives if life is not None and life.is_leaving}

    def _victims(self, request: Request, worker: WorkerState, reserve: float) -> list[Life] | None:
        """Returns the cheapest that have to go; empty if enough are on their way; None if all would not do."""
        leaving = self._leaving(worker)
        if _has_room(request, worker, reserve, leaving):
            return []
        able = self._movable(worker)

        def is_enough(number: int) -> bool:
            gone = {life.request.request_id: life.request for life in able[:number]}
            return _has_room(request, worker, reserve, leaving | gone)

        if not able or not is_enough(len(able)):
            return None
        return able[: bisect_left(range(len(able)), True, lo=1, key=is_enough)]

    def _movable(self, worker: WorkerState) -> list[Life]:
        """Returns those of batch class there that may be let go, the cheapest first."""
        able: list[tuple[tuple[bool, int, int], RequestId, Life]] = []
        for request_id in worker.batch_class:
            life = self._lives.in_state(request_id, State.PREFILL, State.DECODE)
            if life is None or life.is_cancelled or life.is_leaving:
                continue
            if life.state is State.PREFILL and life.assignment > worker.headroom.last_assignment:
                # The order could come before the request has; what decodes is there.
                continue
            held = worker.tokens_held(life.request)
            cost = loss(is_batch=True, num_preemptions=life.request.num_preemptions, num_tokens=held)
            if cost is not None:
                able.append((cost, request_id, life))
        able.sort(key=lambda one: one[:2])
        return [life for _, _, life in able]


def _let_go(worker: WorkerState, lives: Sequence[Life]) -> list[PreemptAtWorker]:
    for life in lives:
        life.is_leaving = True
    return [PreemptAtWorker(worker.worker_id, life.request.request_id) for life in lives]


def _needed(
    request: Request,
    worker: WorkerState,
    reserve: float,
    victims: Sequence[Life],
    leaving: Mapping[RequestId, Request],
) -> list[Life]:
    """Returns those that have to go, of some that would do: others end before the memory is wanted."""
    gone = {life.request.request_id: life.request for life in victims}
    for life in victims[:-1]:
        others = {request_id: other for request_id, other in gone.items() if request_id != life.request.request_id}
        if _has_room(request, worker, reserve, {**leaving, **others}):
            gone = others
    return [life for life in victims if life.request.request_id in gone]


def _has_room(request: Request, worker: WorkerState, reserve: float, without: Mapping[RequestId, Request]) -> bool:
    """Whether a worker has memory and a place for a request once some of its own have left."""
    if worker.free_sequences() + len(worker.released) + len(without) < 1:
        return False
    free = worker.free_tokens(without)
    # One that is empty then may be filled by one request.
    return worker.kv_tokens(request) <= (free if without.keys() >= worker.requests else int(free * (1 - reserve)))
