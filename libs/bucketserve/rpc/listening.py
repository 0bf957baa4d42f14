"""Listening to a stream call, and leaving it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from bucketserve.core.errors import UnavailableError
from bucketserve.tasks import heeded

__all__ = ["SILENCE_S", "hang_up", "messages_of", "messages_while_alive"]

SILENCE_S = 2.5
"""Several heartbeats: a scheduler that is busy for a moment is not given up."""


async def messages_of(call: Any) -> AsyncIterator[Any]:
    """Yields the messages of a stream call until it ends.

    Raises:
        grpc.aio.AioRpcError: the stream failed.
    """
    while (message := await heeded(call.read())) is not grpc.aio.EOF:
        yield message


async def messages_while_alive(call: Any, silence_s: float = SILENCE_S) -> AsyncIterator[Any]:
    """Yields the messages of a stream call, whose other side says something now and then as long as it lives.

    Raises:
        UnavailableError: nothing came for silence_s seconds.
        grpc.aio.AioRpcError: the stream failed.
    """
    while True:
        try:
            async with asyncio.timeout(silence_s):
                message = await heeded(call.read())
        except TimeoutError:
            raise UnavailableError(f"silent for {silence_s:g} s", reason="SILENT") from None
        if message is grpc.aio.EOF:
            return
        yield message


def hang_up(call: Any) -> None:
    """Ends a stream call for good, whatever has become of it.

    A call that could not write counts as done to grpc.aio, whose cancel() then does nothing: in gRPC's core the call
    would stay, with a task that waits for its status, behind messages that nobody reads any more.
    """
    if not call.cancel():
        call._cython_call.cancel("hung up")
