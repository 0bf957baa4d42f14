"""Token ids to text as they come: whole characters only, and nothing of a stop string.

Decoding is not additive (a character may span tokens, a token's text may depend on the one before), so that each step
decodes a short window twice, without and with the new tokens, and emits the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Detokenizer", "Piece", "StopMatcher"]

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6
MAX_CHARACTER_TOKENS = 4
"""UTF-8 has at most four bytes, and a token at least one."""
MAX_HELD_TOKENS = 16
"""What stays unreadable for longer than this really is."""


class Detokenizer:
    """Decodes one sequence. Amortised O(1) per token."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int] = ()) -> None:
        """Takes decode(ids) -> text, without special tokens, and the prompt, whose end decides about leading spaces."""
        self._decode = decode
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._emitted = len(self._ids)
        # A prompt of token ids may end inside a character; its first half counts as not yet shown.
        self._before = decode(self._ids).rstrip(REPLACEMENT) if self._ids else ""

    def put(self, token_ids: Sequence[int], is_last: bool = False) -> str:
        """Returns the text that is complete now; with is_last, all that is left."""
        self._ids += token_ids
        num_new = len(self._ids) - self._emitted
        if is_last or num_new > MAX_HELD_TOKENS:
            return self._emit(len(self._ids), self._decode(self._ids))
        # The end may be a part of a character: then look for the longest part before it that is whole.
        for held in range(min(MAX_CHARACTER_TOKENS, num_new)):
            end = len(self._ids) - held
            text = self._decode(self._ids[:end])
            if not text.endswith(REPLACEMENT):
                return self._emit(end, text)
        return ""

    def _emit(self, end: int, text: str) -> str:
        """Counts the window's tokens up to `end`, which decode to `text`, as shown; returns what is new of it."""
        new = text[len(self._before) :]
        if new:
            # The tokens shown now stay as context for the next ones; what is before them is not looked at again.
            del self._ids[: self._emitted]
            self._emitted = end - self._emitted
            self._before = self._decode(self._ids[: self._emitted])
        return new


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to send, and the stop string that ended it, if one did."""

    text: str
    matched_stop: str = ""


class StopMatcher:
    """Holds text back while it could be the beginning of a stop string; cuts before the first one that occurs."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        """Stop strings are not empty."""
        self._stops = tuple(stop_strings)
        self._held = ""

    def put(self, text: str, is_last: bool = False) -> Piece:
        """Returns what may be sent. After a match nothing more may be put."""
        if not self._stops:
            return Piece(text)
        self._held += text
        found = [(self._held.find(stop), -len(stop), stop) for stop in self._stops if stop in self._held]
        if found:
            start, _, stop = min(found)
            return Piece(self._held[:start], stop)
        keep = 0 if is_last else self._num_held()
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(ready) :]
        return Piece(ready)

    def _num_held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
