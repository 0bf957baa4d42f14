"""Bodies: what is read, and what is refused before it is."""

from __future__ import annotations

import json

import pytest

from bucketserve_gateway.openai.bodies import MAX_PARTS, Written, object_of, pieces_of
from bucketserve_gateway.openai.errors import HttpError

MANY = MAX_PARTS + 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * MANY,
        '"' * MANY,
        '\\"[' * MANY,
        "{\\" * MANY,
        "\n" * MANY,
        "[{" * MANY + "\\",
        "日本語 \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16") * MANY,
    ],
)
def test_a_text_may_have_anything_in_it(text: str) -> None:
    for is_ascii in (False, True):
        body = json.dumps({"prompt": text, "x": ["[", {}]}, ensure_ascii=is_ascii).encode()
        assert object_of(body) == {"prompt": text, "x": ["[", {}]}


def test_ids_may_be_as_many_as_fit() -> None:
    assert len(object_of(b'{"prompt": [' + b"5," * 10**6 + b"5]}")["prompt"]) == 10**6 + 1


@pytest.mark.parametrize(
    "body",
    [
        b"[]," * MANY,
        b"{}" * MANY,
        b'{"a": [' + b"[[]]," * MANY + b"1]}",
        b'{"a": [' + b'"",' * MANY + b"1]}",
        b"{" + b'"a":1,' * MANY + b'"b":1}',
        b"[" * MANY,
        # A string without an end, before and after many parts.
        b"[" * MANY + b'"\\"' + b'\\"' * MANY,
    ],
)
def test_what_has_too_many_parts_is_not_even_read(body: bytes) -> None:
    with pytest.raises(HttpError, match=f"more than {MAX_PARTS} parts"):
        object_of(body)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"a"', b'{"a": NaN}', b'{"a": "\\ud800"}', b'"' + b'\\"' * 10**6, b"\xff"]
)
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        object_of(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_what_is_written_already_stays_as_it_is() -> None:
    large = bytearray(b'"' + b"a" * 1000 + b'"')
    inner = Written(pieces_of({"x": Written([large]), "y": "\0"}))
    pieces = list(pieces_of({"\0": [inner, None, Written([b"[", b"1]"])], "é": "\0"}))
    assert json.loads(b"".join(pieces)) == {"\0": [{"x": "a" * 1000, "y": "\0"}, None, [1]], "é": "\0"}
    assert any(piece is large for piece in pieces)
    assert list(pieces_of({"a": 1})) == [b'{"a":1}']
    with pytest.raises(TypeError):
        list(pieces_of({"a": object()}))
