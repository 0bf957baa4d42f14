"""The ways in which a CPU can compute, for parametrised tests; what this processor lacks is skipped and named."""

from __future__ import annotations

import os

import pytest

from bucketserve.engine.native.instruction_sets import ALL, supported

INSTRUCTION_SETS = [
    pytest.param(name, marks=() if name in supported() else pytest.mark.skip(reason=f"this processor has no {name}"))
    for name in ALL
]
PATHS = [*(one for one in INSTRUCTION_SETS if one.values != ("avx512vnni",)), pytest.param("torch")]
"""Values of LoadSettings.kernels; what avx512vnni has, avx512bf16 has as well."""
if os.environ.get("ENGINE_DEVICE", "cpu") != "cpu":
    PATHS = [pytest.param("auto"), pytest.param("torch")]
