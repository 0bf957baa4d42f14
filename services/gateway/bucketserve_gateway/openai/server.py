"""The HTTP server in the gateway's event loop: uvicorn's connections, with the bounds that it does not have itself.

A connection that sends no request, sends one slowly, or does not take its response is closed after a while; heads are
bounded in bytes; what uvicorn keeps of a request beside head and body is bounded too.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from bucketserve.addresses import Address
from bucketserve.core.errors import SettingsError
from bucketserve.rpc.server import connections_by_descriptors
from bucketserve.rpc.tls import Tls
from bucketserve_gateway.openai.errors import CLOSE, HttpError, body_of
from bucketserve_gateway.openai.facade import OpenAIFacade

__all__ = ["HttpServer", "stop_listening"]

SILENT_S = 5.0
"""For a new connection to begin its first request."""
ARRIVE_S = 30.0
"""For a head to arrive, for the rest of a body that was refused, and for what was sent to be taken."""
IDLE_S = 75
"""Between requests: longer than clients keep connections, so that none is closed as they use it again."""
FRAME_BYTES = 1 << 20
"""Of a body, for the frames of its chunks."""
MAX_PIECES, BYTES_PER_PIECE = 500, 64
"""Headers and frames of a request: so many, and one more for each so many bytes of its body."""
MAX_PIPELINED = 16
"""Requests of a connection that wait for the one before them."""
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""A client whose machine is gone is noticed within a minute, though nothing is sent."""
BACKLOG = 1024
POLL_S, CUT_S = 0.02, 1.0


