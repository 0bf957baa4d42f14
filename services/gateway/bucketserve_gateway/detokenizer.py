"""Token ids to text as they come: whole characters only, and nothing of a stop string.

The text of a request is what its tokens add to the text of its prompt. It is a function of the token ids alone, however
they are split into deliveries: each token adds bytes that depend on the token before it at most, and the bytes of all
are read as UTF-8. Where these are well-formed the result is what the tokenizer's own `decode` makes of all tokens at
once. Where they are not, U+FFFD stands for the ill-formed bytes and for nothing else. A character that the prompt
begins and the output completes belongs to the output; what else the prompt leaves incomplete is not shown.

The incremental decoder of the tokenizers library (`DecodeStream`) is no substitute: its text depends on the split, it
keeps what is incomplete at the end, and with byte fallback one ill-formed byte turns the whole characters beside it
into U+FFFD.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from bucketserve.core.errors import ModelLoadError

__all__ = ["Detokenizer", "Piece", "StopMatcher", "TokenBytes", "byte_alphabet"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ADDITIVE = {"Replace", "Metaspace", "WordPiece", "ByteFallback", "Fuse", "Strip"}
"""Decoders for which it matters only whether a token is the first one."""
_BY_PREVIOUS = {"BPEDecoder", "CTC"}
"""Decoders for which it matters which token is before it."""
_PER_BYTE = "bucketserve.replace_per_byte"
_MAX_INCOMPLETE_BYTES = 3


def _replace_per_byte(error: UnicodeError) -> tuple[str, int]:
    """Replaces each ill-formed byte, as byte fallback does; UTF-8's own handler replaces some as one."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_PER_BYTE, _replace_per_byte)


class TokenBytes:
    """The bytes that each token of a vocabulary adds to a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Reads what the tokenizer's decoder consists of.

        Raises:
            ModelLoadError: text can't be decoded token by token.
        """
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        """Ids of the special tokens, which add nothing to the text, by their content."""
        kinds = set(_kinds(json.loads(tokenizer.decoder.__getstate__()))) if tokenizer.decoder is not None else set()
        is_byte_level = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        if not is_byte_level and (unknown := kinds - _ADDITIVE - _BY_PREVIOUS):
            raise ModelLoadError(f"its tokenizer's decoder can't be used token by token: {', '.join(sorted(unknown))}")
        self._byte_of = byte_alphabet() if is_byte_level else {}
        self._has_byte_tokens = "ByteFallback" in kinds
        self._anchor = None if kinds & _BY_PREVIOUS else self._first_plain_id()
        self.errors = _PER_BYTE if self._has_byte_tokens else "replace"
        """Error handler for bytes that are no UTF-8."""
        self._bytes_of = lru_cache(maxsize=2 * tokenizer.get_vocab_size())(self._make_bytes)

    def __call__(self, token_id: int, previous: int | None) -> bytes | None:
        """Returns what a token adds after another one (None: at the beginning); None for one that is never shown."""
        if self._byte_of:
            previous = None
        elif previous is not None and self._anchor is not None:
            previous = self._anchor
        return self._bytes_of(token_id, previous)

    def _make_bytes(self, token_id: int, previous: int | None) -> bytes | None:
        content = self._tokenizer.id_to_token(token_id)
        if content is None or content in self.special_ids:
            return None
        if self._byte_of:
            values = [self._byte_of.get(character) for character in content]
            return content.encode() if None in values else bytes(value for value in values if value is not None)
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(content)):
            value = int(match[1], 16)
            # A byte that is a character is treated as one at the beginning, where a space may be dropped.
            return self._decode(token_id).encode() if previous is None and value < 0x80 else bytes([value])
        if previous is None:
            return self._decode(token_id).encode()
        return self._decode(previous, token_id)[len(self._decode(previous)) :].encode()

    def _decode(self, *token_ids: int) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def _first_plain_id(self) -> int | None:
        """Returns an id whose token is shown and is not a byte."""
        for content, token_id in self._tokenizer.get_vocab().items():
            if content not in self.special_ids and not _BYTE_TOKEN.fullmatch(content) and self._decode(token_id):
                return token_id
        return None


