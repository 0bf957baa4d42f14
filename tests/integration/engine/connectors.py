"""vLLM's engine for tests, with a KV connector or without."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from bucketserve.ports import Engine, StepOutput

BLOCK = 32


def folder(path: Path, **extra: float) -> dict[str, object]:
    """Our own, which goes by kv_transfer_params as NIXL's does."""
    return {
        "kv_connector": "FolderConnector",
        "kv_connector_module_path": "tests.integration.engine.folder_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"folder": str(path), **extra},
    }


def example(path: Path) -> dict[str, object]:
    """vLLM's own for debugging, which finds KV by the prompt."""
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(path)},
    }


def load(connector: Mapping[str, object] | None = None, **settings) -> Engine:
    """Returns an engine; each has a connector of its own, of which vLLM has one for all engines in a process."""
    from vllm.distributed.kv_transfer import kv_transfer_state

    from bucketserve.engine.vllm_loader import VllmSettings, load_vllm

    arguments = {"block_size": str(BLOCK), "enforce_eager": "true"}
    if connector is None:
        return load_vllm(VllmSettings(dtype="float32", engine_args=arguments, **settings))
    arguments["kv_transfer_config"] = json.dumps(connector)
    engine = load_vllm(VllmSettings(dtype="float32", engine_args=arguments, **settings))
    agent, kv_transfer_state._KV_CONNECTOR_AGENT = kv_transfer_state._KV_CONNECTOR_AGENT, None
    step = engine.step

    def step_with_own_connector() -> StepOutput:
        kv_transfer_state._KV_CONNECTOR_AGENT = agent
        try:
            return step()
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = None

    engine.step = step_with_own_connector  # type: ignore[method-assign]
    return engine
