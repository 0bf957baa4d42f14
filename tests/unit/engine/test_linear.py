"""Packed linear layers compute what they replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bucketserve.engine.linear import PackedLinear, pack_linears


class Tied(nn.Module):
    """A model with an embedding, a bias, and a head that shares the embedding's weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32, dtype=dtype)
        self.inner = nn.Sequential(
            nn.Linear(32, 96, dtype=dtype), nn.SiLU(), nn.Linear(96, 32, bias=False, dtype=dtype)
        )
        self.head = nn.Linear(32, 50, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embed(ids)))


@pytest.mark.parametrize("rows", [1, 7, 300])
@torch.inference_mode()
def test_a_packed_model_computes_the_same(rows: int) -> None:
    torch.manual_seed(0)
    model = Tied(torch.bfloat16)
    ids = torch.randint(0, 50, (1, rows))
    before = model(ids)
    assert pack_linears(model) == 2
    assert isinstance(model.inner[0], PackedLinear)
    # A tied head stays what it was, or its weights would be there twice.
    assert type(model.head) is nn.Linear
    after = model(ids)
    assert after.shape == before.shape
    torch.testing.assert_close(after.float(), before.float(), rtol=0.05, atol=0.02)
    assert (model.inner[2].weight.shape, model.inner[2].weight.dtype) == ((32, 96), torch.bfloat16)


def test_float32_is_left_alone() -> None:
    model = Tied(torch.float32)
    assert pack_linears(model) == 0
    assert type(model.inner[0]) is nn.Linear
