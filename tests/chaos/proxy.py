"""A TCP relay that does what a network does: cuts connections, refuses them, or lets them hang in either direction."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from bucketserve_gateway.openai.server import stop_listening
from tests.listening import num_connections

__all__ = ["Relay", "kernel_address"]


class Relay:
    """Listens on a port of its own and relays to one address."""

    def __init__(self, target: str) -> None:
        """Relays to host:port. Its own address is known at once; it listens once started."""
        self.target = target
        self.there, self.back = asyncio.Event(), asyncio.Event()
        """Set while bytes pass from clients to the target, and from the target to clients. What came meanwhile is held,
        goodbyes too; the sender's own buffers fill up, and nobody is told."""
        self.is_refusing = False
        """Whether new connections are reset."""
        self.delay_s = 0.0
        """How long bytes take, in either direction."""
        self._hops: dict[asyncio.StreamWriter, tuple[str, str]] = {}
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.resume()

    async def start(self) -> None:
        """Listens."""
        self._server = await asyncio.start_server(self._relay, sock=self._socket)

    def resume(self) -> None:
        """Lets everything pass, beginning with what was held."""
        self.is_refusing = False
        self.there.set()
        self.back.set()

    def cut(self) -> int:
        """Breaks all connections without a goodbye; returns their number."""
        for writer in self._open:
            writer.transport.abort()
        return len(self._open) // 2

    @property
    def hops(self) -> dict[str, str]:
        """Whom an end of ours stands for, as the kernel writes addresses: the target, and who is connected to it."""
        return {kernel_address(self.address): kernel_address(self.target), **dict(self._hops.values())}

    async def close(self) -> None:
        """Ends everything."""
        self.resume()
        if self._server is not None:
            await stop_listening(self._server)
            # What has just been accepted or is on its way ends within this loop, or its sockets would be left open.
            while self._open or num_connections(self._server):
                self.cut()
                await asyncio.sleep(0.01)
        self._socket.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_refusing:
            writer.transport.abort()
            return
        self._open.add(writer)
        host, _, port = self.target.rpartition(":")
        try:
            there, back = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            self._open.discard(writer)
            return
        self._open.add(back)
        self._hops[back] = (_end(back, "sockname"), _end(writer, "peername"))
        try:
            await asyncio.gather(self._pump(reader, back, self.there), self._pump(there, writer, self.back))
        finally:
            del self._hops[back]
            for end in (writer, back):
                end.transport.abort()
                with contextlib.suppress(OSError):
                    await end.wait_closed()
            self._open -= {writer, back}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passes: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await asyncio.sleep(self.delay_s)
                await passes.wait()
                writer.write(data)
                await writer.drain()
        await passes.wait()
        with contextlib.suppress(OSError):
            writer.close()


def kernel_address(address: str) -> str:
    """Returns host:port, of IPv4, as /proc/net/tcp has it."""
    host, _, port = address.rpartition(":")
    return f"{int.from_bytes(socket.inet_aton(host), 'little'):08X}:{int(port):04X}"


def _end(writer: asyncio.StreamWriter, which: str) -> str:
    host, port = writer.get_extra_info(which)
    return kernel_address(f"{host}:{port}")
