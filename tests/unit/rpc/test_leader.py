"""Which scheduler is listened to."""

from __future__ import annotations

import pytest

from bucketserve.core.errors import UnavailableError
from bucketserve.rpc import leader
from bucketserve.rpc.leader import LeaderSearch
from bucketserve.v1 import scheduler_pb2


def hello(epoch: int) -> scheduler_pb2.SchedulerHello:
    return scheduler_pb2.SchedulerHello(scheduler_id=f"s{epoch}", epoch=epoch)


def test_who_has_heard_a_newer_leader_does_not_listen_to_an_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(leader.time, "monotonic", lambda: now_s)
    search = LeaderSearch(["a", "b"], None, lambda is_connected, detail: None)
    assert not search.is_present(1e9)
    search.welcomed(hello(5), "a")
    search.welcomed(hello(7), "b")
    search.welcomed(hello(7), "b")
    with pytest.raises(UnavailableError, match="leads no more"):
        search.welcomed(hello(5), "a")
    # A store that lost its data and its clock counts anew: after a while that is believed.
    now_s = 200.0
    search.welcomed(hello(1), "a")
    assert search.is_present(0)
