"""The server interceptor that turns what a handler raises into a status, and unreadable bytes into INVALID_ARGUMENT."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError

from bucketserve.core.errors import BucketServeError, FieldViolation, InvalidRequestError
from bucketserve.rpc.status import status_of

__all__ = ["ErrorInterceptor", "check_readable", "first_message"]

R = TypeVar("R")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class _Refused:
    """Stands for a message that was refused as it was read."""

    def __init__(self, error: BucketServeError) -> None:
        self.error = error


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps typed errors to statuses with details; anything unexpected to INTERNAL, reported once, its detail kept in.

    Cancellation passes through untouched: swallowing it leaks the call.
    """

    def __init__(self, on_unexpected: Callable[[str, BaseException], None]) -> None:
        """on_unexpected(method, error) is called for errors that are not ours."""
        self._on_unexpected = on_unexpected

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wraps handlers of all four kinds; a call that another interceptor refuses has one of its own."""
        method = handler_call_details.method
        try:
            handler = await continuation(handler_call_details)
        except BucketServeError as error:
            refusal = error

            async def refuse(requests: Any, context: Any) -> None:
                await self._abort(method, context, refusal)

            return grpc.stream_stream_rpc_method_handler(refuse)
        if handler is None:
            return None
        read: Any = handler.request_deserializer

        def deserialize(data: bytes) -> Any:
            try:
                return read(data)
            except (DecodeError, UnicodeDecodeError):
                unreadable = "not a readable message; are all strings valid UTF-8?"
                return _Refused(InvalidRequestError([FieldViolation("", unreadable)]))
            except BucketServeError as error:
                return _Refused(error)

        if handler.response_streaming:
            inner: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                try:
                    if handler.request_streaming:
                        request = _readable(request)
                    else:
                        check_readable(request)
                    answers = inner(request, context)
                    if inspect.isasyncgen(answers):
                        # Closed at once when the call is cancelled, rather than whenever it is collected.
                        async with aclosing(answers):
                            async for answer in answers:
                                yield answer
                    else:
                        await answers
                except BaseException as error:
                    await self._abort(method, context, error)

            of_kind = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return of_kind(stream, request_deserializer=deserialize, response_serializer=handler.response_serializer)
        behavior: Any = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def single(request: Any, context: Any) -> Any:
            try:
                if handler.request_streaming:
                    request = _readable(request)
                else:
                    check_readable(request)
                answer = behavior(request, context)
                return await answer if inspect.isawaitable(answer) else answer
            except BaseException as error:
                await self._abort(method, context, error)

        of_kind = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return of_kind(single, request_deserializer=deserialize, response_serializer=handler.response_serializer)

    async def _abort(self, method: str, context: Any, error: BaseException) -> None:
        if not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, BucketServeError):
            # The frames that it came through have the request, which may be large, and the answer may take a while.
            error.__traceback__ = None
            await context.abort_with_status(status_of(error))
        if isinstance(error, NotImplementedError):
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not implemented")
        self._on_unexpected(method, error)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error")


async def first_message(requests: AsyncIterator[R]) -> R:
    """Returns the first message of a stream.

    Raises:
        InvalidRequestError: the stream ended without one.
    """
    async for request in requests:
        return request
    raise InvalidRequestError([FieldViolation("", "the stream ended before its first message")])


async def _readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        check_readable(request)
        yield request


def check_readable(request: Any) -> None:
    """Checks what a deserialiser that ErrorInterceptor has wrapped returned.

    Raises:
        InvalidRequestError: the bytes were not the message that the method takes.
        BucketServeError: what the deserialiser raised.
    """
    if isinstance(request, _Refused):
        raise request.error
