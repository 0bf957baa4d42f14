"""Token streams to gateways: one Deliver call per gateway, tokens of many requests coalesced.

The first token of a request and its end go out at once; tokens in between wait up to flush_s to share a message, since
the cost of a stream is per message, not per token. What a gateway has not acknowledged when a stream breaks is sent
again on the next one; it drops what it has seen. Output that could not be brought for give_up_s is given up with its
request. Younger output is kept: it may be that of a gateway which has just been started at the address of the lost one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable

import grpc

from bucketserve.addresses import AddressError
from bucketserve.rpc.channel import open_channel
from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.listening import hang_up, messages_of
from bucketserve.tasks import end_task
from bucketserve.v1 import delivery_pb2, delivery_pb2_grpc

__all__ = ["DeliveryPool"]

MAX_PENDING_TOKENS = 1_000_000
MAX_UNACKNOWLEDGED = 10_000
RECONNECT_S = 0.2
IDLE_CLOSE_S = 60.0
LOOK_S = 0.25
STALL_S = 2.5
"""A gateway acknowledges at once: one that has not for so long can't be reached, whatever its connection says."""


class DeliveryPool:
    """The streams to all gateways, opened when first needed and closed when long idle."""

    def __init__(
        self,
        worker_id: str,
        deployment: Deployment,
        *,
        fingerprint: Callable[[], str],
        flush_s: float,
        give_up_s: float,
        on_stop: Callable[[list[str]], None],
        on_lost: Callable[[str, set[str]], None],
    ) -> None:
        """fingerprint() once there is output; on_stop(run ids) when a gateway wants no more.

        on_lost(address, run ids) when their output is given up.
        """
        self._worker_id = worker_id
        self._fingerprint = fingerprint
        self._deployment = deployment
        self._flush_s = flush_s
        self._give_up_s = give_up_s
        self._on_stop = on_stop
        self._on_lost = on_lost
        self._streams: dict[str, _GatewayStream] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def send(self, address: str, delivery: delivery_pb2.TokenDelivery) -> None:
        """Queues output for the gateway at that address."""
        stream = self._streams.get(address)
        if stream is None:
            stream = _GatewayStream(
                address,
                delivery_pb2.DeliverRequest(worker_id=self._worker_id, fingerprint=self._fingerprint()),
                self._deployment,
                self._flush_s,
                self._give_up_s,
                self._on_stop,
                self._on_lost,
            )
            self._streams[address] = stream
            self._tasks[address] = asyncio.create_task(self._serve(stream), name=f"deliver-{address}")
        stream.put(delivery)

    @property
    def is_delivering(self) -> bool:
        """Whether there is output that no gateway has acknowledged yet."""
        return not all(stream.drained.is_set() for stream in self._streams.values())

    async def flush(self, timeout_s: float) -> None:
        """Waits until everything queued has been sent, for at most timeout_s seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for stream in list(self._streams.values()):
                    await stream.drained.wait()

    async def close(self) -> None:
        """Ends all streams."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, stream: _GatewayStream) -> None:
        try:
            await stream.run()
            # What came while the call was being closed.
            while stream.has_pending:
                await stream.run()
        finally:
            self._streams.pop(stream.address, None)
            self._tasks.pop(stream.address, None)


class _TooMuchError(Exception):
    """More output waits than a gateway that reads would let gather."""


class _StalledError(Exception):
    """What was sent is not acknowledged."""


