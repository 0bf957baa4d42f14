"""Where texts are tokenised and schemas compiled: off the event loop, in bounded memory, short before long ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from bucketserve.core.errors import FieldViolation, InvalidRequestError, OverloadedError
from bucketserve.engine.grammars import GrammarError
from bucketserve.rpc.convert import structured_from_pb
from bucketserve.v1 import common_pb2
from bucketserve_gateway.models import ServedModel
from bucketserve_gateway.tokenization import Tools, Turn, count, encode, render_chat

__all__ = ["TokenizerPool"]

T = TypeVar("T")

LONG_CHARACTERS = 16_384
"""Texts beyond this go one after the other through a thread of their own: some milliseconds each."""
LONG_MESSAGES = 64
MAX_WAITING_CHARACTERS = 16 << 20
"""What may wait for its turn; more would wait for longer than its clients."""
STRUCTURE_WEIGHT = 16
"""A character of a schema may take as long as so many of a prompt."""
SURE_BYTES = 5
"""Texts of at most so many bytes for each token of the context are tokenised at once; others are measured first."""
PIECE_CHARACTERS = 65_536
CUT_TOKENS = 1024
"""So many tokens more a piece may have than it adds to the whole: those of words that a cut went through."""


class TokenizerPool:
    """Threads that tokenise; the tokenizers release the interpreter while they work."""

    def __init__(self, num_threads: int, max_text_bytes: int, refusal: Callable[[str, str], OverloadedError]) -> None:
        """Starts threads when first needed.

        Args:
            num_threads: threads for short texts.
            max_text_bytes: most bytes of a conversation as its template renders it.
            refusal: makes the error of a refusal out of its reason and message.
        """
        self._refusal = refusal
        self._short = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="tokenize-long")
        # No prompt waits for a schema.
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._max_text_bytes = max_text_bytes
        self._lock = threading.Lock()
        self._waiting = 0

    async def encode(self, model: ServedModel, text: str) -> list[int]:
        """Returns the ids of a text, with the special tokens that the model's tokenizer adds by itself.

        Raises:
            InvalidRequestError: it is certainly longer than the model's context.
            OverloadedError: too many long texts wait.
        """
        return await self._run(len(text), lambda: _bounded(model, text, "prompt"))

    async def encode_chat(self, model: ServedModel, turns: Sequence[Turn], tools: Tools = ()) -> list[int]:
        """Returns the ids of a conversation, ready for the assistant's turn.

        Raises:
            InvalidRequestError: the model's chat template refuses it, or it is certainly longer than the context.
            OverloadedError: too many long texts wait.
        """
        size = sum(len(turn.content) for turn in turns)
        is_long = len(turns) > LONG_MESSAGES or bool(tools)
        size = max(size, LONG_CHARACTERS + 1) if is_long else size
        text = await self._run(size, lambda: render_chat(model, turns, tools))
        num_bytes = len(text.encode())
        if num_bytes > min(self._max_text_bytes, model.max_text_bytes):
            description = f"{num_bytes} bytes by the model's chat template are too many for its context"
            raise InvalidRequestError([FieldViolation("chat", description)])
        # The template writes the special tokens itself.
        return await self._run(len(text), lambda: _bounded(model, text, "chat", add_special_tokens=False))

    async def check_structure(self, model: ServedModel, wanted: common_pb2.StructuredOutput) -> None:
        """Checks that what an output must be can be compiled; nothing if it may be anything.

        Raises:
            InvalidRequestError: it can't; says why.
            OverloadedError: too many wait.
        """
        structure, grammars = structured_from_pb(wanted), model.grammars
        if structure is None or grammars is None:
            return
        try:
            size = len(structure.text) * STRUCTURE_WEIGHT
            await self._in_turn(self._compiler, size, lambda: grammars.check(structure))
        except GrammarError as error:
            field = f"structured_output.{structure.kind.value}"
            raise InvalidRequestError([FieldViolation(field, str(error))]) from error

    def close(self) -> None:
        """Ends the threads."""
        for pool in (self._short, self._long, self._compiler):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, num_characters: int, work: Callable[[], T]) -> T:
        if num_characters <= LONG_CHARACTERS:
            return await asyncio.get_running_loop().run_in_executor(self._short, work)
        return await self._in_turn(self._long, num_characters, work)

    async def _in_turn(self, thread: ThreadPoolExecutor, num_characters: int, work: Callable[[], T]) -> T:
        with self._lock:
            if self._waiting and self._waiting + num_characters > MAX_WAITING_CHARACTERS:
                raise self._refusal("TOKENIZER_BUSY", "too many long prompts wait to be tokenised, or schemas compiled")
            self._waiting += num_characters
        running = thread.submit(work)
        # The thread's own end: it goes on when nobody waits for it any more.
        running.add_done_callback(lambda _: self._left(num_characters))
        return await asyncio.wrap_future(running)

    def _left(self, num_characters: int) -> None:
        with self._lock:
            self._waiting -= num_characters


def _bounded(model: ServedModel, text: str, field: str, *, add_special_tokens: bool = True) -> list[int]:
    context = model.card.context_tokens
    if len(text) * 4 > SURE_BYTES * context and len(text.encode()) > SURE_BYTES * context:
        tokens = 0
        for piece in _pieces(text):
            tokens += max(count(model, piece) - CUT_TOKENS, 0)
            if tokens >= context:
                description = f"more than {tokens} tokens, and the context holds {context}"
                raise InvalidRequestError([FieldViolation(field, description, is_too_long=True)])
    return encode(model, text, add_special_tokens=add_special_tokens)


def _pieces(text: str) -> Iterator[str]:
    """Yields a text in pieces, cut before a space where there is one in the last eighth."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            end = max(text.rfind(" ", end - PIECE_CHARACTERS // 8, end), 0) or end
        yield text[start:end]
        start = end
