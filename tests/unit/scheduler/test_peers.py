"""Absence of gateways counts only while they have open runs; how a run ended is told to who has not heard."""

from __future__ import annotations

import pytest

from bucketserve.core.types import RequestId
from bucketserve.rpc.outbox import Outbox
from bucketserve.v1 import scheduler_pb2
from bucketserve_scheduler.peers import GatewayPeer, GatewayPeers

LEASE_S = 10.0
RUN = RequestId("run")


def _peer() -> GatewayPeer:
    return GatewayPeer("gateway", Outbox(10), "one process")


async def _waiting(peer: GatewayPeer) -> list[scheduler_pb2.SubmitResponse]:
    peer.outbox.finish()
    return [message async for message in peer.outbox.messages()]


def test_a_gateway_without_runs_is_never_away() -> None:
    """A run that is taken over long after its gateway hung up gets a whole lease."""
    peers = GatewayPeers()
    peer = _peer()
    peers.connect(peer)
    peers.open("gateway", RUN, 0.0)
    peers.close("gateway", RUN)
    peers.disconnect(peer, 1.0)
    peers.open("gateway", RUN, 100.0)
    assert peers.expire(LEASE_S, 100.0 + LEASE_S - 1) == []
    assert peers.expire(LEASE_S, 100.0 + LEASE_S + 1) == [RUN]
    assert peers.expire(LEASE_S, 200.0) == []


def test_runs_lost_while_the_gateway_is_away_end_its_absence() -> None:
    """The lead was lost with a run open and comes back later: the lease starts with the takeover."""
    peers = GatewayPeers()
    peer = _peer()
    peers.connect(peer)
    peers.open("gateway", RUN, 0.0)
    peers.disconnect(peer, 1.0)
    peers.close("gateway", RUN)
    peers.open("gateway", RUN, 100.0)
    assert peers.expire(LEASE_S, 101.0) == []


@pytest.mark.parametrize(
    ("reason", "is_told"),
    [
        (scheduler_pb2.DROP_REASON_WORKER_LOST, True),
        (scheduler_pb2.DROP_REASON_DEADLINE, True),
        (scheduler_pb2.DROP_REASON_CANCELLED, False),
    ],
)
async def test_an_end_is_told_again_unless_it_was_cancelled(reason: scheduler_pb2.DropReason, is_told: bool) -> None:
    """Who cancelled does not ask again; a gateway that was only away long may submit its runs again."""
    peers = GatewayPeers()
    dropped = scheduler_pb2.RunDropped(run_id=RUN, reason=reason)
    peers.send("gateway", scheduler_pb2.SubmitResponse(dropped=dropped))
    peer = _peer()
    peers.connect(peer)
    assert peers.tell_end(RUN) is is_told
    assert [message.dropped for message in await _waiting(peer)] == [dropped] * is_told


async def test_a_run_that_was_served_but_never_arrived_is_tried_again() -> None:
    """Its output was given up: the gateway hears that its worker failed."""
    peers = GatewayPeers()
    peer = _peer()
    peers.connect(peer)
    assert not peers.tell_end(RUN)
    peers.served("gateway", RUN)
    assert peers.tell_end(RUN)
    assert [message.dropped.reason for message in await _waiting(peer)] == [scheduler_pb2.DROP_REASON_WORKER_FAILED]


async def test_gateways_are_told_which_adapters_there_are_when_that_has_changed() -> None:
    def adapter(name: str) -> scheduler_pb2.Adapter:
        return scheduler_pb2.Adapter(name=name, fingerprint=name)

    peers, early, late = GatewayPeers(), _peer(), GatewayPeer("late", Outbox(10), "another process")
    peers.connect(early)
    for names in ("", "a", "a", "ab"):
        peers.tell_adapters(adapter(name) for name in names)
    peers.connect(late)
    assert [at.name for at in peers.adapters.adapters] == ["a", "b"]
    peers.tell_adapters([])
    told = {
        peer.gateway_id: [[at.name for at in message.adapters.adapters] for message in await _waiting(peer)]
        for peer in (early, late)
    }
    assert told == {"gateway": [["a"], ["a", "b"], []], "late": [[]]}