class Detokenizer:
    """The text of one sequence. O(1) per token."""

    def __init__(self, token_bytes: TokenBytes, prompt_ids: Sequence[int] = ()) -> None:
        """Takes the prompt, whose end decides about leading spaces and may be a part of a character."""
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(token_bytes.errors)
        self._previous: int | None = None
        end: list[int] = []
        for token_id in reversed(prompt_ids):
            if token_bytes(token_id, None) is not None:
                end.append(token_id)
            if len(end) > _MAX_INCOMPLETE_BYTES:
                break
        self._utf8.decode(self._bytes(reversed(end)))
        # What the prompt has of a character counts as shown, unless the output completes it.
        self._shown = self._utf8_end()

    def put(self, token_ids: Sequence[int], is_last: bool = False) -> str:
        """Returns the text that is complete now; with is_last, all that is left."""
        text = self._utf8.decode(self._bytes(token_ids), is_last)
        if text and self._shown:
            text, self._shown = text.removeprefix(self._shown), ""
        return text

    def _utf8_end(self) -> str:
        """Returns what the bytes that wait would be if none followed."""
        state = self._utf8.getstate()
        text = self._utf8.decode(b"", True)
        self._utf8.setstate(state)
        return text

    def _bytes(self, token_ids: Sequence[int] | Iterator[int]) -> bytes:
        """Returns what tokens add, and remembers the last one shown."""
        pieces = []
        for token_id in token_ids:
            piece = self._token_bytes(token_id, self._previous)
            if piece is not None:
                pieces.append(piece)
                self._previous = token_id
        return b"".join(pieces)


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to send, and the stop string that ended it, if one did."""

    text: str
    matched_stop: str = ""


class StopMatcher:
    """Holds text back while it could be the beginning of a stop string; cuts before the first one that is complete.

    Of several that end at the same character the longest counts, so that the result does not depend on how the text is
    split. Amortised O(number of stop strings) per character, whatever they are (Knuth, Morris and Pratt).
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        """Stop strings are not empty."""
        self._stops = sorted(set(stop_strings), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        """How many characters of each stop string the text ends with."""
        self._held = ""

    def put(self, text: str, is_last: bool = False) -> Piece:
        """Returns what may be sent. After a match nothing more may be put."""
        if not self._stops:
            return Piece(text)
        start = len(self._held)
        self._held += text
        for end in range(start, len(self._held)):
            stop = self._advance(self._held[end])
            if stop:
                return Piece(self._held[: end + 1 - len(stop)], stop)
        keep = 0 if is_last else max(self._matched)
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(ready) :]
        return Piece(ready)

    def _advance(self, character: str) -> str:
        """Takes one character; returns the longest stop string that it completes."""
        found = ""
        for i, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            length = self._matched[i]
            while length and stop[length] != character:
                length = borders[length - 1]
            if stop[length] == character:
                length += 1
            self._matched[i] = length
            if length == len(stop):
                found = found or stop
        return found


def _borders(pattern: str) -> list[int]:
    """Returns for each beginning of a pattern the length of its longest proper part that both begins and ends it."""
    borders, length = [0], 0
    for character in pattern[1:]:
        while length and pattern[length] != character:
            length = borders[length - 1]
        if pattern[length] == character:
            length += 1
        borders.append(length)
    return borders


def byte_alphabet() -> dict[str, int]:
    """Returns the bytes that byte-level vocabularies write as characters, by character.

    Printable bytes are written as themselves, the others in order as the characters from U+0100 on.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    themselves = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = (byte for byte in range(256) if chr(byte) not in themselves)
    return themselves | dict(zip(alphabet[len(themselves) :], others, strict=True))


def _kinds(decoder: dict[str, Any]) -> Iterator[str]:
    """Yields the types that a decoder consists of, from its description as JSON."""
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _kinds(part)
    else:
        yield "Strip at the end" if decoder.get("stop") else decoder["type"]
