"""The life of a request in the core: its states, the legal steps between them, and the workers' books that go with it.

```
 (admitted) ─▶ WAITING ──dispatch──▶ PREFILL ──▶ DECODE ─▶ ENDED        any state may go to ENDED
                ▲   ▲                  │  │         ▲
  PARKED ◀──────┘   └──not dispatched──┘  └▶ HELD ─▶ PULLING
```

Every id names one attempt (core/types.py, RequestId), so that what arrives late names something that is not here.
Whatever changes a state changes the books of the workers concerned with it, here and nowhere else.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from bucketserve.core.errors import IllegalStepError
from bucketserve.core.fleet import Fleet
from bucketserve.core.types import Batch, Request, RequestId, WorkerId
from bucketserve.core.workers import WorkerState

__all__ = ["NEXT_STATES", "UNKNOWN", "Life", "Lifecycle", "State"]

UNKNOWN = "?"
"""In place of the fingerprint of a worker that a new leader has not heard of yet."""


class State(enum.Enum):
    """Where a request is."""

    PARKED = "parked"
    """Admitted, and can't be dispatched: its prompt has to be said again by its gateway after a change of leader, or
    there is no worker whose engine could go on with its output."""
    WAITING = "waiting"
    """In a bucket."""
    PREFILL = "prefill"
    """At a worker, its prompt not computed as far as is known."""
    HELD = "held"
    """Its prompt is computed and its KV waits for a decode worker."""
    PULLING = "pulling"
    """A decode worker pulls its KV."""
    DECODE = "decode"
    """At a worker, its prompt computed."""
    ENDED = "ended"
    """Nothing follows."""


NEXT_STATES: Mapping[State, frozenset[State]] = {
    State.PARKED: frozenset({State.WAITING, State.PREFILL, State.ENDED}),
    State.WAITING: frozenset({State.PARKED, State.PREFILL, State.ENDED}),
    State.PREFILL: frozenset({State.WAITING, State.HELD, State.DECODE, State.ENDED}),
    State.HELD: frozenset({State.PULLING, State.ENDED}),
    State.PULLING: frozenset({State.DECODE, State.ENDED}),
    # A worker that comes back may hold what was believed to decode there: its role had changed before it was cut off.
    State.DECODE: frozenset({State.HELD, State.ENDED}),
    State.ENDED: frozenset(),
}
AT_WORKER = frozenset({State.PREFILL, State.HELD, State.PULLING, State.DECODE})


@dataclass(slots=True, eq=False)
class Life:
    """One request that has not ended."""

    request: Request
    state: State
    worker_id: WorkerId | None = None
    """The worker that it is at; None while it waits."""
    assignment: int = 0
    """The order that brought it there (Batch.assignment); 0 until its worker names it to a new leader."""
    target_id: WorkerId | None = None
    """While PULLING: the decode worker."""
    target_assignment: int = 0
    """The order to pull."""
    fingerprint: str | None = None
    """Of the only engine that could go on with it: the one whose tokens it has, or that has it; None: any may."""
    is_leaving: bool = False
    """Its worker was told to let it go."""
    is_cancelled: bool = False
    """Nobody waits for it any more, and it has not been heard yet that its worker has stopped."""

    @property
    def is_at_worker(self) -> bool:
        """Whether a worker has it."""
        return self.state in AT_WORKER

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        """The workers that have something of it."""
        return tuple(worker_id for worker_id in (self.worker_id, self.target_id) if worker_id is not None)

    def is_of(self, worker_id: WorkerId, assignment: int) -> bool:
        """Whether what its worker says of that order's requests is about this life."""
        return self.worker_id == worker_id and self.assignment == assignment

    def go(self, state: State) -> None:
        """Makes a legal step.

        Raises:
            IllegalStepError: it is none.
        """
        if state not in NEXT_STATES[self.state]:
            raise IllegalStepError(f"{self.request.request_id}: from {self.state.value} to {state.value}")
        self.state = state


