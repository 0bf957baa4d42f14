"""The table of families in docs/models.md is true, tried on families of every kind; `make families` tries them all."""

from __future__ import annotations

import pytest

from scripts.model_families import DOC, VERDICTS, listed, try_family
from tests.integration.engine.test_equality import one_thread  # noqa: F401

pytestmark = pytest.mark.engine

SAMPLE = {
    "right": [
        *("mixtral", "qwen2_moe", "phimoe", "deepseek_v3", "minicpm3", "gpt_oss", "llama4_text", "ministral3"),
        # With layers of what looks at images; with weights that the model reads itself.
        *("gemma3", "gemma4", "longcat_flash"),
    ],
    "refused": ["bart", "bert", "bloom", "deepseek_v4", "diffllama", "falcon_h1", "gptj", "qwen3_next"],
}


@pytest.mark.parametrize(("verdict", "name"), [(verdict, name) for verdict in SAMPLE for name in SAMPLE[verdict]])
def test_a_family_comes_out_as_the_table_says(verdict: str, name: str) -> None:
    outcome = try_family(name)
    assert outcome.verdict == verdict, outcome
    assert listed(DOC.read_text())[name] == outcome


def test_no_family_is_served_and_wrong() -> None:
    families = listed(DOC.read_text())
    assert len(families) > 150
    assert {outcome.verdict for outcome in families.values()} <= set(VERDICTS)
    assert sum(outcome.verdict == "right" for outcome in families.values()) > 80
