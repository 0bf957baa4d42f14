"""The models that this gateway serves: their limits and tokenizers. No weights, and no torch."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bucketserve.core.errors import ModelLoadError
from bucketserve.engine.fingerprint import tokenizer_fingerprint
from bucketserve.engine.grammars import GrammarError, GrammarTokenizer
from bucketserve.engine.model_source import (
    accepted,
    context_of,
    load_config,
    model_directory,
    stop_ids,
    vocabulary_of,
)
from bucketserve.engine.weight_files import read_json
from bucketserve.v1 import inference_pb2
from bucketserve_gateway.adapters import AdapterBook, split_adapter
from bucketserve_gateway.detokenizer import TokenBytes
from bucketserve_gateway.names import ModelNames
from bucketserve_gateway.text_bound import bytes_per_token

__all__ = ["ModelCard", "ModelCatalog", "ServedModel", "load_models"]

STATES_EOS = ("generation_config.json", "config.json")
TOKENIZER_FILES = {"tokenizer.json", "vocab.json", "vocab.txt", "tekken.json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What clients may know of a model."""

    name: str
    context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    default_max_tokens: int
    aliases: tuple[str, ...] = ()
    """Its further names."""
    parent: str = ""
    """Of an adapter: the model that it belongs to."""

    def to_pb(self) -> inference_pb2.Model:
        """Returns it as a message."""
        return inference_pb2.Model(
            name=self.name,
            context_tokens=self.context_tokens,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            has_chat_template=self.has_chat_template,
            default_max_tokens=self.default_max_tokens,
            aliases=self.aliases,
            parent=self.parent,
        )


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A card, its tokenizer (a transformers tokenizer; may be used in any thread) and what its tokens are as text."""

    card: ModelCard
    tokenizer: Any
    token_bytes: TokenBytes
    fingerprint: str = ""
    """Of what its token ids mean."""
    bytes_per_token: float | None = None
    """Most bytes of text that a token stands for; None where a token may stand for any number."""
    directory: Path | None = None
    """Where its files are; None if it was not loaded from any."""
    grammars: GrammarTokenizer | None = None
    """Its vocabulary for structured output; None if it is of no kind that grammars know."""
    adapter: str = ""
    """Fingerprint of the adapter that computes it; empty: the model alone."""

    @property
    def base_name(self) -> str:
        """Name of the model whose workers serve it."""
        return self.card.parent or self.card.name

    @property
    def max_text_bytes(self) -> float:
        """Bytes of the longest text that can leave room for a token of output: longer ones are no use tokenising."""
        return math.inf if self.bytes_per_token is None else self.bytes_per_token * (self.card.context_tokens - 1)


class ModelCatalog:
    """Models by name."""

    def __init__(self, models: Mapping[str, ServedModel], names: ModelNames | None = None) -> None:
        """Holds the models for good, adapters come and go; names: what else models are called, None for nothing."""
        self._models = dict(sorted(models.items()))
        self.names = names or ModelNames(models)
        self.adapters = AdapterBook()

    def get(self, name: str) -> ServedModel:
        """Returns the model of that name or alias, or its adapter ("model:adapter"); an empty name means the only one.

        Raises:
            UnknownModelError: there is none, or several and no name was given.
        """
        own = self.names.resolve(name)
        if own in self._models:
            return self._models[own]
        base, adapter = split_adapter(own)
        if base in self._models and (fingerprint := self.adapters.fingerprint(base, adapter)):
            card = self._adapter_card(base, own)
            return replace(self._models[base], card=card, adapter=fingerprint)
        raise self.names.unknown(name, [card.name for card in self.cards() if card.parent])

    def models(self) -> list[ServedModel]:
        """Returns all models, in name order; no adapters."""
        return list(self._models.values())

    def cards(self) -> list[ModelCard]:
        """Returns the cards of all models, each with its adapters behind it, in name order."""
        found = []
        for base, model in self._models.items():
            names = (f"{base}:{adapter}" for adapter in self.adapters.names(base))
            # A model of that very name is what is meant by it, or that it is an alias of.
            own = [name for name in names if name not in self._models and self.names.resolve(name) == name]
            found += [model.card, *(self._adapter_card(base, name) for name in own)]
        return found

    def _adapter_card(self, base: str, name: str) -> ModelCard:
        return replace(self._models[base].card, name=name, parent=base, aliases=())


def load_models(
    sources: Mapping[str, str],
    default_max_tokens: int,
    on_progress: Callable[[str], None] = lambda text: None,
    *,
    names: ModelNames | None = None,
) -> ModelCatalog:
    """Returns the catalogue of {name: directory or hf://organisation/name}. Takes seconds; call it in a thread.

    Args:
        sources: where each model's files are.
        default_max_tokens: of a request that names none.
        on_progress: called with what is being done.
        names: what else the models are called; None for nothing.

    Raises:
        ModelLoadError: a source has no usable tokenizer or configuration.
    """
    # transformers says on import that it found no torch, which is how it is meant to be here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)

    names = names or ModelNames(sources)
    models = {}
    for name, source in sources.items():
        on_progress(f"loading tokenizer of {name}")
        try:
            models[name] = _load_model(name, source, default_max_tokens, names.aliases_of(name))
        except ModelLoadError as error:
            raise ModelLoadError(f"model {name!r} from {source!r} can't be loaded: {error}") from error
    return ModelCatalog(models, names)


def _load_model(name: str, source: str, default_max_tokens: int, aliases: tuple[str, ...]) -> ServedModel:
    directory = model_directory(source, with_weights=False)
    config = load_config(directory)
    tokenizer = _load_tokenizer(directory)
    text_config = config.get_text_config()
    vocab_size = vocabulary_of(text_config)
    card = ModelCard(
        name=name,
        context_tokens=context_of(text_config),
        vocab_size=vocab_size,
        eos_token_ids=_stop_ids(directory, tokenizer, vocab_size),
        has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
        default_max_tokens=default_max_tokens,
        aliases=aliases,
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelLoadError("it has no tokenizer.json; convert its tokenizer to the fast form")
    # Sets the backend up for good: it neither truncates nor pads, whatever tokenizer.json says.
    tokenizer("")
    return ServedModel(
        card,
        tokenizer,
        TokenBytes(backend),
        tokenizer_fingerprint(directory),
        bytes_per_token(tokenizer),
        directory,
        _grammars(backend, vocab_size),
    )


def _grammars(backend: Any, vocab_size: int) -> GrammarTokenizer | None:
    try:
        return GrammarTokenizer(backend, vocab_size)
    except GrammarError:
        return None


def _load_tokenizer(directory: Path) -> Any:
    """Returns the tokenizer of a directory.

    Raises:
        ModelLoadError: there is none, it is damaged, or its chat template does not compile.
    """
    from jinja2 import TemplateSyntaxError
    from transformers import AutoTokenizer

    names = {path.name for path in directory.iterdir()}
    if not names & TOKENIZER_FILES:
        advice = (
            "; with transformers and sentencepiece, AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it"
        )
        raise ModelLoadError(
            f"it has tokenizer.model and no tokenizer.json{advice}"
            if "tokenizer.model" in names
            else "it has no tokenizer: tokenizer.json is missing"
        )
    tokenizer = accepted("its tokenizer", lambda: AutoTokenizer.from_pretrained(directory, local_files_only=True))
    if getattr(tokenizer, "chat_template", None):
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
        except Exception as error:
            # Any other error is the template's own: it compiles, and which conversations it refuses is its affair.
            if isinstance(error, TemplateSyntaxError):
                problem = f"line {error.lineno}: {error.message}"
                raise ModelLoadError(f"its chat template does not compile: {problem}") from error
    return tokenizer


def _stop_ids(directory: Path, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Returns the ids that end a text: those of generation_config.json, else of config.json, and the tokenizer's.

    A chat model often ends its turn with the tokenizer's eos, which its configuration may not name. That of config.json
    is often a forgotten default: where generation_config.json names any, it does not count, as in transformers.
    """
    documents = {name: read_json(directory / name) for name in STATES_EOS if (directory / name).exists()}
    of_tokenizer = tokenizer.eos_token_id
    ids = stop_ids(documents) | (frozenset() if of_tokenizer is None else {int(of_tokenizer)})
    return tuple(sorted(i for i in ids if i < vocab_size))
