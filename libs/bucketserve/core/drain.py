"""How fast the queue empties, measured: the base of retry delays and of early rejection."""

from __future__ import annotations

import math

__all__ = ["DrainRate"]

TIME_CONSTANT_S = 10.0
WINDOW_S = 0.05
"""Requests of one step end together: shorter windows would hold all of them or none."""


class DrainRate:
    """Prompt tokens per second of finished requests while others wait, over about the last ten seconds of that.

    While nothing waits, what ends is what came and says nothing about what could be done.
    """

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._tokens, self._seconds = 0.0, 0.0
        self._pending_tokens = 0
        self._began_s: float | None = None
        """When the first request ended since something waits; None while nothing does."""
        self._since_s, self._last_s = 0.0, 0.0

    def finished(self, tokens: int, now_s: float) -> None:
        """Notes that a request of that many prompt tokens is done."""
        if self._began_s is None:
            self._began_s = now_s
        if now_s - self._began_s < WINDOW_S:
            # They ended with the first one, after a time that was not measured.
            self._since_s, self._last_s, self._pending_tokens = now_s, now_s, 0
            return
        self._pending_tokens += tokens
        self._last_s = now_s
        if now_s - self._since_s >= WINDOW_S:
            self._close()

    def pause(self) -> None:
        """Notes that nothing waits any more."""
        self._began_s = None
        self._close()

    def _close(self) -> None:
        """Books what ended since the last time."""
        elapsed_s = self._last_s - self._since_s
        kept = math.exp(-elapsed_s / TIME_CONSTANT_S)
        self._tokens = kept * self._tokens + self._pending_tokens
        self._seconds = kept * self._seconds + elapsed_s
        self._pending_tokens, self._since_s = 0, self._last_s

    def seconds_for(self, tokens: int) -> float:
        """Returns how long that many tokens take to drain; 1 s while nothing was measured, 0 for none."""
        if tokens <= 0:
            return 0.0
        measured_tokens = self._tokens + self._pending_tokens
        return tokens * (self._seconds + self._last_s - self._since_s) / measured_tokens if measured_tokens else 1.0