class _GatewayStream:
    """One gateway's pending output and its Deliver call."""

    def __init__(
        self,
        address: str,
        hello: delivery_pb2.DeliverRequest,
        deployment: Deployment,
        flush_s: float,
        give_up_s: float,
        on_stop: Callable[[list[str]], None],
        on_lost: Callable[[str, set[str]], None],
    ) -> None:
        self.address = address
        self._deployment = deployment
        self._on_lost = on_lost
        self.drained = asyncio.Event()
        self.drained.set()
        self._hello = hello
        self._flush_s = flush_s
        self._give_up_s = give_up_s
        self._on_stop = on_stop
        self._pending: dict[str, delivery_pb2.TokenDelivery] = {}
        self._pending_since_s: dict[str, float] = {}
        self._clock = asyncio.get_running_loop().time
        self._unacknowledged: deque[delivery_pb2.DeliverRequest] = deque()
        self._num_acknowledged = 0
        self._num_pending_tokens = 0
        self._has_pending = asyncio.Event()
        self._is_urgent = asyncio.Event()
        self._is_lost = False
        self._heard_s = 0.0
        """When the gateway acknowledged last, or had nothing to."""
        self._away_since_s: float | None = None

    @property
    def has_pending(self) -> bool:
        """Whether there is output to send."""
        return bool(self._pending)

    def put(self, delivery: delivery_pb2.TokenDelivery) -> None:
        """Adds output, merged with what is pending of the same run."""
        pending = self._pending.get(delivery.run_id)
        if pending is not None:
            # A run that is taken up again says its first tokens again.
            repeated = max(pending.first_index + len(pending.token_ids) - delivery.first_index, 0)
            del delivery.token_ids[:repeated], delivery.logprobs[:repeated]
            pending.MergeFrom(_without_index(delivery, pending.first_index))
        else:
            self._pending[delivery.run_id] = delivery
            self._pending_since_s.setdefault(delivery.run_id, self._clock())
        self._num_pending_tokens += len(delivery.token_ids)
        self.drained.clear()
        self._has_pending.set()
        if delivery.first_index == 0 or delivery.HasField("finished"):
            self._is_urgent.set()
        if self._num_pending_tokens > MAX_PENDING_TOKENS or len(self._unacknowledged) > MAX_UNACKNOWLEDGED:
            self._is_lost = True

    async def run(self) -> None:
        """Keeps a call open and sends; returns when idle for long, or when all output has been given up."""
        tls = self._deployment.tls
        while True:
            pems = tls and tls.current()
            try:
                opening = open_channel(self.address, tls)
            except AddressError:
                # What the gateway calls its address is none: nobody can be reached there.
                self._give_up(self._clock())
                return
            async with opening as channel:
                stub = delivery_pb2_grpc.DeliveryServiceStub(channel)
                # A channel keeps the certificates that it was made with.
                while (tls and tls.current()) is pems:
                    if await self._converse_or_give_up(stub):
                        return
                    await asyncio.sleep(RECONNECT_S)

    async def _converse_or_give_up(self, stub: delivery_pb2_grpc.DeliveryServiceStub) -> bool:
        """One call, and what follows from its end; returns whether nothing is left to be sent."""
        try:
            if not await self._converse(stub):
                return True
            self._away_since_s = None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The latter if the gateway ended the call in peace, as it does when it drains, while we wrote.
            self._away_since_s = self._away_since_s or self._clock()
        except (_StalledError, TimeoutError):
            self._away_since_s = self._away_since_s or self._clock() - STALL_S
        except _TooMuchError:
            self._give_up(self._clock())
            return True
        if self._away_since_s is not None and self._clock() - self._away_since_s > self._give_up_s:
            self._give_up(self._clock() - self._give_up_s)
            return not self._pending
        return False

    def _give_up(self, until_s: float) -> None:
        """Drops what has waited since until_s or longer: all that had been sent before the stream broke, and more."""
        lost = {delivery.run_id for message in self._unacknowledged for delivery in message.deliveries}
        lost |= {run_id for run_id, since_s in self._pending_since_s.items() if since_s <= until_s}
        self._unacknowledged.clear()
        self._is_lost = False
        for run_id in lost & self._pending.keys():
            del self._pending_since_s[run_id]
            self._num_pending_tokens -= len(self._pending.pop(run_id).token_ids)
        if not self._pending:
            self._has_pending.clear()
            self.drained.set()
        if lost:
            self._on_lost(self.address, lost)

    async def _converse(self, stub: delivery_pb2_grpc.DeliveryServiceStub) -> bool:
        """One call, until it breaks (AioRpcError, or True) or is idle for long (False)."""
        call = stub.Deliver(metadata=self._deployment.metadata)
        # Nothing is taken from the pending output before the gateway is known to be there.
        async with asyncio.timeout(STALL_S):
            await call.wait_for_connection()
            await call.write(self._hello)
            self._num_acknowledged = 0
            for message in list(self._unacknowledged):
                await call.write(message)
        self._heard_s = self._clock()
        reader = asyncio.create_task(self._read(call))
        try:
            while not reader.done():
                if not await self._wait(reader):
                    await call.done_writing()
                    return False
                if self._is_lost:
                    raise _TooMuchError
                await self._write(call)
            await reader
            return True
        finally:
            hang_up(call)
            await end_task(reader, grpc.aio.AioRpcError, asyncio.InvalidStateError)

    async def _wait(self, reader: asyncio.Task[None]) -> bool:
        """Waits until there is something to send and, unless it is urgent, until its time to share is over."""
        idle_s = self._clock() + IDLE_CLOSE_S
        while not self._has_pending.is_set():
            waiter = asyncio.create_task(self._has_pending.wait())
            try:
                done, _ = await asyncio.wait({waiter, reader}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiter.cancel()
            if done:
                break
            self._check_stall()
            if self._clock() > idle_s and not self._unacknowledged:
                return False
        self._check_stall()
        if self._flush_s and not self._is_urgent.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._flush_s):
                    await self._is_urgent.wait()
        return True

    def _check_stall(self) -> None:
        if self._unacknowledged and self._clock() - self._heard_s > STALL_S:
            raise _StalledError

    async def _write(self, call: grpc.aio.StreamStreamCall[delivery_pb2.DeliverRequest, object]) -> None:
        deliveries = list(self._pending.values())
        self._pending.clear()
        self._pending_since_s.clear()
        self._num_pending_tokens = 0
        self._has_pending.clear()
        self._is_urgent.clear()
        if deliveries:
            message = delivery_pb2.DeliverRequest(deliveries=deliveries)
            if not self._unacknowledged:
                self._heard_s = self._clock()
            self._unacknowledged.append(message)
            async with asyncio.timeout(STALL_S):
                await call.write(message)

    async def _read(self, call: AsyncIterator[delivery_pb2.DeliverResponse]) -> None:
        async for response in messages_of(call):
            # It is there: what breaks later is another absence.
            self._away_since_s, self._heard_s = None, self._clock()
            while self._num_acknowledged < response.num_received and self._unacknowledged:
                self._unacknowledged.popleft()
                self._num_acknowledged += 1
            if not self._unacknowledged and not self._pending:
                self.drained.set()
            if response.stopped_run_ids:
                self._on_stop(list(response.stopped_run_ids))


def _without_index(delivery: delivery_pb2.TokenDelivery, first_index: int) -> delivery_pb2.TokenDelivery:
    """Returns it with the first index of what it is merged into, which MergeFrom would otherwise overwrite."""
    delivery.first_index = first_index
    return delivery
