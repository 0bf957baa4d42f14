"""Bodies as JSON objects and back: none is read, or written, that the event loop would have to wait for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

from bucketserve_gateway.openai.errors import HttpError

__all__ = ["Written", "object_of", "pieces_of"]

MAX_PARTS = 100_000
"""Strings, arrays and objects of a body: several times as many as the longest conversation has."""
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""A string, or one without an end to the end: so that no byte is looked at twice."""


class Written:
    """JSON that is written already, in pieces."""

    def __init__(self, pieces: Iterable[bytes | bytearray]) -> None:
        """Takes the pieces."""
        self.pieces = list(pieces)


def pieces_of(document: Mapping[str, Any]) -> Iterator[bytes | bytearray]:
    """Yields a document as JSON; pieces of it that are written already stay as they are."""
    written: list[Written] = []

    def place(value: Any) -> orjson.Fragment:
        if not isinstance(value, Written):
            raise TypeError(type(value))
        written.append(value)
        # Nowhere else in JSON: a text has it escaped.
        return orjson.Fragment(b"\0")

    first, *others = orjson.dumps(document, default=place).split(b"\0")
    yield first
    for value, following in zip(written, others, strict=True):
        yield from value.pieces
        yield following


def object_of(body: bytes) -> dict[str, Any]:
    """Returns the object that a body consists of.

    Raises:
        HttpError: it is none; nor is what JSON does not know (NaN), half of a character, or what is too deep to read.
    """
    if _has_many_parts(body):
        raise HttpError(400, f"the body of the request has more than {MAX_PARTS} parts", "invalid_json")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise HttpError(400, f"could not parse the JSON body of the request: {error}", "invalid_json") from None
    if not isinstance(document, dict):
        raise HttpError(400, "the body of the request must be a JSON object", "invalid_json")
    return document


def _has_many_parts(body: bytes) -> bool:
    if body.count(b'"') + _brackets(body, 0, len(body)) <= MAX_PARTS:
        return False
    # Texts may be full of them: a closer look.
    number, end = 0, 0
    for string in _STRING.finditer(body):
        number += 1 + _brackets(body, end, string.start())
        end = string.end()
        if number > MAX_PARTS:
            return True
    return number + _brackets(body, end, len(body)) > MAX_PARTS


def _brackets(body: bytes, start: int, end: int) -> int:
    return body.count(b"[", start, end) + body.count(b"{", start, end)
