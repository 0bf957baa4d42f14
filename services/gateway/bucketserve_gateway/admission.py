"""Who is served at once: the one owner of the counts of open calls and of the bytes that requests hold.

Calls are counted before anything of them is read, and so before gRPC's own limits, which refuse without a reason or a
delay. The interceptor reads a call's one request itself, through a bounded number of places.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import grpc

from bucketserve.core.errors import FieldViolation, InvalidRequestError, OverloadedError
from bucketserve.rpc.interceptors import check_readable
from bucketserve_gateway.reads import Reads

__all__ = ["Admission", "AdmissionInterceptor", "Room", "text_bytes"]

RETRY_S = 1.0
PLACE_BYTES, WHOLE_COPIES = 8, 3
"""Of a piece of a text in a list; of a whole text: joined, in a message, as bytes."""
HEALTH = "/grpc.health.v1.Health/"
HEALTH_READS = 64
REFLECTION = "/grpc.reflection."

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Admission:
    """Bounds calls, calls of a connection, and bytes. Whatever enters leaves by a context manager."""

    def __init__(
        self,
        *,
        max_calls: int,
        max_calls_per_connection: int,
        max_bytes: int,
        on_refused: Callable[[str], None],
    ) -> None:
        """Calls on_refused(reason) for each refusal."""
        self._max_calls = max_calls
        self._max_calls_per_connection = max_calls_per_connection
        self.max_bytes = max_bytes
        """Most bytes held."""
        self._on_refused = on_refused
        self._by_connection: Counter[str] = Counter()
        self.num_calls = 0
        """Calls open now."""
        self.num_bytes = 0
        """Bytes held now."""

    @contextlib.contextmanager
    def call(self, peer: str) -> Iterator[None]:
        """Around a call from a connection.

        Raises:
            OverloadedError: too many are open, for a connection that has so many, or of the connection.
        """
        # A connection may have as many as are still free: n greedy ones leave room for as many as each of them has.
        num_free = self._max_calls - self.num_calls
        if self._by_connection[peer] >= num_free:
            raise self.refusal("MAX_CALLS", f"{self.num_calls} calls are open at this gateway")
        if self._by_connection[peer] >= self._max_calls_per_connection:
            most = self._max_calls_per_connection
            raise self.refusal("MAX_CALLS_PER_CONNECTION", f"{most} calls are open on this connection")
        self.num_calls += 1
        self._by_connection[peer] += 1
        try:
            yield
        finally:
            self.num_calls -= 1
            self._by_connection[peer] -= 1
            if not self._by_connection[peer]:
                del self._by_connection[peer]

    @contextlib.contextmanager
    def room(self) -> Iterator[Room]:
        """Around what holds bytes: none at first."""
        room = Room(self)
        try:
            yield room
        finally:
            self.change(-room.num_bytes)

    def change(self, by: int) -> None:
        """Takes that many bytes more, or gives them back.

        Raises:
            OverloadedError: they don't fit beside what others hold. One that is too large for all may be alone.
        """
        if by > 0 and self.num_bytes and self.num_bytes + by > self.max_bytes:
            raise self.refusal("MAX_HELD_BYTES", f"open requests hold {self.num_bytes} bytes at this gateway")
        self.num_bytes += by

    def refusal(self, reason: str, message: str) -> OverloadedError:
        """Returns the error of a refusal, which is counted."""
        self._on_refused(reason)
        return OverloadedError(message, reason=reason, retry_delay_s=RETRY_S)


class Room:
    """The bytes of one request."""

    def __init__(self, admission: Admission) -> None:
        """Holds none yet."""
        self._admission = admission
        self.num_bytes = 0
        self.is_too_small = False
        """Whether what was last wanted would not even fit alone."""

    def resize(self, num_bytes: int) -> None:
        """Holds that many bytes from now on.

        Raises:
            OverloadedError: there is no room; what was held is held.
        """
        self.is_too_small = num_bytes > self._admission.max_bytes
        self._admission.change(num_bytes - self.num_bytes)
        self.num_bytes = num_bytes

    def grow(self, by: int) -> None:
        """Holds so many bytes more, or fewer.

        Raises:
            OverloadedError: as resize().
        """
        self.resize(self.num_bytes + by)


class AdmissionInterceptor(grpc.aio.ServerInterceptor):
    """Admits calls before they are read. Health checks are not counted: they are answered while everything is full."""

    def __init__(self, admission: Admission, reads: Reads) -> None:
        """Takes the counts and the places."""
        self._admission = admission
        self._reads = reads
        self._health_reads = Reads(HEALTH_READS, admission.refusal)
        self._handlers: dict[str, Handler] = {}
        """By method, of those that there are."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Makes each handler one that takes a stream of requests, of which nothing is read before it says so.

        It must be the last interceptor: a method's handler is taken to be the same for all calls.
        """
        method = str(handler_call_details.method)
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._handlers[method] = self._admitting(method, handler)
        return self._handlers[method]

    def _admitting(self, method: str, handler: Handler) -> Handler:
        is_health = method.startswith(HEALTH)
        # Our own services bound their streams of requests; the library's would be as many as calls may be open.
        is_reflection = method.startswith(REFLECTION)
        reads = self._health_reads if is_health else self._reads
        inner: Any = next(
            behavior
            for behavior in (handler.stream_stream, handler.stream_unary, handler.unary_stream, handler.unary_unary)
            if behavior is not None
        )

        def door(context: Any) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext() if is_health else self._admission.call(context.peer())

        async def request_of(context: Any) -> Any:
            if handler.request_streaming:
                return _requests_of(
                    partial(reads.read, context.peer(), context.read) if is_reflection else context.read
                )
            request = await reads.read(context.peer(), context.read)
            if request is grpc.aio.EOF:
                raise InvalidRequestError([FieldViolation("", "the call ended before its request")])
            check_readable(request)
            return request

        if handler.response_streaming:

            async def stream(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
                with door(context):
                    answers = inner(await request_of(context), context)
                    if not inspect.isasyncgen(answers):
                        # It writes its answers to the context.
                        await answers
                        return
                    async with contextlib.aclosing(answers):
                        async for answer in answers:
                            yield answer

            return grpc.stream_stream_rpc_method_handler(
                stream, handler.request_deserializer, handler.response_serializer
            )

        async def single(requests: AsyncIterator[Any], context: Any) -> Any:
            with door(context):
                answer = inner(await request_of(context), context)
                return await answer if inspect.isawaitable(answer) else answer

        return grpc.stream_unary_rpc_method_handler(single, handler.request_deserializer, handler.response_serializer)


def text_bytes(text: str) -> int:
    """Returns what a piece of a text that is collected takes, with its part of the whole as that leaves."""
    return sys.getsizeof(text) + PLACE_BYTES + WHOLE_COPIES * len(text.encode())


async def _requests_of(read: Callable[[], Awaitable[Any]]) -> AsyncIterator[Any]:
    """Yields the requests of a stream without keeping any; gRPC's own iterator keeps the last one until the next."""
    while (box := [await read()])[0] is not grpc.aio.EOF:
        check_readable(box[0])
        yield box.pop()
