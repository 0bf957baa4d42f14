"""One service as a child process, with its log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import grpc

from bucketserve.children import Child
from bucketserve.rpc.probe import check_health
from bucketserve.rpc.tls import Tls

__all__ = ["ServiceProcess"]

KILL_S = 5.0


class ServiceProcess:
    """One child process with its log file."""

    def __init__(
        self,
        name: str,
        module: str,
        environ: Mapping[str, str],
        health_address: str,
        log_dir: Path,
        health_service: str = "",
        tls: Tls | None = None,
    ) -> None:
        """Starts it, with `environ` over our own environment; health_service is what tells it from others there.

        tls is how it is asked for its health.
        """
        self.name = name
        self.health_address = health_address
        self.log_path = log_dir / f"{name}.log"
        self._again = (name, module, environ, health_address, log_dir, health_service, tls)
        self._tls = tls
        self._health_service = health_service
        # Whoever cleans up may have taken it away since it was made.
        log_dir.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._process = Child([sys.executable, "-m", module], environ={**os.environ, **environ}, output=log)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.poll()

    def is_serving(self) -> bool:
        """Whether it runs and answers SERVING. Another program may have its address: then ours is about to end."""
        if self.exit_status is not None:
            return False
        try:
            health = check_health(self.health_address, timeout_s=1.0, service=self._health_service, tls=self._tls)
        except grpc.RpcError:
            return False
        return health == "SERVING"

    def last_event(self) -> Mapping[str, object]:
        """Returns the last JSON line of its log, empty if there is none."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            lines = self.log_path.read_bytes()[-8192:].splitlines()
            event = json.loads(lines[-1])
            if isinstance(event, dict):
                return event
        return {}

    def log_tail(self, num_lines: int = 15) -> str:
        """Returns the end of its log; empty if that is gone."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, if it still runs."""
        if self.exit_status is None:
            self._process.send_signal(number)

    def again(self) -> ServiceProcess:
        """Returns a new process started the same way; its log goes on in the same file."""
        return ServiceProcess(*self._again)

    def wait(self, timeout_s: float) -> int:
        """Waits for its end; kills it when that takes longer than timeout_s. Returns the exit status."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(KILL_S)
