"""A body's bytes as a JSON object, unless reading it would take long: the event loop waits meanwhile."""

from __future__ import annotations

import re
from typing import Any

import orjson

from bucketserve_gateway.openai.errors import HttpError

__all__ = ["object_of"]

MAX_PARTS = 100_000
"""Strings, arrays and objects of a body: several times as many as the longest conversation has."""
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""A string, or one without an end to the end: so that no byte is looked at twice."""


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
