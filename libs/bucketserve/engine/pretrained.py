"""Loads a causal LM of transformers, and says in one sentence why it can't."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bucketserve.core.errors import ModelLoadError
from bucketserve.engine.attention import NAME
from bucketserve.engine.model_source import accepted, load_config
from bucketserve.engine.weight_files import weight_files

__all__ = ["FLOATS", "load_model", "refusing_other_attention"]

FLOATS = ("F32", "BF16", "F16", "F64")
"""Types of numbers, as safetensors calls them, in which weights are stored that nobody has quantised."""


def load_model(
    directory: Path, dtype: torch.dtype | str, on_progress: Callable[[str], None] = lambda text: None
) -> torch.nn.Module:
    """Returns the model of a directory, in evaluation mode on the CPU, with our attention.

    Args:
        directory: as model_directory returns it.
        dtype: number type of its weights; "auto" for that in its config.json.
        on_progress: is told what is ignored.

    Raises:
        ModelLoadError: it can't be loaded whole; says why.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = load_config(directory)
    _check_class(config, AutoModelForCausalLM._model_mapping)
    _check_quantization(config)

    def load() -> Any:
        with refusing_other_attention():
            return AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                attn_implementation=NAME,
                local_files_only=True,
                # Found and said below: transformers would print a table.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )

    model, info = accepted("its weights", load)
    _check_tensors(info, sum(1 for _ in model.state_dict()))
    if getattr(config, "quantization_config", None) is None:
        _check_types(directory, model)
    if info["unexpected_keys"]:
        on_progress(f"ignoring {_some(info['unexpected_keys'])}, which the architecture does not have")
    loaded: torch.nn.Module = model.eval()
    return loaded


@contextmanager
def refusing_other_attention() -> Iterator[None]:
    """Around the making of a model with our attention.

    Raises:
        ModelLoadError: the model chooses among attentions of its own, and ours is none of them.
    """
    try:
        yield
    except KeyError as error:
        if error.args != (NAME,):
            raise
        raise ModelLoadError("its layers do not call attention through transformers' AttentionInterface") from error


def _check_class(config: Any, known: Mapping[type, type]) -> None:
    if type(config) not in known:
        raise ModelLoadError(f"its model_type {config.model_type!r} is no causal LM to transformers")


def _check_quantization(config: Any) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    given = getattr(config, "quantization_config", None)
    if given is None:
        return
    method = given.get("quant_method") if isinstance(given, Mapping) else getattr(given, "quant_method", None)
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ModelLoadError(
            f"its weights are quantised by {method!r} (quant_method), which transformers does not know"
        )


def _check_tensors(info: Mapping[str, Any], number: int) -> None:
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, stored, wanted = mismatched[0][:3]
        more = f" ({len(mismatched)} such tensors)" if len(mismatched) > 1 else ""
        raise ModelLoadError(f"its weights do not fit config.json: {name} is {list(stored)}, not {list(wanted)}{more}")
    if info["missing_keys"]:
        raise ModelLoadError(
            f"its weights lack {len(info['missing_keys'])} of {number} tensors: {_some(info['missing_keys'])}"
        )


def _check_types(directory: Path, model: torch.nn.Module) -> None:
    stored = {tensor.name: tensor.dtype for file in weight_files(directory) for tensor in file.tensors}
    for name, parameter in model.named_parameters():
        dtype = stored.get(name, FLOATS[0])
        # Of whoever quantised them, scales are missing: what they would be read as is something else.
        if parameter.is_floating_point() and dtype not in FLOATS:
            raise ModelLoadError(f"{name} is stored as {dtype}, and config.json has no quantization_config")


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:2]) + (f" and {len(ordered) - 2} more" if len(ordered) > 2 else "")
