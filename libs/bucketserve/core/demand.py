"""How much KV memory the requests in time need: what they leave is for deferred ones."""

from __future__ import annotations

import math

from bucketserve.core.lanes import Lane

__all__ = ["Demand"]

TIME_CONSTANT_S = 30.0
MARGIN = 1.25
"""Memory kept for requests in time, as a multiple of what they used on average: their use goes up and down."""


class Demand:
    """KV tokens at workers by lane, and the average of those in time over about half a minute."""

    def __init__(self) -> None:
        """Nothing runs."""
        self._tokens = {lane: 0 for lane in Lane}
        self._average = 0.0
        self._last_s = 0.0

    def took(self, lane: Lane, tokens: int, now_s: float) -> None:
        """Notes tokens reserved at a worker; negative when they are free again."""
        self.advance(now_s)
        self._tokens[lane] += tokens

    def tokens(self, lane: Lane) -> int:
        """Returns the KV tokens that a lane's requests have reserved at workers."""
        return self._tokens[lane]

    def deferred_room(self, total_tokens: int, share: float) -> int:
        """Returns how many further tokens deferred requests may take, of that many in all; at least their share."""
        left = max(total_tokens - MARGIN * self._average, share * total_tokens)
        return int(left) - self._tokens[Lane.DEFERRED]

    def advance(self, now_s: float) -> None:
        """Lets time pass."""
        elapsed_s = now_s - self._last_s
        if elapsed_s > 0:
            keep = math.exp(-elapsed_s / TIME_CONSTANT_S)
            self._average = keep * self._average + (1 - keep) * self._tokens[Lane.IN_TIME]
            self._last_s = now_s