class HttpServer:
    """Listens, serves, leaves."""

    def __init__(
        self, listen: str, facade: OpenAIFacade, *, tls: Tls | None, max_connections: int, max_head_bytes: int
    ) -> None:
        """Binds nothing yet; with an empty address it never will.

        Args:
            listen: host:port; empty for none.
            facade: what serves.
            tls: how connections are secured; None: they aren't.
            max_connections: further ones are closed at once.
            max_head_bytes: most bytes of a request's head.
        """
        self._address = Address.parse(listen) if listen else None
        self._facade = facade
        self._tls = None if tls is None else tls.http_context()
        self._limits = (min(max_connections, connections_by_descriptors()), max_head_bytes)
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Binds and accepts connections.

        Raises:
            SettingsError: the address can't be bound.
        """
        if self._address is None:
            return
        config = uvicorn.Config(
            self._facade,
            ws="none",
            lifespan="off",
            log_config=None,
            # What clients do wrong is no event of ours.
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_S,
        )
        config.load()
        try:
            self._server = await _listen(
                self._address, lambda: _Connection(config, self._state, *self._limits), self._tls
            )
        except OSError as error:
            problem = error.strerror or error
            raise SettingsError([f"http_listen: can't listen on {self._address}: {problem}"]) from error

    async def set_serving(self, is_serving: bool) -> None:
        """Answers /health accordingly."""
        self._facade.is_serving = is_serving

    async def leave(self, lame_duck_s: float) -> None:
        """Parts with clients, as RpcServer.leave does; running exchanges go on until stop()."""
        await self.set_serving(False)
        # Who is answered meanwhile leaves by itself: no request of its crosses the closing of its connection.
        self._state.default_headers.append(CLOSE)
        await asyncio.sleep(lame_duck_s)
        await self._close()

    async def _close(self) -> None:
        """Takes no more connections; closes idle ones, and the others as soon as they have answered."""
        if self._server is not None:
            await stop_listening(self._server)
        for connection in list(self._state.connections):
            connection.shutdown()

    async def stop(self, grace_s: float) -> None:
        """Lets running exchanges finish for at most grace_s seconds, then cuts them."""
        await self._close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._state.connections:
                    await asyncio.sleep(POLL_S)
        for connection in list(self._state.connections):
            connection.transport.abort()
        if self._state.tasks:
            # They notice that their clients are gone.
            await asyncio.wait(self._state.tasks, timeout=CUT_S)


async def stop_listening(server: asyncio.Server) -> None:
    """Accepts no more connections, lets those that were accepted begin, and closes the server.

    asyncio drops, without closing it, what was accepted but has no transport yet when its server is closed
    (base_events.Server._attach).
    """
    for listening in server.sockets:
        server.get_loop().remove_reader(listening.fileno())
    await asyncio.sleep(0)
    server.close()


async def _listen(
    address: Address, connection: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None
) -> asyncio.Server:
    loop, (host, port) = asyncio.get_running_loop(), address
    patience_s = None if tls is None else SILENT_S
    if not address.is_wildcard:
        return await loop.create_server(
            connection, host, port, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=patience_s
        )
    # Of both families, as gRPC's servers do.
    if socket.has_dualstack_ipv6():
        bound = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        bound = socket.create_server(("0.0.0.0", port))
    return await loop.create_server(connection, sock=bound, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=patience_s)


class _Part(Enum):
    """Which part of a request is to come."""

    BETWEEN = auto()
    HEAD = auto()
    BODY = auto()


class _Gathering:
    """A transport that sends together what is written in a turn of the event loop: the last events come at once."""

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._written: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Sends data in the next turn."""
        if not self._written:
            self._loop.call_soon(self._flush)
        self._written.append(data)

    def close(self) -> None:
        """Closes when everything has been sent."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        written, self._written = self._written, []
        if written and not self._transport.is_closing():
            self._transport.writelines(written)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Connection(HttpToolsProtocol):
    """A client's connection."""

    def __init__(self, config: uvicorn.Config, state: ServerState, max_connections: int, max_head_bytes: int) -> None:
        super().__init__(config, state, app_state={})
        self._max_connections = max_connections
        self._max_head_bytes = max_head_bytes
        self._part = _Part.BETWEEN
        self._num_bytes = 0
        """Of the request so far, without its body."""
        self._num_head_bytes = 0
        """Of what has been read of its head."""
        self._num_pieces = 0
        self._num_body_bytes = 0
        self._arrival: asyncio.TimerHandle | None = None
        """Cuts the connection, unless what is due arrives."""
        self._taking: asyncio.TimerHandle | None = None
        """Cuts the connection, unless its client takes what was sent."""

    def connection_made(self, transport: Any) -> None:
        gathering: Any = _Gathering(transport, self.loop)
        super().connection_made(gathering)
        if len(self.connections) > self._max_connections:
            transport.abort()
            return
        if connection := transport.get_extra_info("socket"):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE.items():
                if option := getattr(socket, name, None):
                    connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._expect_arrival(SILENT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_arrived()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._part is _Part.HEAD and self._num_bytes > self._max_head_bytes:
            self._refuse(self._too_large())
        elif self._num_bytes > self._max_head_bytes + FRAME_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self._cut()
        self._part = _Part.HEAD
        self._expect_arrival(ARRIVE_S)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._part = _Part.BODY
        self._has_arrived()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_piece()
        # With a colon and the line's end.
        self._count_head(len(name) + len(value) + 3)
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._num_bytes -= len(body)
        self._num_body_bytes += len(body)
        self._count_piece()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._part, self._num_bytes, self._num_pieces, self._num_body_bytes = _Part.BETWEEN, 0, 0, 0
        self._num_head_bytes = 0
        self._has_arrived()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_taking()
        elif self._part is _Part.BODY:
            # It was answered before all of it had come: what still comes is thrown away.
            self._expect_arrival(ARRIVE_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_taking()

    def resume_writing(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HttpError(400, msg))

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._expect_taking()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._expect_taking()

    def _refuse(self, error: HttpError) -> None:
        """Says what is wrong with what is no request, and closes."""
        if self.transport.is_closing():
            return
        if self._is_answering():
            self.transport.abort()
            return
        body = orjson.dumps(body_of(error, {}))
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()
        self._expect_taking()

    def _is_answering(self) -> bool:
        """Returns whether what is said now would be taken for the answer to another request, or for a part of one."""
        cycle = self.cycle
        if self.pipeline or cycle is None:
            return bool(self.pipeline)
        return cycle.response_started if self._part is _Part.BODY else not cycle.response_complete

    def _too_large(self) -> HttpError:
        return HttpError(431, f"a head has at most {self._max_head_bytes} bytes", "headers_too_large")

    def _count_head(self, num_bytes: int) -> None:
        """Counts what was read of a head, blanks before values apart: all of it may have come at once."""
        self._num_head_bytes += num_bytes
        if self._part is _Part.HEAD and self._num_head_bytes > self._max_head_bytes:
            self._refuse(self._too_large())
            raise ConnectionAbortedError

    def _count_piece(self) -> None:
        self._num_pieces += 1
        if self._num_pieces > MAX_PIECES + self._num_body_bytes // BYTES_PER_PIECE:
            self._cut()

    def _cut(self) -> None:
        """Ends the connection, and the reading of what has come: that might take longer than others can wait."""
        self.transport.abort()
        raise ConnectionAbortedError

    def _expect_arrival(self, within_s: float) -> None:
        self._has_arrived()
        self._arrival = self.loop.call_later(within_s, self.transport.abort)

    def _has_arrived(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _expect_taking(self) -> None:
        if self._taking is None:
            self._taking = self.loop.call_later(ARRIVE_S, self.transport.abort)
