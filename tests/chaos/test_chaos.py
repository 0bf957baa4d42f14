"""45 seconds of chaos: the short version of `make chaos`."""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from tests.chaos.run import NUM_CLIENTS, chaos

pytestmark = [pytest.mark.e2e, pytest.mark.alone]


@pytest.mark.timeout(600)
async def test_the_books_balance_after_45_seconds_of_faults(tmp_path: Path) -> None:
    text = io.StringIO()
    options = argparse.Namespace(
        duration=float(os.environ.get("CHAOS_SECONDS", "45")),
        seed=int(os.environ.get("CHAOS_SEED", "1")),
        clients=NUM_CLIENTS,
        faults="all",
        engine="fake",
        vllm=0,
        json=None,
    )
    is_good = await chaos(options, Console(file=text, width=110), tmp_path)
    assert is_good, text.getvalue()
