"""Which engine settings name, and what is said of settings that it can't follow."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from bucketserve.config import load_settings
from bucketserve.core.errors import ModelLoadError, SettingsError
from bucketserve_worker.engines import engine_loader
from bucketserve_worker.settings import WorkerSettings

DEMO = str(Path(__file__).resolve().parents[3] / "models" / "demo" / "model")


def settings(**values: str) -> WorkerSettings:
    environ = {f"BUCKETSERVE_WORKER_{name.upper()}": value for name, value in values.items()}
    section = load_settings({"worker": WorkerSettings}, environ=environ).sections["worker"]
    assert isinstance(section, WorkerSettings)
    return section


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"engine": "vllm"}, ["[worker] model: name a directory"]),
        ({"engine": "transformers"}, ["[worker] model: name a directory"]),
        (
            {"engine": "vllm", "model": DEMO, "role": "prefill"},
            ["role: vLLM hands KV over by a connector only"],
        ),
        ({"engine": "vllm", "model": DEMO, "quantization": "int8"}, ["quantization: int8 is of the transformers"]),
        ({"engine": "vllm", "model": DEMO, "kernels": "avx2"}, ["kernels: they are of the transformers engine"]),
        ({"engine": "vllm", "role": "decode", "kernels": "torch"}, ["model:", "role:", "kernels:"]),
        ({"engine": "transformers", "model": DEMO, "adapters_dir": DEMO}, ["transformers engine serves no adapters"]),
        (
            {"engine": "fake", "adapters_dir": f"{DEMO}/nowhere"},
            [
                "adapters_dir: ",
            ],
        ),
        ({"engine": "fake", "engine_args": "block_size=16"}, ["engine_args: they are vLLM's; the engine is fake"]),
    ],
)
def test_what_an_engine_can_not_do_is_said_before_anything_is_loaded(values: dict[str, str], said: list[str]) -> None:
    with pytest.raises(SettingsError) as refused:
        engine_loader(settings(**values), print)
    assert len(refused.value.problems) == len(said)
    assert all(part in problem for part, problem in zip(said, refused.value.problems, strict=True))


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", {}),
        ("block_size=32,enforce_eager=true", {"block_size": "32", "enforce_eager": "true"}),
        ('hf_overrides={"a": 1, "b": 2}', {"hf_overrides": '{"a": 1, "b": 2}'}),
        (json.dumps({"a": "x,y=z"}), {"a": "x,y=z"}),
    ],
)
def test_engine_args_are_written_as_pairs_or_as_json(text: str, arguments: dict[str, str]) -> None:
    assert settings(engine_args=text).engine_args == arguments


@pytest.mark.parametrize("text", ["block_size", "=1", "a=1,a=2", "{", "[1]", '{"a": 1}', '{"a": null}'])
def test_other_engine_args_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="ENGINE_ARGS"):
        settings(engine_args=text)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_where_vllm_is_not_installed_the_extra_is_named() -> None:
    with pytest.raises(ModelLoadError, match=r"needs vLLM 0\.32 .*; install bucketserve\[vllm\]"):
        engine_loader(settings(engine="vllm", model=DEMO), lambda text: None)()
