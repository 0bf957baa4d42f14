"""Who may leave: a worker that wants to stays while something is open that only those of its fingerprint can finish.

What has tokens of one engine can go on nowhere else. While others of a fingerprint stay that do the same, one that
drains is released at once. The last ones take what is bound to their fingerprint until they are released: what was lost
with another of theirs, what was let go to make room, what is held for a decode worker, what has ended and whose output
may not arrive. For how long they have they know themselves.
"""

from __future__ import annotations

from bucketserve.core.fleet import Fleet
from bucketserve.core.lifecycle import UNKNOWN, Life, Lifecycle
from bucketserve.core.messages import ReleaseWorker
from bucketserve.core.types import RequestId
from bucketserve.core.workers import WorkerState

__all__ = ["RETURN_S", "Leaving"]

RETURN_S = 10.0
"""How long the next attempt of a request is expected after the one before was lost. A gateway says it at once if it is
connected, and of one that is away for longer than this nothing is kept."""


ANYBODY = ""
"""In place of a request's name: one that is not known."""


class Leaving:
    """Owns what is known of attempts that are to come."""

    def __init__(self, lives: Lifecycle, fleet: Fleet) -> None:
        """Reads the requests; releases workers."""
        self._lives = lives
        self._fleet = fleet
        self._expected: dict[str, tuple[str, float]] = {}
        """By the request's own part of its id: the fingerprint, and when it is not expected any more; oldest first."""
        self._took_over = False

    def take_over(self) -> None:
        """Another led before: what it lost last is known to gateways alone, which say it when they have come."""
        self._took_over = True

    def expect(self, life: Life, now_s: float) -> None:
        """Notes that a request's worker lost it or let it go, and that it will be resumed."""
        if life.fingerprint is not None:
            self._expect(_name(life.request.request_id), life.fingerprint, now_s)

    def lost(self, worker: WorkerState, now_s: float, request_id: RequestId | None = None) -> None:
        """Notes that output of a request that has ended did not arrive; None: of whichever ended last at the worker."""
        name = worker.worker_id if request_id is None else _name(request_id)
        self._expect(name, worker.fingerprint, now_s)

    def _expect(self, name: str, fingerprint: str, now_s: float) -> None:
        self._expected.pop(name, None)
        self._expected[name] = fingerprint, now_s + RETURN_S

    def came(self, request_id: RequestId) -> None:
        """Notes that the next attempt is here."""
        self._expected.pop(_name(request_id), None)

    def released(self, now_s: float) -> list[ReleaseWorker]:
        """Returns the workers that may leave from now on."""
        if self._took_over:
            self._took_over, self._expected[ANYBODY] = False, (UNKNOWN, now_s + RETURN_S)
        while self._expected and (oldest := next(iter(self._expected.items())))[1][1] <= now_s:
            del self._expected[oldest[0]]
        free = [w for w in self._fleet.leaving.values() if not (w.is_last and self._is_needed(w.fingerprint))]
        for worker in free:
            self._fleet.release(worker)
        return [ReleaseWorker(worker.worker_id) for worker in free]

    def next_s(self) -> float | None:
        """Returns when a worker may be free to leave without an event; None if none is kept for what is expected."""
        return next((until_s for _, until_s in self._expected.values()), None) if self._fleet.leaving else None

    def _is_needed(self, fingerprint: str) -> bool:
        is_expected = any(expected in (fingerprint, UNKNOWN) for expected, _ in self._expected.values())
        may_come = any(worker.is_delivering and worker.fingerprint == fingerprint for worker in self._fleet)
        return is_expected or may_come or self._lives.has_bound(fingerprint)


def _name(request_id: RequestId) -> str:
    """Returns what all attempts of a request have in common."""
    return request_id.rpartition(".")[0] or request_id
