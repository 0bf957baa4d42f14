"""Text to token ids, in whatever thread it is called; which one is up to tokenizer_pool.py."""

from __future__ import annotations

from collections.abc import Sequence

from bucketserve.core.errors import FieldViolation, InvalidRequestError
from bucketserve_gateway.models import ServedModel

__all__ = ["count", "encode", "render_chat"]

MAX_TEMPLATE_ERROR_CHARACTERS = 200
"""The rest of what a template says may be the client's own text."""


def encode(model: ServedModel, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Returns the ids of a text, by default with the special tokens that the tokenizer adds by itself."""
    return list(model.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def count(model: ServedModel, text: str) -> int:
    """Returns the number of tokens of a text, without special ones that the tokenizer would add."""
    return len(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def render_chat(model: ServedModel, turns: Sequence[tuple[str, str]]) -> str:
    """Returns a conversation of (role, content) as text, ready for the assistant's turn.

    Raises:
        InvalidRequestError: the model's chat template refuses it.
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        why = str(error)[:MAX_TEMPLATE_ERROR_CHARACTERS]
        raise InvalidRequestError([FieldViolation("chat", f"the model's chat template refuses it: {why}")]) from error
