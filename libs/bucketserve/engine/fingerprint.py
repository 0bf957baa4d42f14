"""Names for what is served: engines with one fingerprint go on with each other's requests. No torch, no transformers.

A fingerprint is 32 hexadecimal digits of a BLAKE2b hash. It is made from files, so that it depends neither on the
device nor on who computes; how weights are divided into files does not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from bucketserve.core.errors import ModelLoadError
from bucketserve.engine.weight_files import StoredTensor, WeightFile, read_json, weight_file, weight_files

__all__ = ["HAND_OVER", "adapter_fingerprint", "model_fingerprint", "settings_fingerprint", "tokenizer_fingerprint"]

HAND_OVER = "pages"
"""How KV goes from worker to worker. A part of fingerprints, so that two who do it differently are never paired."""
WHOLE_BYTES = 256 * 2**20
"""Weights up to this size are hashed byte by byte."""
NUM_BLOCKS = 4
BLOCK_BYTES = 16 * 1024
NOISE = ("transformers_version", "_name_or_path", "name_or_path")
"""Of JSON files: where they come from, not what they say."""


def model_fingerprint(directory: Path, *, engine: str, dtype: str, quantization: str) -> str:
    """Returns the fingerprint of a directory's weights and config.json as an engine computes with them.

    Weights of up to 256 MiB count byte by byte. Of larger ones every tensor counts by its name, type, shape and four
    blocks of 16 KiB from its beginning to its end, which takes a fraction of a second for 10^10 weights. So other
    weights of the same shapes differ, and so does a single layer that was trained further; a change of some rows of an
    embedding alone may go unnoticed in a model larger than that.

    Args:
        directory: with config.json and weights.
        engine: kind of engine, and how it hands KV over, if it does; others round differently.
        dtype: number type that it computes in.
        quantization: how it rounds weights, or none.

    Raises:
        ModelLoadError: something in the directory is missing or damaged.
    """
    config = {name: value for name, value in read_json(directory / "config.json").items() if name not in NOISE}
    parts = {"engine": engine, "dtype": dtype, "quantization": quantization, "config": config}
    digest = hashlib.blake2b(_canonical(parts), digest_size=16)
    files = weight_files(directory)
    is_whole = sum(file.num_bytes for file in files) <= WHOLE_BYTES
    places = sorted(((tensor.name, file, tensor) for file in files for tensor in _tensors(file)), key=lambda at: at[0])
    opened: dict[Path, BinaryIO] = {}
    try:
        for _, file, tensor in places:
            digest.update(_canonical([tensor.name, tensor.dtype, list(tensor.shape), tensor.num_bytes]))
            if file.path not in opened:
                opened[file.path] = file.path.open("rb")
            for block in _blocks(opened[file.path], tensor, is_whole=is_whole):
                digest.update(block)
    except OSError as error:
        raise ModelLoadError(f"its weights can't be read: {error.strerror}") from error
    finally:
        for stream in opened.values():
            stream.close()
    return digest.hexdigest()


def adapter_fingerprint(directory: Path) -> str:
    """Returns the fingerprint of an adapter as peft writes it: all of its weights, and its configuration.

    Raises:
        ModelLoadError: a file is missing or damaged, or it is no LoRA adapter.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (directory / name).is_file():
            raise ModelLoadError(f"it has no {name}")
    config = read_json(directory / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ModelLoadError(f"adapter_config.json: peft_type is {config.get('peft_type')!r}; only LORA is served")
    said = {name: value for name, value in config.items() if name != "base_model_name_or_path"}
    digest = hashlib.blake2b(_canonical({"adapter": said}), digest_size=16)
    file = weight_file(directory / "adapter_model.safetensors")
    try:
        with file.path.open("rb") as stream:
            for tensor in file.tensors:
                digest.update(_canonical([tensor.name, tensor.dtype, list(tensor.shape), tensor.num_bytes]))
                for block in _blocks(stream, tensor, is_whole=True):
                    digest.update(block)
    except OSError as error:
        raise ModelLoadError(f"{file.path.name} can't be read: {error.strerror}") from error
    return digest.hexdigest()


def tokenizer_fingerprint(directory: Path) -> str:
    """Returns the fingerprint of what a directory's token ids mean: vocabulary and added tokens; empty if it says not.

    Chat template, normalisation and how the file is written don't count: they are the gateway's own.

    Raises:
        ModelLoadError: tokenizer.json can't be read.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return ""
    tokenizer = read_json(path)
    added = [[token.get("id"), token.get("content")] for token in tokenizer.get("added_tokens") or ()]
    meaning = {"vocab": (tokenizer.get("model") or {}).get("vocab"), "added": sorted(added, key=str)}
    return hashlib.blake2b(_canonical(meaning), digest_size=16).hexdigest()


def settings_fingerprint(settings: Mapping[str, object]) -> str:
    """Returns the fingerprint of an engine that is made of settings alone."""
    return hashlib.blake2b(_canonical(settings), digest_size=16).hexdigest()


def _tensors(file: WeightFile) -> tuple[StoredTensor, ...]:
    # Of other formats the file is taken as one tensor.
    return file.tensors or (StoredTensor(file.path.name, "", (), 0, file.num_bytes),)


def _blocks(stream: BinaryIO, tensor: StoredTensor, *, is_whole: bool) -> Iterator[bytes]:
    if is_whole or tensor.num_bytes <= NUM_BLOCKS * BLOCK_BYTES:
        stream.seek(tensor.start)
        left = tensor.num_bytes
        while left:
            block = stream.read(min(left, 2**20))
            if not block:
                raise ModelLoadError(f"its weights end within {tensor.name}")
            left -= len(block)
            yield block
        return
    for i in range(NUM_BLOCKS):
        stream.seek(tensor.start + i * (tensor.num_bytes - BLOCK_BYTES) // (NUM_BLOCKS - 1))
        yield stream.read(BLOCK_BYTES)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
