"""Finding the scheduler that leads a model: addresses in turn, quickly at first, and never back to an older leader."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Sequence

import grpc

from bucketserve.core.errors import UnavailableError
from bucketserve.rpc.channel import open_channel
from bucketserve.rpc.status import is_answered
from bucketserve.rpc.tls import Tls
from bucketserve.v1 import scheduler_pb2, scheduler_pb2_grpc

__all__ = ["LeaderSearch", "Talk"]

RETRY_S, SLOW_RETRY_S = 0.2, 1.0
QUICK_TRIES = 25
"""A takeover is over by then; what is still away is asked less often."""
OLD_EPOCH_S = 10.0
"""How long an older leader is not listened to after a newer one was; a store that lost its data may count anew."""

Talk = Callable[[scheduler_pb2_grpc.SchedulerServiceStub, str], Awaitable[None]]
"""(stub, address): one stream, until it ends; calls welcomed() when the scheduler has answered."""


class LeaderSearch:
    """Keeps talking to whichever scheduler leads a model."""

    def __init__(
        self, model: str, addresses: Sequence[str], tls: Tls | None, on_state: Callable[[bool, str], None]
    ) -> None:
        """Addresses are tried in turn, in an order of the model's own; who is asked first leads it, if nobody does.

        on_state(connected, detail) with every stream that begins, ends or can't be had.
        """
        self._model = model
        self._addresses = sorted(addresses, key=lambda address: zlib.crc32(f"{model} {address}".encode()))
        self._tls = tls
        self._on_state = on_state
        self._epoch = 0
        self._heard_s = 0.0
        self._absent_since_s: float | None = None
        self._answered_s: float | None = None
        """When a scheduler was last there, after a first one had led: it led, or said that it does not."""
        self._is_welcome = False
        self._num_failed = 0
        self.detail = "none was reached yet"
        """Why there is no stream."""

    def is_present(self, grace_s: float) -> bool:
        """Whether a scheduler is heard, or was not long ago."""
        if self._is_welcome:
            return True
        return self._absent_since_s is not None and time.monotonic() - self._absent_since_s < grace_s

    def may_come(self, grace_s: float) -> bool:
        """Whether a scheduler is heard, or one that may lead again was there not long ago."""
        if self._is_welcome:
            return True
        return self._answered_s is not None and time.monotonic() - self._answered_s < grace_s

    def welcomed(self, hello: scheduler_pb2.SchedulerHello, address: str) -> None:
        """Notes that a scheduler has answered.

        Raises:
            UnavailableError: a newer one led a moment ago: this one does not know yet that it was replaced.
        """
        now_s = time.monotonic()
        if hello.epoch < self._epoch and now_s - self._heard_s < OLD_EPOCH_S:
            raise UnavailableError(f"{hello.scheduler_id} leads no more (epoch {hello.epoch}, now {self._epoch})")
        self._epoch, self._heard_s = hello.epoch, now_s
        self._is_welcome, self._num_failed = True, 0
        self._on_state(True, f"{self._model} at {address}: {hello.scheduler_id}")

    async def run(self, talk: Talk) -> None:
        """Stays connected; ends only by cancellation."""
        turn = 0
        while True:
            address = self._addresses[turn % len(self._addresses)]
            try:
                async with open_channel(address, self._tls) as channel:
                    await talk(scheduler_pb2_grpc.SchedulerServiceStub(channel), address)
                detail = "stream ended"
            except grpc.aio.AioRpcError as error:
                detail = f"{error.code().name}: {error.details()}"
                if self._answered_s is not None and is_answered(error):
                    self._answered_s = time.monotonic()
            except UnavailableError as error:
                detail = str(error)
            if self._is_welcome:
                self._heard_s = self._absent_since_s = self._answered_s = time.monotonic()
                self._is_welcome = False
            self.detail = f"{self._model} at {address}: {detail}"
            self._on_state(False, self.detail)
            turn += 1
            self._num_failed += 1
            await asyncio.sleep(RETRY_S if self._num_failed <= QUICK_TRIES else SLOW_RETRY_S)
