"""The engines that the contract is checked on. A new one is added to ENGINES, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.ports import Engine
from tests.integration.engine import models

CONTEXT, BUDGET, STEP_TOKENS = 256, 608, 64
"""Whole pages, as every kv_tokens that a test asks for has to be."""


def fake(*, max_sequences: int = 16, kv_tokens: int = BUDGET) -> Engine:
    return FakeEngine(
        FakeSettings(
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


ENGINES = {
    "fake": pytest.param(fake),
    "torch": pytest.param(packed("torch"), marks=pytest.mark.engine),
    "auto": pytest.param(packed("auto"), marks=pytest.mark.engine),
}


@pytest.fixture(params=ENGINES.values(), ids=ENGINES.keys())
def build(request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    """Returns a builder of an engine: 256 tokens of context, 64 per step; kv_tokens and max_sequences to choose."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(before)
