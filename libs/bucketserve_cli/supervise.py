"""Keeping a local stack running: what ends by itself is started again, what the user says is done."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

from bucketserve.core.errors import UnavailableError
from bucketserve.starting import STOP_SIGNALS
from bucketserve_cli.stack import LocalStack

__all__ = ["interrupted_by_signals", "keep_running"]

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 30.0
STEADY_S = 60.0
"""Who has run for so long is started again without delay, the next time."""
POLL_S = 0.2


class _Restarts:
    """When a part that ended may start again: at once, then after 1 s, 2 s, and so on up to 30 s."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._delay_s = 0.0
        self.due_s: float | None = None

    def ended(self) -> float:
        """Notes that it ended; returns in how many seconds it is due."""
        now_s = time.monotonic()
        if now_s - self._started_s > STEADY_S:
            self._delay_s = 0.0
        self.due_s = now_s + self._delay_s
        delay_s = self._delay_s
        self._delay_s = min(max(self._delay_s * 2, FIRST_DELAY_S), MAX_DELAY_S)
        return delay_s

    def started(self) -> None:
        """Notes that it was started again."""
        self._started_s = time.monotonic()
        self.due_s = None


@contextlib.contextmanager
def interrupted_by_signals(stack: LocalStack) -> Iterator[None]:
    """Within it, Ctrl-C, SIGTERM and the end of the terminal interrupt the stack; what is ignored stays ignored."""

    def on_signal(number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            # Nobody reads any more; writing to a terminal that is gone fails.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        stack.interrupt()

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_running(stack: LocalStack, say: Callable[[str], None]) -> None:
    """Returns when the stack is interrupted; until then starts again whatever ends, and says so if it can be said."""

    def tell(line: str) -> None:
        # Its reader may be gone, or the disk full: nobody is served less for that. Rich answers the former by an exit.
        with contextlib.suppress(OSError, SystemExit):
            say(line)

    restarts = {name: _Restarts() for name in stack.services}
    of_store = _Restarts()
    away: set[str] = set()
    while not stack.wait_interrupted(POLL_S):
        if stack.store is not None and not stack.store.is_running:
            _start_store_again(stack, of_store, tell)
        for name, service in list(stack.services.items()):
            if service.exit_status is not None:
                away.add(name)
                _start_again(stack, name, restarts[name], tell)
            elif name in away and stack.is_serving(name):
                away.remove(name)
                tell(f"{name} serves again")


def _start_again(stack: LocalStack, name: str, state: _Restarts, say: Callable[[str], None]) -> None:
    if state.due_s is None:
        delay_s = state.ended()
        when = f"in {delay_s:.0f} s" if delay_s else "now"
        service = stack.services[name]
        say(f"{name} ended with status {service.exit_status}; it is started again {when}\n{service.log_tail(5)}")
    if state.due_s is not None and time.monotonic() >= state.due_s:
        # No memory, no process or no disk at present: it counts as started, and as ended again.
        with contextlib.suppress(OSError):
            stack.restart(name)
        state.started()


def _start_store_again(stack: LocalStack, state: _Restarts, say: Callable[[str], None]) -> None:
    if stack.store is None:
        return
    if state.due_s is None:
        state.ended()
        say("valkey ended; it is started again, empty: open requests go on, batch jobs are lost")
    if state.due_s is not None and time.monotonic() >= state.due_s:
        state.started()
        with contextlib.suppress(UnavailableError, OSError):
            stack.store.start()
