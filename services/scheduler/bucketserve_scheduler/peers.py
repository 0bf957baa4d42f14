"""Who is connected: gateways and workers, and the outbox of each."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from bucketserve.core.errors import PeerRefusedError
from bucketserve.core.types import RequestId, WorkerId
from bucketserve.rpc.outbox import Outbox
from bucketserve.v1 import scheduler_pb2

__all__ = ["GatewayPeer", "GatewayPeers", "WorkerPeer"]

REMEMBER_S = 60.0


@dataclass(slots=True, eq=False)
class GatewayPeer:
    """A connected gateway."""

    gateway_id: str
    outbox: Outbox[scheduler_pb2.SubmitResponse]
    instance: str = ""


@dataclass(slots=True, eq=False)
class WorkerPeer:
    """A connected worker."""

    worker_id: WorkerId
    hello: scheduler_pb2.WorkerHello
    outbox: Outbox[scheduler_pb2.WorkResponse]
    report: scheduler_pb2.WorkerReport
    reported_s: float
    is_joined: bool = False
    """Whether the core knows of this stream. Until then it gets nothing: what is decided may be for the one before."""
    is_draining: bool = False
    held: dict[RequestId, scheduler_pb2.HeldKv] = field(default_factory=dict)
    """KV that it has told us of and that nobody was ordered to pull yet."""


@dataclass(frozen=True, slots=True)
class _End:
    """How a run ended, and whose it was."""

    at_s: float
    gateway_id: str
    dropped: scheduler_pb2.RunDropped


@dataclass(slots=True)
class GatewayPeers:
    """Gateways by id, and a model's requests that each has open.

    A gateway that reconnects within its lease finds its requests as they were.
    """

    _connected: dict[str, GatewayPeer] = field(default_factory=dict)
    _requests: dict[str, set[RequestId]] = field(default_factory=dict)
    """gateway id -> open runs."""
    _absent_since: dict[str, float] = field(default_factory=dict)
    """Of those that have open runs and are not connected."""
    _ended: dict[str, _End] = field(default_factory=dict)
    """By run id, for REMEMBER_S; oldest first."""
    adapters: scheduler_pb2.ServedAdapters = field(default_factory=scheduler_pb2.ServedAdapters)
    """What connected gateways were told last."""

    @property
    def are_connected(self) -> bool:
        """Whether one is."""
        return bool(self._connected)

    def connect(self, peer: GatewayPeer) -> None:
        """Registers a stream; an older one of the same process is closed.

        Raises:
            PeerRefusedError: another process is connected under the same id.
        """
        if older := self._connected.get(peer.gateway_id):
            if older.instance != peer.instance:
                raise PeerRefusedError(f"gateway id {peer.gateway_id!r} is in use by another process")
            older.outbox.close()
        self._connected[peer.gateway_id] = peer
        self._absent_since.pop(peer.gateway_id, None)

    def disconnect(self, peer: GatewayPeer, now_s: float) -> None:
        """Forgets a stream, unless a newer one took its place; the gateway's lease starts to run."""
        if self._connected.get(peer.gateway_id) is peer:
            del self._connected[peer.gateway_id]
            if peer.gateway_id in self._requests:
                self._absent_since[peer.gateway_id] = now_s

    def open(self, gateway_id: str, request_id: RequestId, now_s: float) -> None:
        """Notes a request; a gateway known only from the store starts as absent."""
        self._requests.setdefault(gateway_id, set()).add(request_id)
        if gateway_id not in self._connected:
            self._absent_since.setdefault(gateway_id, now_s)

    def close(self, gateway_id: str, request_id: RequestId) -> None:
        """Forgets a request."""
        requests = self._requests.get(gateway_id)
        if requests is None:
            return
        requests.discard(request_id)
        if not requests:
            del self._requests[gateway_id]
            self._absent_since.pop(gateway_id, None)

    def expire(self, lease_s: float, now_s: float) -> list[RequestId]:
        """Returns the requests of gateways that have been away for longer than lease_s seconds, once."""
        expired: list[RequestId] = []
        for gateway_id, since_s in list(self._absent_since.items()):
            if now_s - since_s < lease_s:
                continue
            expired += self._requests.pop(gateway_id)
            del self._absent_since[gateway_id]
        return expired

    def send(self, gateway_id: str, message: scheduler_pb2.SubmitResponse) -> None:
        """Sends to a gateway if it is connected; one that reconnects asks for what it missed."""
        if message.HasField("dropped"):
            self._remember(gateway_id, message.dropped)
        if peer := self._connected.get(gateway_id):
            peer.outbox.send(message)

    def served(self, gateway_id: str, run_id: str) -> None:
        """Notes that a run ended well. A gateway that asks for it again did not get its output: it has to try again."""
        reason = scheduler_pb2.DROP_REASON_WORKER_FAILED
        self._remember(gateway_id, scheduler_pb2.RunDropped(run_id=run_id, reason=reason))

    def tell_end(self, run_id: str) -> bool:
        """Tells the gateway of a run how it ended, if that was lately; returns whether it was."""
        end = self._ended.get(run_id)
        if end is None:
            return False
        if peer := self._connected.get(end.gateway_id):
            peer.outbox.send(scheduler_pb2.SubmitResponse(dropped=end.dropped))
        return True

    def _remember(self, gateway_id: str, dropped: scheduler_pb2.RunDropped) -> None:
        if dropped.reason == scheduler_pb2.DROP_REASON_CANCELLED:
            # A gateway that cancelled does not ask again. One that asks again was only away for long.
            return
        now_s = time.monotonic()
        while self._ended:
            oldest = next(iter(self._ended))
            if now_s - self._ended[oldest].at_s < REMEMBER_S:
                break
            del self._ended[oldest]
        self._ended[dropped.run_id] = _End(now_s, gateway_id, dropped)

    def tell_adapters(self, adapters: Iterable[scheduler_pb2.Adapter]) -> None:
        """Tells every gateway which adapters there are, if that has changed."""
        served = scheduler_pb2.ServedAdapters(adapters=adapters)
        if served != self.adapters:
            self.adapters = served
            for peer in self._connected.values():
                peer.outbox.send(scheduler_pb2.SubmitResponse(adapters=served))

    def part_with_all(self) -> None:
        """Ends every gateway's stream once it has been told everything."""
        for peer in self._connected.values():
            peer.outbox.finish()

    def cut_all(self) -> None:
        """Ends every gateway's stream, so that each reconnects and submits its open requests again."""
        for peer in self._connected.values():
            peer.outbox.close()
