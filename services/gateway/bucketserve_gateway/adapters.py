"""The adapters that requests may name, as the scheduler says."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from bucketserve.v1 import scheduler_pb2

__all__ = ["AdapterBook", "split_adapter"]

ABSENT_S = 10.0
"""An adapter of which no worker is here is known for so long: its worker may be on its way to a new scheduler."""


def split_adapter(name: str) -> tuple[str, str]:
    """Returns the model and the adapter that "model:adapter" names; of another name twice nothing.

    Models may have colons in their names; adapters have none.
    """
    base, _, adapter = name.rpartition(":")
    return (base, adapter) if base and adapter else ("", "")


class _Known(NamedTuple):
    fingerprint: str
    until_s: float


class AdapterBook:
    """Fingerprints of adapters, by model and name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Knows of none. clock: seconds."""
        self._clock = clock
        self._known: dict[tuple[str, str], _Known] = {}

    def announced(self, model: str, served: scheduler_pb2.ServedAdapters) -> None:
        """Takes a scheduler's word for which adapters a model has; of two of one name the last one counts."""
        until_s = self._clock() + ABSENT_S
        self._known = {
            key: known if key[0] != model else _Known(known.fingerprint, min(known.until_s, until_s))
            for key, known in self._current()
        }
        for adapter in served.adapters:
            self._known[model, adapter.name] = _Known(adapter.fingerprint, float("inf"))

    def fingerprint(self, model: str, name: str) -> str:
        """Returns the fingerprint of an adapter; empty: there is none of that name."""
        known = self._known.get((model, name))
        return known.fingerprint if known is not None and known.until_s > self._clock() else ""

    def names(self, model: str) -> list[str]:
        """Returns the names of a model's adapters, in order."""
        return sorted(name for (of_model, name), _ in self._current() if of_model == model)

    def _current(self) -> list[tuple[tuple[str, str], _Known]]:
        now_s = self._clock()
        return [(key, known) for key, known in self._known.items() if known.until_s > now_s]
