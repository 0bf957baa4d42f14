"""The protos as they are break nobody who speaks those of the baseline, and the check would notice if they did."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASELINE = Path("protos/baseline.binpb")
API = Path("protos/bucketserve/v1/inference.proto")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the protos without history, as in an archive or a shallow clone."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path


def breaking(folder: Path) -> tuple[int, str]:
    buf = Path(sys.executable).with_name("buf")
    done = subprocess.run(
        [buf, "breaking", "--against", BASELINE], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_nobody_is_broken_by_the_protos_as_they_are(copy: Path) -> None:
    assert breaking(copy) == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("string prompt = 3;", "bytes prompt = 3;", "prompt"),
        ("string prompt = 3;", "string prompt = 99;", "prompt"),
        ("rpc Tokenize(", "rpc Split(", "Tokenize"),
        ("TokenIds", "PromptIds", "TokenIds"),
    ],
    ids=["type", "number", "method", "message"],
)
def test_a_change_that_breaks_clients_is_found(copy: Path, old: str, new: str, said: str) -> None:
    text = (copy / API).read_text()
    assert old in text
    (copy / API).write_text(text.replace(old, new))
    status, output = breaking(copy)
    assert (status, said in output) == (100, True), output
