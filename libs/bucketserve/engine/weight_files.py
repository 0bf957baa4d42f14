"""The files that hold a model's weights: which they are, what their headers say, whether they are whole. No torch.

Of a safetensors file only the header is read (8 bytes of length, then JSON: name -> dtype, shape, data_offsets), so
that models of any size are looked at in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bucketserve.core.errors import ModelLoadError

__all__ = ["StoredTensor", "WeightFile", "read_json", "weight_file", "weight_files"]

SINGLE = ("model.safetensors", "pytorch_model.bin")
MOST_HEADER_BYTES = 100_000_000
"""As the safetensors library allows."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Where its bytes begin in the file."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of weights."""

    path: Path
    num_bytes: int
    tensors: tuple[StoredTensor, ...]
    """Empty for files of another format than safetensors."""


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ModelLoadError: it can't be read, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"{path.name} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path.name} must hold a JSON object, not {type(value).__name__}")
    return value


def weight_files(directory: Path) -> list[WeightFile]:
    """Returns the files that hold a directory's weights, in order of name.

    Raises:
        ModelLoadError: there are none, or one is missing or damaged.
    """
    for single in SINGLE:
        index = directory / f"{single}.index.json"
        if index.is_file():
            return _indexed(directory, index)
        if (directory / single).is_file():
            return [weight_file(directory / single)]
    raise ModelLoadError(f"it has no weights: neither {SINGLE[0]} nor {SINGLE[0]}.index.json{_instead(directory)}")


def _instead(directory: Path) -> str:
    others = sorted(
        path.name for path in directory.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf", ".pth")
    )
    return f"; it has {', '.join(others[:3])}" if others else ""


def _indexed(directory: Path, index: Path) -> list[WeightFile]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ModelLoadError(f"{index.name} has no weight_map of tensors to files")
    names = sorted(set(places.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelLoadError(
            f"{index.name} names {missing[0]}, which is not there ({len(missing)} of {len(names)} files)"
        )
    files = [weight_file(directory / name) for name in names]
    held = {tensor.name: file.path.name for file in files for tensor in file.tensors}
    for tensor, name in places.items():
        if name.endswith(".safetensors") and held.get(tensor) != name:
            raise ModelLoadError(f"{index.name} says that {name} holds {tensor}, and it does not")
    return files


def weight_file(path: Path) -> WeightFile:
    """Returns what a file of weights holds.

    Raises:
        ModelLoadError: it is missing or damaged.
    """
    try:
        size = path.stat().st_size
        if not size:
            raise ModelLoadError(f"{path.name} is empty")
        if path.suffix != ".safetensors":
            with path.open("rb"):
                return WeightFile(path, size, ())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if 2 <= length <= MOST_HEADER_BYTES else b""
    except OSError as error:
        raise ModelLoadError(f"{path.name} can't be read: {error.strerror}") from error
    if size < 8 + length <= 8 + MOST_HEADER_BYTES:
        raise ModelLoadError(f"{path.name} is truncated: it ends within its header")
    try:
        tensors = tuple(_tensors(json.loads(header), 8 + length))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelLoadError(f"{path.name} is no safetensors file: its header makes no sense") from error
    end = max((tensor.start + tensor.num_bytes for tensor in tensors), default=8 + length)
    if end > size:
        raise ModelLoadError(f"{path.name} is truncated: it has {size:,} of {end:,} bytes")
    return WeightFile(path, size, tensors)


def _tensors(header: Mapping[str, Any], start: int) -> list[StoredTensor]:
    tensors = []
    for name in sorted(header):
        if name == "__metadata__":
            continue
        entry = header[name]
        first, end = entry["data_offsets"]
        # JSON has numbers like 4.0, which are no places in a file.
        if not (isinstance(first, int) and isinstance(end, int) and 0 <= first <= end):
            raise ValueError(name)
        tensors.append(StoredTensor(name, str(entry["dtype"]), tuple(entry["shape"]), start + first, end - first))
    return tensors
