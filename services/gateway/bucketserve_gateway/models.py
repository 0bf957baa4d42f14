"""The models that this gateway serves: their limits and tokenizers. No weights, and no torch."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bucketserve.core.errors import ModelLoadError, UnknownModelError
from bucketserve.v1 import inference_pb2
from bucketserve_gateway.detokenizer import TokenBytes
from bucketserve_gateway.text_bound import bytes_per_token

__all__ = ["ModelCard", "ModelCatalog", "ServedModel", "load_models"]

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What clients may know of a model."""

    name: str
    context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    default_max_tokens: int

    def to_pb(self) -> inference_pb2.Model:
        """Returns it as a message."""
        return inference_pb2.Model(
            name=self.name,
            context_tokens=self.context_tokens,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            has_chat_template=self.has_chat_template,
            default_max_tokens=self.default_max_tokens,
        )


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A card, its tokenizer (a transformers tokenizer; may be used in any thread) and what its tokens are as text."""

    card: ModelCard
    tokenizer: Any
    token_bytes: TokenBytes
    bytes_per_token: float | None = None
    """Most bytes of text that a token stands for; None where a token may stand for any number."""

    @property
    def max_text_bytes(self) -> float:
        """Bytes of the longest text that can leave room for a token of output: longer ones are no use tokenising."""
        return math.inf if self.bytes_per_token is None else self.bytes_per_token * (self.card.context_tokens - 1)


class ModelCatalog:
    """Models by name."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        """Holds the models for good."""
        self._models = dict(sorted(models.items()))

    def get(self, name: str) -> ServedModel:
        """Returns the model of that name; an empty name means the only one.

        Raises:
            UnknownModelError: there is none, or several and no name was given.
        """
        if not name and len(self._models) == 1:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise UnknownModelError(name, list(self._models))
        return self._models[name]

    def models(self) -> list[ServedModel]:
        """Returns all models, in name order."""
        return list(self._models.values())

    def cards(self) -> list[ModelCard]:
        """Returns all cards, in name order."""
        return [model.card for model in self._models.values()]


def load_models(
    sources: Mapping[str, str], default_max_tokens: int, on_progress: Callable[[str], None] = lambda text: None
) -> ModelCatalog:
    """Returns the catalogue of {name: directory or hub id}. Takes seconds; call it in a thread.

    Raises:
        ModelLoadError: a source has no usable tokenizer or configuration.
    """
    # transformers says on import that it found no torch, which is how it is meant to be here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    models = {}
    for name, source in sources.items():
        on_progress(f"loading tokenizer of {name}")
        try:
            config = AutoConfig.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadError(
                f"model {name}: no tokenizer and configuration in {source!r} ({error}); "
                "give a directory with config.json and tokenizer files, or a hub id"
            ) from error
        try:
            generation = GenerationConfig.from_pretrained(source)
        except OSError:
            generation = None
        card = _card(name, source, config, generation, tokenizer, default_max_tokens)
        models[name] = ServedModel(card, tokenizer, _token_bytes(name, source, tokenizer), bytes_per_token(tokenizer))
    return ModelCatalog(models)


def _token_bytes(name: str, source: str, tokenizer: Any) -> TokenBytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelLoadError(f"model {name}: {source!r} has no tokenizer.json; convert its tokenizer to the fast form")
    try:
        return TokenBytes(backend)
    except ModelLoadError as error:
        raise ModelLoadError(f"model {name}: {source!r}: {error}") from error


def _card(name: str, source: str, config: Any, generation: Any, tokenizer: Any, default_max_tokens: int) -> ModelCard:
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    context = next((value for field in CONTEXT_NAMES if (value := getattr(text_config, field, None))), None)
    if context is None:
        raise ModelLoadError(f"model {name}: {source!r} names no context length ({', '.join(CONTEXT_NAMES)})")
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = getattr(text_config, "eos_token_id", None)
    eos_ids = set() if eos is None else set(eos) if isinstance(eos, list | tuple) else {int(eos)}
    # A chat model often ends its turn with the tokenizer's, which its configuration may not name.
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id < text_config.vocab_size:
        eos_ids.add(tokenizer.eos_token_id)
    return ModelCard(
        name=name,
        context_tokens=int(context),
        vocab_size=int(text_config.vocab_size),
        eos_token_ids=tuple(sorted(eos_ids)),
        has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
        default_max_tokens=default_max_tokens,
    )
