"""Which arrivals of a run count: those that found the cluster as loaded as it stays."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SPAN_FACTOR", "Window"]

SPAN_FACTOR = 10.0
"""Arrivals last at least this many times the longest request alone, so that the load is steady for most of the run."""


@dataclass(frozen=True, slots=True)
class Window:
    """Arrival times that are measured, in seconds from the start of a run; both ends included."""

    start_s: float
    end_s: float

    @classmethod
    def of(cls, span_s: float, longest_s: float) -> Window:
        """Returns the span of arrivals without warm-up and tail.

        Each is as long as the longest request takes alone, at most a tenth of the span: before it the cluster fills,
        and what arrives after it is served while the load goes.
        """
        margin_s = min(longest_s, span_s / SPAN_FACTOR)
        return cls(margin_s, span_s - margin_s)

    @property
    def length_s(self) -> float:
        """Seconds between the ends."""
        return self.end_s - self.start_s

    def __contains__(self, time_s: float) -> bool:
        """Whether a time lies in it."""
        return self.start_s <= time_s <= self.end_s
