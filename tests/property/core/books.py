"""The books of the core's parts: what must hold of them at every moment, and when everything has ended."""

from __future__ import annotations

from bucketserve.core.lanes import Lane
from bucketserve.core.lifecycle import State
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.types import RequestClass


def check_agreement(core: SchedulerCore, now_s: float) -> None:
    """What the parts know of the requests agrees."""
    lives = list(core._lives)
    assert all(life.request.deadline_s is None or life.request.deadline_s > now_s for life in lives)
    waiting = {life.request.request_id for life in lives if life.state is State.WAITING}
    assert waiting == {entry.request.request_id for lane in Lane for entry in core._lanes.of(lane)}
    assert set(core._patience._orphans) <= {life.request.request_id for life in lives if life.state is State.PARKED}
    assert core.status().num_running == sum(life.is_at_worker for life in lives)
    assert set(core._affinity.index._kept) == {worker.worker_id for worker in core._fleet}
    for worker in core._fleet:
        own = {life.request.request_id: life.request for life in lives if worker.worker_id in life.workers}
        pulling = {life.request.request_id for life in lives if life.target_id == worker.worker_id}
        assert worker.requests == own.keys()
        assert worker.kv._by_id.keys() == own.keys()
        assert worker.batch_class == {rid for rid in own if own[rid].request_class is RequestClass.BATCH}
        assert set(worker.incoming) == pulling
        assert worker.batch_of.keys() <= own.keys()
        assert set().union(*worker.outstanding.values()) == set(worker.batch_of)
        assert not worker.is_saved


def check_empty(core: SchedulerCore) -> None:
    """No book remembers anything."""
    view = core.status()
    assert (view.num_waiting, view.num_running, view.num_deferred) == (0, 0, 0)
    assert sum(bucket.num_waiting for bucket in view.buckets) == 0
    assert list(core._lives) == []
    assert (len(core._tenants), core._tenants._charged) == (0, {})
    assert (core._admission._batch_requests, core._admission._batch_tokens) == (0, 0)
    assert (core._handover.waiting_tokens(), core._handover._waiting) == (0, {})
    for worker in core._fleet:
        assert not any((worker.requests, worker.incoming, worker.outstanding, worker.batch_of, worker.unaccounted))
        assert (worker.batch_class, worker.kv._by_id, worker.kv._lines, worker.kv.peak()) == (set(), {}, [], 0)
