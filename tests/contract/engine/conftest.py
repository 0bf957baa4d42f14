"""The engines that the contract is checked on. A new one is added to ENGINES, and nothing else."""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.ports import Engine
from tests.integration.engine import connectors, models

CONTEXT, BUDGET, STEP_TOKENS = 256, 608, 64
"""Whole pages, as every kv_tokens that a test asks for has to be."""


def fake(*, max_sequences: int = 16, kv_tokens: int = BUDGET, **more) -> Engine:
    return FakeEngine(
        FakeSettings(
            **more,
            kv_total_tokens=kv_tokens,
            context_tokens=CONTEXT,
            max_step_tokens=STEP_TOKENS,
            max_sequences=max_sequences,
            vocab_size=models.VOCAB,
        )
    )


def packed(kernels: str) -> Callable[..., Engine]:
    def build(*, max_sequences: int = 16, kv_tokens: int = BUDGET) -> Engine:
        return models.engine(
            "llama",
            kernels=kernels,
            context_tokens=CONTEXT,
            kv_budget_tokens=kv_tokens,
            max_step_tokens=STEP_TOKENS,
            max_sequences=max_sequences,
        )

    return build


@cache
def vllm_model() -> str:
    """Returns the folder of a model for vLLM, whose kernels want heads of 32."""
    folder = Path(tempfile.mkdtemp(prefix="bucketserve-tests-"))
    atexit.register(shutil.rmtree, folder)
    models.reference("llama-32").save_pretrained(folder)
    return str(folder)


def vllm(*, max_sequences: int = 16, kv_tokens: int = BUDGET) -> Engine:
    return connectors.load(
        model=vllm_model(),
        context_tokens=CONTEXT,
        kv_budget_tokens=kv_tokens,
        max_step_tokens=STEP_TOKENS,
        max_sequences=max_sequences,
    )


@cache
def kv_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="bucketserve-tests-"))
    atexit.register(shutil.rmtree, folder)
    return folder


def vllm_with_connector(*, max_sequences: int = 16, kv_tokens: int = BUDGET) -> Engine:
    return connectors.load(
        connectors.folder(kv_folder()),
        model=vllm_model(),
        context_tokens=CONTEXT,
        kv_budget_tokens=kv_tokens,
        max_step_tokens=STEP_TOKENS,
        max_sequences=max_sequences,
    )


HANDING_OVER = {
    "fake": pytest.param(fake),
    "several": pytest.param(partial(fake, tokens_per_step=3)),
    "torch": pytest.param(packed("torch"), marks=pytest.mark.engine),
    "auto": pytest.param(packed("auto"), marks=pytest.mark.engine),
}
"""Those that give KV to each other."""
ALONE = {"vllm": pytest.param(vllm, marks=pytest.mark.vllm)} if importlib.util.find_spec("vllm") else {}
"""Those that don't. vLLM is tested where it is installed: `make test-vllm`."""
ENGINES = HANDING_OVER | ALONE
BY_HANDLE = {
    "fake": pytest.param(partial(fake, has_handles=True)),
    "several": pytest.param(partial(fake, has_handles=True, tokens_per_step=3)),
}
if ALONE:
    BY_HANDLE["vllm"] = pytest.param(vllm_with_connector, marks=pytest.mark.vllm)


def built(request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def build(**sizes: int) -> Engine:
        engines.append(request.param(**sizes))
        return engines[-1]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield build
    for engine in engines:
        engine.close()
    torch.set_num_threads(before)


build = pytest.fixture(built, name="build", params=ENGINES.values(), ids=ENGINES.keys())
"""A builder of an engine: 256 tokens of context, 64 per step; kv_tokens and max_sequences to choose."""
build_handing_over = pytest.fixture(built, name="handing_over", params=HANDING_OVER.values(), ids=HANDING_OVER.keys())
build_by_handle = pytest.fixture(built, name="by_handle", params=BY_HANDLE.values(), ids=BY_HANDLE.keys())
"""Of those that fetch KV from each other."""
