"""Wall clocks of single processes that can be stepped while they run: clock.cc, preloaded."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from bucketserve.engine.native.compiler import find_compiler

__all__ = ["Clocks"]

EDGE_S = 1.0
"""Within which a clock was stepped, as seen from here."""
SOURCE = Path(__file__).with_name("clock.cc")


class Clocks:
    """A clock for each of some processes, and when each was stepped."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        """Compiles what is preloaded, and sets all clocks right.

        Raises:
            KernelBuildError: there is no compiler.
        """
        self._folder = folder
        self._library = folder / "clock.so"
        command = [*find_compiler(), "-shared", "-fPIC", "-O2", "-o", str(self._library), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True)
        self._steps: dict[str, list[tuple[float, float]]] = {}
        """By process: true time from which on its clock was off by how much, seconds."""
        for name in names:
            self._file(name).write_bytes(bytes(8))
            self._steps[name] = [(0.0, 0.0)]

    def environ(self, name: str) -> dict[str, str]:
        """Returns the variables that make a process read its clock."""
        return {"LD_PRELOAD": str(self._library), "CHAOS_CLOCK": str(self._file(name))}

    def step(self, name: str, offset_s: float) -> None:
        """Puts a process's clock so far ahead of the true time, behind if negative."""
        self._steps[name].append((time.time(), offset_s))
        with self._file(name).open("r+b") as file:
            file.write(round(offset_s * 1e9).to_bytes(8, "little", signed=True))

    def reader(self, name: str) -> Callable[[float], float]:
        """Returns a function from what a process's clock showed to the true time, to be called in the order of things.

        A clock that is put back shows the same twice. A process is silent for less than it is put back by.
        """
        steps = self._steps.get(name, [(0.0, 0.0)])
        ends = [began_s for began_s, _ in steps[1:]] + [float("inf")]
        at, last_s = 0, float("-inf")

        def true_time(shown_s: float) -> float:
            nonlocal at, last_s
            for index in range(at, len(steps)):
                true_s = shown_s - steps[index][1]
                if max(steps[index][0], last_s) - EDGE_S <= true_s <= ends[index] + EDGE_S:
                    at, last_s = index, true_s
                    break
            return shown_s - steps[at][1]

        return true_time

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.clock"
