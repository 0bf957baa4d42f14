"""What the documents say is proven has a test of that name."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_row_of_what_happens_when_something_dies_is_proven() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## What happens when something dies")[2]
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| dies")]
    assert len(rows) >= 8
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^(?:async )?def (test_\w+)", sources, re.MULTILINE))
    for row in rows:
        named = re.findall(r"`(test_\w+?)(_?\.\.\.)?`", row)
        assert named, row
        for name, is_prefix in named:
            assert name in defined or (is_prefix and any(each.startswith(name) for each in defined)), name
