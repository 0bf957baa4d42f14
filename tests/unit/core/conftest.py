"""What several tests of the core want."""

from __future__ import annotations

import pytest


@pytest.fixture
def all_that_may_be_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of which nothing is known count in full, so that a test's numbers can be added up."""
    monkeypatch.setattr("bucketserve.core.outputs.UNKNOWN_SHARE", 1.0)
