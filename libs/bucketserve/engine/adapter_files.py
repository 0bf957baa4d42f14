"""Whether an adapter is of a model, by the headers of their files alone. No torch."""

from __future__ import annotations

from pathlib import Path

from bucketserve.core.errors import ModelLoadError
from bucketserve.engine.weight_files import weight_file, weight_files

__all__ = ["check_adapter"]

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of a model's layers."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Tensors of other types may be packed, so that their shapes are not those of the layer."""
SIDES = {"lora_A.weight": 1, "lora_B.weight": 0}
"""By the end of a tensor's name: which size of its own, and of the layer's weight, is that of the layer."""


def check_adapter(directory: Path, model: Path) -> None:
    """Refuses a LoRA adapter, as peft writes it, whose layers are of other sizes than the model's.

    Layers of which the model has no plain weight are not looked at.

    Raises:
        ModelLoadError: it is of another model; or a file is missing or damaged.
    """
    layers = {
        tensor.name.removesuffix(".weight"): tensor.shape
        for file in weight_files(model)
        for tensor in file.tensors
        if len(tensor.shape) == 2 and tensor.dtype in FLOATS
    }
    for tensor in weight_file(directory / WEIGHTS).tensors:
        for end, side in SIDES.items():
            layer = tensor.name.removeprefix(PREFIX).removesuffix(f".{end}")
            shape = layers.get(layer)
            if not tensor.name.endswith(f".{end}") or shape is None:
                continue
            if len(tensor.shape) != 2 or tensor.shape[side] != shape[side]:
                sizes = f"{list(tensor.shape)} for a layer of {list(shape)}"
                raise ModelLoadError(f"it is of another model: {layer} has a {end.partition('.')[0]} of {sizes}")
