"""A request over HTTP and its response, as ASGI has them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any
from urllib.parse import parse_qsl

import orjson

from bucketserve_gateway.openai.bodies import pieces_of
from bucketserve_gateway.openai.caller import REQUEST_ID, label_of, metadata_of
from bucketserve_gateway.openai.errors import Headers, HttpError, ParameterError, body_of, headers_of, status_of
from bucketserve_gateway.openai.fields import MAX_NAME_CHARACTERS

__all__ = [
    "EVENT_HEADERS",
    "JSON_TYPE",
    "ClientGoneError",
    "Exchange",
    "Message",
    "Receive",
    "Send",
    "event_of",
    "too_long",
]

JSON_TYPE = b"application/json"
EVENT_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies that would gather it first.
    (b"x-accel-buffering", b"no"),
]
MAX_QUERY_FIELDS = 16
PIECE_BYTES = 64 << 10
"""Of a response, given to the connection at once."""
TAKE_S, TAKE_BYTES_S = 30.0, 1 << 20
"""For a client to take a response: so long, and a second more for so many bytes of it. Until then it is held."""

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class ClientGoneError(Exception):
    """The client has closed its connection, or is to lose it: nobody is to be told anything."""


class Exchange:
    """One request and its response."""

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self._query: bytes = scope["query_string"]
        self.metadata = metadata_of(scope["headers"])
        """The headers of the request."""
        host, port = scope["client"] or ("", 0)
        self.peer = f"http:{host}:{port}"
        """The connection; a client may have several."""
        self.names: Mapping[str, str] = {}
        """For errors: fields of the native API -> parameters."""
        self._receive = receive
        self._send = send
        self._is_begun = False
        self._has_events = False
        self.request_id = label_of(self.metadata.get(REQUEST_ID, ""))
        """What the response calls it; empty: anything."""

    def header(self, name: str) -> bytes:
        """Returns a header of the request; empty if it has none of that name."""
        return self.metadata.get(name, "").encode("latin-1")

    def check_method(self, *methods: str) -> None:
        """Raises an error unless the request has one of these methods."""
        if self.method not in methods:
            message = f"not allowed to {self.method} on {self.path}"
            raise HttpError(405, message, "method_not_supported", [(b"allow", ", ".join(methods).encode())])

    def query(self, *names: str) -> dict[str, str]:
        """Returns the parameters of the query, which may have these names.

        Raises:
            ParameterError: there is another one, or one is there twice.
        """
        try:
            pairs = parse_qsl(self._query.decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS)
        except ValueError:
            raise ParameterError("", f"a query has at most {MAX_QUERY_FIELDS} parameters") from None
        found = dict(pairs)
        for name, _ in pairs:
            if name not in names:
                raise ParameterError(name[:MAX_NAME_CHARACTERS], "unknown parameter", "unknown_parameter")
        if len(found) < len(pairs):
            raise ParameterError("", "a parameter of the query is there twice", "invalid_value")
        return found

    async def pieces(self, most: int) -> AsyncIterator[bytes]:
        """Yields the body as it comes.

        Raises:
            ClientGoneError: it ended before it was whole.
            HttpError: it has more than so many bytes.
        """
        is_whole, num_bytes = False, 0
        while not is_whole:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            piece = message.get("body", b"")
            num_bytes += len(piece)
            if num_bytes > most:
                raise too_long(most)
            yield piece
            is_whole = not message.get("more_body", False)

    async def body(self, most: int) -> bytes:
        """Returns the body, which may have that many bytes."""
        return b"".join([piece async for piece in self.pieces(most)])

    async def while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Does the work; stops it when the client goes away."""
        try:
            async with asyncio.timeout(None) as until_gone:
                watch = asyncio.create_task(self._watch(until_gone))
                try:
                    await work
                finally:
                    watch.cancel()
        except TimeoutError:
            if until_gone.expired():
                raise ClientGoneError from None
            raise

    async def _watch(self, until_gone: asyncio.Timeout) -> None:
        """Ends a time when the client goes away."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        until_gone.reschedule(asyncio.get_running_loop().time())

    async def begin(self, status: int, headers: Headers) -> None:
        """Sends the head of the response."""
        self._is_begun, self._has_events = True, headers is EVENT_HEADERS
        request_id = self.request_id or secrets.token_hex(16)
        headers = [*headers, (REQUEST_ID.encode(), request_id.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes, is_last: bool = False) -> None:
        """Sends a piece of the response, as soon as the client takes it."""
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def answer(
        self, status: int, document: Mapping[str, Any], headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        """Sends a response.

        Raises:
            ClientGoneError: its client takes it too slowly; the connection is cut.
        """
        pieces = list(pieces_of(document))
        num_bytes = sum(map(len, pieces))
        await self.begin(status, [(b"content-type", JSON_TYPE), (b"content-length", b"%d" % num_bytes), *headers])
        if num_bytes <= PIECE_BYTES:
            await self.write(b"".join(pieces), is_last=True)
            return
        try:
            async with asyncio.timeout(TAKE_S + num_bytes / TAKE_BYTES_S):
                for piece in pieces:
                    for start in range(0, len(piece), PIECE_BYTES):
                        await self.write(bytes(piece[start : start + PIECE_BYTES]))
                        # The connection learns whether its client takes more, and others have their turn.
                        await asyncio.sleep(0)
                await self.write(b"", is_last=True)
        except TimeoutError:
            raise ClientGoneError from None

    async def fail(self, error: Exception) -> None:
        """Sends an error: as the response, or at the end of the stream of events that has begun.

        Anything else that has begun stays without its end: the connection is cut.
        """
        body = body_of(error, self.names)
        if self._has_events:
            await self.write(event_of(body), is_last=True)
        elif not self._is_begun:
            await self.answer(status_of(error), body, headers_of(error))


def event_of(document: Mapping[str, Any]) -> bytes:
    """Returns an event of a stream."""
    return b"data: " + orjson.dumps(document) + b"\n\n"


def too_long(most: int) -> HttpError:
    """Returns what is said of a body of more bytes."""
    return HttpError(413, f"a body has at most {most} bytes", "request_too_large")
