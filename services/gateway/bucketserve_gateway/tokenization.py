"""Text to token ids, in whatever thread it is called; which one is up to tokenizer_pool.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bucketserve.core.errors import FieldViolation, InvalidRequestError
from bucketserve_gateway.models import ServedModel

__all__ = ["Tools", "Turn", "count", "encode", "render_chat"]

MAX_TEMPLATE_ERROR_CHARACTERS = 200
"""The rest of what a template says may be the client's own text."""


def encode(model: ServedModel, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Returns the ids of a text, by default with the special tokens that the tokenizer adds by itself."""
    backend = model.tokenizer.backend_tokenizer
    # Without where each token is in the text, which takes as long again.
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


def count(model: ServedModel, text: str) -> int:
    """Returns the number of tokens of a text, without special ones that the tokenizer would add."""
    return len(encode(model, text, add_special_tokens=False))


Tools = Sequence[Mapping[str, Any]]
"""As chat templates take them."""


class Turn(NamedTuple):
    """A turn of a conversation."""

    role: str
    content: str
    tool_calls: Tools = ()
    tool_call_id: str = ""

    def message(self) -> dict[str, Any]:
        """Returns it as chat templates take it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


def render_chat(model: ServedModel, turns: Sequence[Turn], tools: Tools = ()) -> str:
    """Returns a conversation as text, ready for the assistant's turn.

    Raises:
        InvalidRequestError: the model's chat template refuses it.
    """
    messages = [turn.message() for turn in turns]
    options = {"tools": list(tools)} if tools else {}
    try:
        return str(model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options))
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        why = str(error)[:MAX_TEMPLATE_ERROR_CHARACTERS]
        raise InvalidRequestError([FieldViolation("chat", f"the model's chat template refuses it: {why}")]) from error
