"""What a service does first. Imports next to nothing: it runs before all other imports."""

from __future__ import annotations

import os
import signal

__all__ = ["STOP_SIGNALS", "leave_on_signal", "quieten_grpc"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def leave_on_signal() -> None:
    """From now on a signal to stop ends the process at once with status 0: it serves nobody yet.

    A process without a handler ignores SIGTERM if it is a container's first, and would be killed after the whole grace.
    What is ignored already (nohup) stays ignored.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            # Not sys.exit: an import that is under way may catch any exception.
            signal.signal(number, lambda *_: os._exit(0))


def quieten_grpc() -> None:
    """Keeps gRPC's core from writing a line, not in our log's form, about each handshake that fails: anybody can fail.

    It looks at the variable as it is imported. Who wants these lines sets it.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