class Lifecycle:
    """All requests that have not ended, by id."""

    def __init__(self, fleet: Fleet) -> None:
        """Keeps the books of its workers."""
        self._fleet = fleet
        self._lives: dict[RequestId, Life] = {}
        self._num_bound: Counter[str | None] = Counter()
        """Requests by fingerprint."""
        self.num_at_workers = 0

    def __iter__(self) -> Iterator[Life]:
        """Yields what has not ended."""
        return iter(self._lives.values())

    def get(self, request_id: RequestId) -> Life | None:
        """Returns a request that has not ended."""
        return self._lives.get(request_id)

    def in_state(self, request_id: RequestId, *states: State) -> Life | None:
        """Returns a request that is in one of the states."""
        life = self._lives.get(request_id)
        return life if life is not None and life.state in states else None

    def has_bound(self, fingerprint: str) -> bool:
        """Whether there is a request that only engines of that fingerprint could go on with, as far as is known."""
        return bool(self._num_bound[fingerprint] or self._num_bound[UNKNOWN])

    def at(self, worker_id: WorkerId) -> list[Life]:
        """Returns what a worker has something of."""
        return [life for life in self._lives.values() if worker_id in (life.worker_id, life.target_id)]

    def held_at(self, request_id: RequestId, source_id: WorkerId) -> Request | None:
        """Returns a request whose KV a worker holds for a decode worker, unless nobody waits for it any more."""
        life = self.in_state(request_id, State.HELD)
        is_wanted = life is not None and life.worker_id == source_id and not life.is_cancelled
        return life.request if life is not None and is_wanted else None

    def tpot_s(self, worker: WorkerState) -> float:
        """Returns the least TPOT that was promised to what is at a worker, in seconds; infinity if none was.

        A target that its decodes break already counts for nothing: no smaller batch would keep it.
        """
        decode_s = worker.times.decode_s(worker.num_sequences(), worker.context_tokens_held())
        return min((tpot_s for tpot_s in worker.promised.values() if tpot_s >= decode_s), default=float("inf"))

    def park(self, request: Request) -> Life:
        """Takes a request, a new one or one that waits in no bucket any more, that cannot be dispatched yet."""
        life = self._lives.get(request.request_id)
        if life is None:
            life = self._begin(Life(request, State.PARKED))
        elif life.state is not State.PARKED:
            life.go(State.PARKED)
        life.request = request
        self._bind(life, request.fingerprint or None)
        return life

    def wait(self, request: Request) -> None:
        """Takes a request into the queue: a new one, or one that was parked or taken back from its worker."""
        life = self._lives.get(request.request_id)
        if life is None:
            life = self._begin(Life(request, State.WAITING))
        elif life.state is not State.WAITING:
            life.go(State.WAITING)
            life.request = request
        self._bind(life, request.fingerprint or None)

    def _begin(self, life: Life) -> Life:
        self._lives[life.request.request_id] = life
        self._num_bound[None] += 1
        return life

    def _bind(self, life: Life, fingerprint: str | None) -> None:
        self._num_bound[fingerprint] += 1
        self._unbind(life)
        life.fingerprint = fingerprint

    def _unbind(self, life: Life) -> None:
        self._num_bound[life.fingerprint] -= 1
        if not self._num_bound[life.fingerprint]:
            del self._num_bound[life.fingerprint]

    def dispatch(self, requests: Iterable[Request], batch: Batch) -> None:
        """Gives a batch's requests, as they are there, to its worker, which has it in its books (WorkerState.assign).

        What was expected of their prompts in the queue gives way to what the worker has of them.
        """
        for request in requests:
            life = self._lives[request.request_id]
            life.request = request
            self.place(life, batch.worker_id, batch.assignment)

    def place(self, life: Life, worker_id: WorkerId, assignment: int) -> None:
        """Gives a request to a worker, or believes one that says it has it."""
        life.go(State.PREFILL)
        life.worker_id, life.assignment, life.is_leaving = worker_id, assignment, False
        self.num_at_workers += 1
        self.heard_of(life)

    def heard_of(self, life: Life) -> None:
        """Binds a request to the engine of the worker that it is at, as far as that is known."""
        worker = self._fleet.get(life.worker_id) if life.worker_id is not None else None
        self._bind(life, worker.fingerprint if worker is not None else life.request.fingerprint or UNKNOWN)

    def take_back(self, life: Life) -> None:
        """Takes a request back that was not sent to its worker after all: it waits again, but is in no bucket yet."""
        if life.worker_id is not None and (worker := self._fleet.get(life.worker_id)):
            worker.take_back(life.request)
            self._fleet.changed(worker)
        self.num_at_workers -= 1
        life.go(State.WAITING)
        life.worker_id = None

    def prefilled(self, life: Life) -> None:
        """Its prompt is computed where it is."""
        if life.state is State.PREFILL:
            life.go(State.DECODE)

    def hold(self, life: Life) -> None:
        """Its KV waits for a decode worker."""
        life.go(State.HELD)

    def pull(self, life: Life, target_id: WorkerId, assignment: int) -> None:
        """A decode worker, which expects it in its books already, pulls its KV."""
        life.go(State.PULLING)
        life.target_id, life.target_assignment = target_id, assignment

    def call_off(self, life: Life) -> None:
        """The worker that holds its KV was to pull it from itself, and begins anew (WorkerJoined)."""
        life.go(State.DECODE)
        life.target_id = None

    def pulled(self, life: Life) -> WorkerId | None:
        """It decodes at its target from now on; returns the worker that still holds its KV, if that is another."""
        source_id, target_id = life.worker_id, life.target_id
        life.go(State.DECODE)
        life.worker_id, life.assignment, life.target_id = target_id, life.target_assignment, None
        if target_id is not None and (target := self._fleet.get(target_id)):
            target.arrived(life.request.request_id)
            self._fleet.changed(target)
        source = self._fleet.get(source_id) if source_id is not None and source_id != target_id else None
        if source is None:
            return None
        source.release(life.request)
        self._fleet.changed(source)
        return source_id

    def move(self, life: Life, worker_id: WorkerId, assignment: int) -> None:
        """Believes a worker that it has a request whose own worker is not here to say otherwise."""
        life.worker_id, life.assignment, life.target_id = worker_id, assignment, None
        if life.state is State.PULLING:
            life.go(State.DECODE)
        self.heard_of(life)

    def end(self, life: Life) -> None:
        """Ends it; its workers' books are freed of it."""
        was_at_worker = life.is_at_worker
        life.go(State.ENDED)
        self._unbind(life)
        del self._lives[life.request.request_id]
        if was_at_worker:
            self.num_at_workers -= 1
            for worker_id in life.workers:
                if worker := self._fleet.get(worker_id):
                    worker.release(life.request)
                    self._fleet.changed(worker)
