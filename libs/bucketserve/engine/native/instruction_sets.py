"""The instruction sets that the kernels are compiled for, and which of them this processor has."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["ALL", "InstructionSet", "supported"]

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """Instructions that a library may use."""

    name: str
    features: tuple[str, ...]
    """As the kernel's /proc/cpuinfo names them."""

    @property
    def options(self) -> list[str]:
        """The compiler's, which name them without underscores."""
        return [f"-m{feature.replace('_', '')}" for feature in self.features]


_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", *_AVX2)

ALL = {
    one.name: one
    for one in (
        InstructionSet("avx512bf16", ("avx512_bf16", "avx512_vnni", *_AVX512)),
        InstructionSet("avx512vnni", ("avx512_vnni", *_AVX512)),
        InstructionSet("avx512", _AVX512),
        InstructionSet("avx2", _AVX2),
        InstructionSet("baseline", ()),
    )
}
"""By name, the fastest first. baseline is what every processor of the architecture has."""


@cache
def supported() -> tuple[str, ...]:
    """Returns the names of those that this processor and its operating system have, the fastest first."""
    features: set[str] = set()
    if platform.machine() in ("x86_64", "AMD64"):
        try:
            cpuinfo = CPUINFO.read_text()
        except OSError:
            cpuinfo = ""
        cores = [set(line.split()) for line in re.findall(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)]
        features = set.intersection(*cores) if cores else set()
    return tuple(one.name for one in ALL.values() if features.issuperset(one.features))
