"""Where a model comes from, and whether what is there can be a model at all. No torch: gateways ask too.

A source is a directory, or hf://organisation/name for a model of the Hugging Face hub. A name without hf:// is never
looked up on the hub: a mistyped directory would wait for the network and end in a riddle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bucketserve.core.errors import ModelLoadError
from bucketserve.engine.weight_files import read_json, weight_files

__all__ = ["accepted", "context_of", "load_config", "model_directory", "stop_ids", "vocabulary_of"]

T = TypeVar("T")

CAUSAL = ("ForCausalLM", "LMHeadModel", "LMHead", "ForConditionalGeneration", "DecoderModel")
"""How the classes of transformers that generate text are called."""
HUB = "hf://"
HUB_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)


def model_directory(source: str, *, with_weights: bool) -> Path:
    """Returns the directory of a source, once everything in it has been looked at that can be without loading it.

    Downloads a source hf://organisation/name if the hub's cache does not have it.

    Args:
        source: a directory or hf://organisation/name.
        with_weights: whether weights are wanted, or configuration and tokenizer alone.

    Raises:
        ModelLoadError: it is not there, or something in it is missing, damaged or of no use.
    """
    directory = _from_hub(source, with_weights) if source.startswith(HUB) else _local(source)
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise ModelLoadError(f"it can't be read: {error.strerror}") from error
    if "config.json" not in names:
        raise ModelLoadError(_without_config(names))
    documents = {name: read_json(directory / name) for name in JSON_FILES if name in names}
    _check_config(documents["config.json"])
    stop_ids(documents)
    if with_weights:
        weight_files(directory)
    return directory


def _local(source: str) -> Path:
    path = Path(source).expanduser()
    try:
        path.stat()
    except FileNotFoundError as error:
        hint = f"; for a model of the Hugging Face hub write {HUB}{source}" if _may_be_hub_id(source) else ""
        raise ModelLoadError(f"there is no such directory{hint}") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"it can't be read: {getattr(error, 'strerror', error)}") from error
    if not path.is_dir():
        raise ModelLoadError("it is a file; give the directory with config.json, tokenizer and safetensors")
    return path


def _may_be_hub_id(source: str) -> bool:
    organisation, _, name = source.partition("/")
    return bool(organisation and name) and "/" not in name and not source.startswith((".", "~"))


def _from_hub(source: str, with_weights: bool) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import snapshot_download

    patterns = [*HUB_FILES, *(["*.safetensors"] if with_weights else [])]
    try:
        return Path(snapshot_download(source.removeprefix(HUB), allow_patterns=patterns))
    except Exception as error:  # whatever the hub, the network or the disk may do
        raise ModelLoadError(f"the hub does not give it: {first_line(error)}") from error


def _without_config(names: Iterable[str]) -> str:
    names = list(names)
    if any(name.endswith(".gguf") for name in names):
        return "it holds GGUF files, which are not supported; give the original model with config.json and safetensors"
    if "adapter_config.json" in names:
        return "it holds an adapter (LoRA) without its model; give a whole model"
    found = f"; it has {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" if names else "; it is empty"
    return f"it has no config.json{found}"


def _check_config(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelLoadError("config.json names no model_type, so that its architecture is unknown")
    from transformers import CONFIG_MAPPING
    from transformers import __version__ as version

    if model_type not in CONFIG_MAPPING:
        own = " (it brings code of its own, which is not run)" if "auto_map" in config else ""
        raise ModelLoadError(f"its model_type {model_type!r} is unknown to transformers {version}{own}")
    named = config.get("architectures") or []
    named = [str(name) for name in named] if isinstance(named, list) else [str(named)]
    if named and not any(name.endswith(CAUSAL) for name in named):
        raise ModelLoadError(f"config.json names the architecture {named[0]}, which is no causal LM")


def load_config(directory: Path) -> Any:
    """Returns a directory's configuration (transformers).

    Raises:
        ModelLoadError: transformers rejects it, or its generation_config.json.
    """
    from transformers import AutoConfig, GenerationConfig

    config = accepted("config.json", lambda: AutoConfig.from_pretrained(directory, local_files_only=True))
    if (directory / "generation_config.json").exists():
        accepted("generation_config.json", lambda: GenerationConfig.from_pretrained(directory, local_files_only=True))
    return config


def accepted(what: str, load: Callable[[], T]) -> T:
    """Returns what `load` returns.

    Raises:
        ModelLoadError: it raised; names what was being loaded.
    """
    try:
        return load()
    except ModelLoadError:
        raise
    except Exception as error:  # whatever transformers makes of files that somebody else wrote
        raise ModelLoadError(f"transformers rejects {what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Returns what an error of somebody else's says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    is_sentence = isinstance(error, OSError | ValueError | ImportError) and text
    return text if is_sentence else f"{type(error).__name__}: {text}"


def stop_ids(documents: Mapping[str, Mapping[str, Any]]) -> frozenset[int]:
    """Returns the ids that generation_config.json names as eos_token_id; if it names none, those of config.json.

    Args:
        documents: a model's JSON files by name.

    Raises:
        ModelLoadError: one is not an id.
    """
    config = documents.get("config.json", {})
    text = config.get("text_config")
    parts = {
        "generation_config.json": documents.get("generation_config.json", {}),
        "config.json": config if config.get("eos_token_id") is not None or not isinstance(text, Mapping) else text,
    }
    found = []
    for name, part in parts.items():
        stated = part.get("eos_token_id")
        ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in ids):
            raise ModelLoadError(f"eos_token_id in {name} must be a token id or a list of them, not {stated!r}")
        # Some models write -1 for none.
        found.append(frozenset(value for value in ids if value >= 0))
    return found[0] or found[1]


def vocabulary_of(config: Any) -> int:
    """Returns the number of token ids of a text configuration (transformers).

    Raises:
        ModelLoadError: it names none.
    """
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int) or size < 1:
        raise ModelLoadError("config.json names no vocab_size")
    return size


def context_of(config: Any, wanted: int = 0) -> int:
    """Returns the tokens of context that a model is served with.

    A rotary embedding that changes with the length (dynamic, longrope) would follow the longest sequence of a step: the
    context ends where it begins to change.

    Args:
        config: its text configuration (transformers).
        wanted: 0 for as many as it can.

    Raises:
        ModelLoadError: it declares none, or its rotary embedding allows fewer than wanted.
    """
    declared = next((int(value) for name in CONTEXT_NAMES if (value := getattr(config, name, None)) and value > 0), 0)
    context = wanted or declared
    if not context:
        raise ModelLoadError(f"config.json names no context length ({', '.join(CONTEXT_NAMES)}); set context_tokens")
    for kind, most in _changing_ropes(config, declared):
        if wanted > most:
            raise ModelLoadError(
                f"beyond {most} tokens its rotary embedding ({kind}) would follow the longest sequence of a step; "
                f"set context_tokens to at most {most}"
            )
        context = min(context, most)
    return context


def _changing_ropes(config: Any, declared: int) -> Iterable[tuple[str, int]]:
    """Yields the kinds of rotary embedding that change with the length, with the tokens up to which they do not."""
    given = getattr(config, "rope_parameters", None) or {}
    for rope in (given, *given.values()):
        kind = rope.get("rope_type") if isinstance(rope, Mapping) else None
        if kind == "longrope":
            yield kind, int(rope.get("original_max_position_embeddings") or declared)
        elif isinstance(kind, str) and "dynamic" in kind:
            yield kind, declared
