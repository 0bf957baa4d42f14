"""Text to token ids, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from bucketserve.core.errors import FieldViolation, InvalidRequestError
from bucketserve_gateway.models import ServedModel

__all__ = ["TokenizerPool"]


class TokenizerPool:
    """A bounded pool of threads; the tokenizers release the interpreter while they work."""

    def __init__(self, num_threads: int) -> None:
        """Starts threads when first needed."""
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")

    async def encode(self, model: ServedModel, text: str) -> list[int]:
        """Returns the ids of a text, with the special tokens that the model's tokenizer adds by itself."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, _encode, model, text)

    async def encode_chat(self, model: ServedModel, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Returns the ids of a conversation of (role, content), ready for the assistant's turn.

        Raises:
            InvalidRequestError: the model's chat template refuses the conversation.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, _encode_chat, model, turns)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _encode(model: ServedModel, text: str) -> list[int]:
    return list(model.tokenizer(text)["input_ids"])


def _encode_chat(model: ServedModel, turns: Sequence[tuple[str, str]]) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        rendered = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        raise InvalidRequestError([FieldViolation("chat", f"the model's chat template refuses it: {error}")]) from error
    # The template writes the special tokens itself.
    return list(model.tokenizer(rendered, add_special_tokens=False)["input_ids"])
