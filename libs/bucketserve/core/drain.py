"""How fast the queue empties, measured: the base of retry delays and of early rejection."""

from __future__ import annotations

__all__ = ["DrainRate"]

TIME_CONSTANT_S = 10.0


class DrainRate:
    """Prompt tokens per second of finished requests, exponentially weighted over about ten seconds."""

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._tokens_per_s = 0.0
        self._pending_tokens = 0
        self._last_s: float | None = None

    def finished(self, tokens: int, now_s: float) -> None:
        """Notes that a request of that many prompt tokens is done."""
        if self._last_s is None:
            self._last_s = now_s
        self._pending_tokens += tokens
        elapsed_s = now_s - self._last_s
        if elapsed_s < 0.05:
            return
        share = min(elapsed_s / TIME_CONSTANT_S, 1.0)
        rate = self._pending_tokens / elapsed_s
        self._tokens_per_s = rate if self._tokens_per_s == 0.0 else (1 - share) * self._tokens_per_s + share * rate
        self._pending_tokens, self._last_s = 0, now_s

    def seconds_for(self, tokens: int) -> float:
        """Returns how long that many tokens take to drain; 1 s while nothing was measured, 0 for none."""
        if tokens <= 0:
            return 0.0
        return tokens / self._tokens_per_s if self._tokens_per_s else 1.0
