"""Adapters are of the model that they are loaded for, or they are refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bucketserve.core.errors import ModelLoadError
from bucketserve.engine.adapter_files import check_adapter
from tests.adapters import PLACES, write_adapter

SIZES = {"hidden": 64, "intermediate": 96, "query": 64, "value": 32}


def write_model(directory: Path, dtype: torch.dtype = torch.float32, **change: int) -> Path:
    sizes = SIZES | change
    directory.mkdir()
    config = {
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["intermediate"],
        "num_attention_heads": 4,
        "num_key_value_heads": sizes["value"] // (sizes["query"] // 4),
        "head_dim": sizes["query"] // 4,
        "num_hidden_layers": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {
        f"model.layers.{layer}.{place}.weight": torch.zeros(sizes[outer], sizes[inner], dtype=dtype)
        for layer in range(2)
        for place, (inner, outer) in PLACES.items()
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_an_adapter_of_the_model_is_taken(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    check_adapter(write_adapter(tmp_path / "adapter", model, 1, rank=3), model)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [0.5, 2])
def test_an_adapter_of_another_model_is_refused(tmp_path: Path, size: str, factor: float) -> None:
    model = write_model(tmp_path / "model")
    other = write_model(tmp_path / "other", **{size: int(SIZES[size] * factor)})
    adapter = write_adapter(tmp_path / "adapter", other, 1)
    check_adapter(adapter, other)
    with pytest.raises(ModelLoadError, match=r"of another model: model\.layers\.0\.[a-z_.]* has a lora_[AB] of \["):
        check_adapter(adapter, model)


def test_packed_weights_say_nothing_of_a_layer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", torch.uint8)
    other = write_model(tmp_path / "other", hidden=128)
    check_adapter(write_adapter(tmp_path / "adapter", other, 1), model)


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", model, 1)
    (adapter / "adapter_model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ModelLoadError, match=r"truncated|no safetensors"):
        check_adapter(adapter, model)
