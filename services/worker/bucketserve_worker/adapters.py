"""The adapters of a directory: what is put there is loaded, what is taken away is unloaded when nothing uses it.

A directory in it is an adapter as peft writes it, and its name the one that requests use. Names that begin with a dot
are nobody's: whoever copies an adapter there copies it under such a name, and renames it when it is whole.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bucketserve.core.errors import ModelLoadError
from bucketserve.engine.fingerprint import adapter_fingerprint
from bucketserve.engine.model_source import first_line
from bucketserve.ports import Adapter
from bucketserve.v1 import scheduler_pb2
from bucketserve_worker.engine_thread import EngineThread
from bucketserve_worker.telemetry import WorkerTelemetry

__all__ = ["NAME", "AdapterDirectory"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of an adapter. No colon: what is behind the last one in a model's name is the adapter's."""
FILES = ("adapter_config.json", "adapter_model.safetensors")
LOOK_S = 1.0
RETRY_S = 60.0
"""After files could not be read, which is no word on them."""

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class _Tried:
    """What came of an adapter's files as they are."""

    stamp: Stamp
    again_s: float = math.inf
    """When to try them again, on the monotonic clock; at the latest when they change."""
    problems: set[str] = field(default_factory=set)
    """Why they could not be served, as it was told; empty: they are."""


class AdapterDirectory:
    """Owns which adapters the engine has. They go by fingerprint: new files under an old name are another adapter."""

    def __init__(
        self,
        directory: str,
        engine: EngineThread,
        on_change: Callable[[scheduler_pb2.WorkerAdapters], None],
        telemetry: WorkerTelemetry,
    ) -> None:
        """Loads nothing yet; on_change(all that are served) whenever that changes. No directory: there are none."""
        self._directory = Path(directory) if directory else None
        self._engine = engine
        self._on_change = on_change
        self._telemetry = telemetry
        self._seen: dict[str, Stamp] = {}
        """By name, as of the last look: files that have changed since are still being written."""
        self._tried: dict[str, _Tried] = {}
        """By name."""
        self._served: dict[str, str] = {}
        """Fingerprints by name."""
        self._former: dict[str, str] = {}
        """Those of names that mean others since the last look: gateways have yet to hear of that."""
        self._loaded: set[str] = set()
        """Fingerprints of those that the engine has."""

    def served(self) -> scheduler_pb2.WorkerAdapters:
        """Returns the adapters that requests may name; of one name the one that it means is the last."""
        pairs = [*sorted(self._former.items()), *sorted(self._served.items())]
        return scheduler_pb2.WorkerAdapters(
            adapters=[scheduler_pb2.Adapter(name=name, fingerprint=fingerprint) for name, fingerprint in pairs]
        )

    async def run(self) -> None:
        """Keeps to the directory, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look(is_first=False)

    async def look(self, *, is_first: bool = True) -> None:
        """Loads what is new and whole, and unloads what is gone; at first whatever is there is taken to be whole."""
        if self._directory is None:
            return
        try:
            stamps = await asyncio.to_thread(_stamps, self._directory)
        except OSError:
            # Away for a moment, maybe. What is loaded needs it no more.
            return
        # What was loaded last is served until what is new can be.
        served = {name: fingerprint for name, fingerprint in self._served.items() if name in stamps}
        for name, stamp in stamps.items():
            is_whole = is_first or self._seen.get(name) == stamp
            if is_whole and self._is_due(name, stamp) and (fingerprint := await self._load(name, stamp)):
                served[name] = fingerprint
        self._tried = {name: tried for name, tried in self._tried.items() if name in stamps}
        self._seen = stamps
        # What nobody may name since the last look at least: orders may have been on their way.
        needed = {*self._former.values(), *self._served.values(), *served.values()}
        for fingerprint in self._loaded - needed:
            if await self._engine.unload_adapter(fingerprint):
                self._loaded.discard(fingerprint)
                self._telemetry.adapter_unloaded(fingerprint)
                # For others there may be room now.
                for tried in self._tried.values():
                    if tried.problems:
                        tried.again_s = 0.0
        former = {name: older for name, older in self._served.items() if served.get(name, older) != older}
        if (former, served) != (self._former, self._served):
            self._former, self._served = former, served
            self._on_change(self.served())

    def _is_due(self, name: str, stamp: Stamp) -> bool:
        tried = self._tried.get(name)
        return tried is None or tried.stamp != stamp or time.monotonic() >= tried.again_s

    async def _load(self, name: str, stamp: Stamp) -> str:
        """Returns the fingerprint of an adapter that the engine has now; empty if it can't be served."""
        assert self._directory is not None
        directory = self._directory / name
        unread: BaseException | None = None
        try:
            fingerprint = await asyncio.to_thread(adapter_fingerprint, directory)
            problem = await self._engine.load_adapter(Adapter(fingerprint=fingerprint, directory=directory))
            if not problem:
                self._loaded.add(fingerprint)
                if await asyncio.to_thread(adapter_fingerprint, directory) != fingerprint:
                    problem = "it changed while it was loaded"
        except ModelLoadError as error:
            problem, unread = str(error), error.__cause__
        except Exception as error:  # whatever is in its files, the others are served
            problem, unread = first_line(error), error
        if not problem:
            self._tried[name] = _Tried(stamp)
            self._telemetry.adapter_loaded(name, fingerprint)
            return fingerprint
        tried = self._tried.get(name)
        if tried is None or tried.stamp != stamp:
            tried = self._tried[name] = _Tried(stamp)
        tried.again_s = time.monotonic() + RETRY_S if isinstance(unread, OSError) else math.inf
        if problem not in tried.problems:
            tried.problems.add(problem)
            self._telemetry.adapter_refused(name, problem)
        return ""


def _stamps(directory: Path) -> dict[str, Stamp]:
    """Returns the state of the files of each adapter in a directory.

    Raises:
        OSError: it can't be read.
    """
    paths = sorted(path for path in directory.iterdir() if NAME.fullmatch(path.name) and _may_be_one(path))
    return {path.name: tuple(_stamp(path / name) for name in FILES) for path in paths}


def _may_be_one(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        # Whatever it is, the others go on; what is wrong with it is said when it is to be loaded.
        return True


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino
