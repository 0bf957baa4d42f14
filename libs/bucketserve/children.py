"""Child processes that end with their parent, however it ends: kill -9 too, which leaves it no time to stop them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO

__all__ = ["Child"]

_STUB = """
import fcntl, os, select, signal, sys
pipe = int(sys.argv[1])
if hasattr(fcntl, "F_SETSIG"):
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:
        sys.exit(0)
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Runs in the child before its program. The kernel sends SIGTERM when the pipe's other end, the parent's, is closed.

PR_SET_PDEATHSIG would be shorter, but it fires when the thread that started the child ends. Elsewhere than on Linux
children outlive a parent that was killed.
"""


class Child(subprocess.Popen[bytes]):
    """A child that gets SIGTERM when its parent is gone; in a session of its own, so that Ctrl-C reaches only us."""

    def __init__(
        self, command: Sequence[str], *, environ: Mapping[str, str] | None = None, output: int | IO[bytes]
    ) -> None:
        """Starts it. Both output streams go to `output`; environ None: our own."""
        reading, self._writing = os.pipe()
        try:
            super().__init__(
                [sys.executable, "-I", "-S", "-c", _STUB, str(reading), *command],
                env=None if environ is None else dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(reading,),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._writing)
            raise
        finally:
            os.close(reading)

    def poll(self) -> int | None:
        """Returns how it ended; None while it runs."""
        status = super().poll()
        self._release(status)
        return status

    def wait(self, timeout: float | None = None) -> int:
        """Returns how it ended.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        status = super().wait(timeout)
        self._release(status)
        return status

    def _release(self, status: int | None) -> None:
        if status is not None and self._writing >= 0:
            os.close(self._writing)
            self._writing = -1
