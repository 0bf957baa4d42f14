"""Whatever is asked for: it is compiled within bounds and keeps to what it says, or is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from bucketserve.engine.grammars import GrammarError, GrammarTokenizer
from bucketserve.ports import StructuredOutput, StructureKind
from bucketserve_gateway.detokenizer import TokenBytes
from tests.unit.gateway.builders import (
    byte_fallback_bpe,
    byte_fallback_without_strip,
    byte_level_bpe,
    metaspace_unigram,
    suffix_bpe,
    without_decoder,
    word_piece,
)

MODEL = Path(__file__).resolve().parents[3] / "models" / "demo" / "model"
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
GRAMMARS = GrammarTokenizer(TOKENIZER, 4096)
STOP = TOKENIZER.token_to_id("<|endoftext|>")
SCHEMA, REGEX, CHOICES, GRAMMAR = StructureKind


def schema(value: object) -> StructuredOutput:
    return StructuredOutput(SCHEMA, json.dumps(value))


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def fits(wanted: StructuredOutput, text: str) -> bool:
    """Whether a text is a whole output."""
    try:
        mask = GRAMMARS.matcher(wanted, ids(text)).mask([STOP])
    except GrammarError:
        return False
    return bool(mask[STOP >> 3] & 1 << (STOP & 7))


def begins(wanted: StructuredOutput, text: str) -> bool:
    """Whether a text is the beginning of an output."""
    try:
        GRAMMARS.matcher(wanted, ids(text))
    except GrammarError:
        return False
    return True


PERSON = schema(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


@pytest.mark.parametrize(
    ("wanted", "good", "bad"),
    [
        (PERSON, ['{"name":"Noah","age":600}', '{\n  "name": "", "age": 0}'], ['{"name":"Noah"}', '{"name":1', " {"]),
        (schema({"enum": ["a", 1, None]}), ['"a"', "1", "null"], ["2", '"b"', "[]"]),
        (schema(True), ["1", "[[{}]]", '"x"'], ["x", "[}"]),
        (
            schema(
                {"type": "array", "items": {"type": "object", "maxProperties": 1}}
                | {"x-guidance": {"item_separator": ";", "key_separator": "=", "whitespace_pattern": "x+"}}
            ),
            ['[{"a":1},{}]', "[ {} , {}]"],
            ["[{};{}]", '[{"a"=1}]', "[xx{}]"],
        ),
        (StructuredOutput(REGEX, "[0-9]{3}-(x|y)+"), ["123-x", "000-yxy"], ["12-x", "123-", "1234"]),
        (StructuredOutput(REGEX, "(?i)noah|é"), ["NoAh", "é"], ["noahs", "e"]),
        (
            StructuredOutput(CHOICES, json.dumps(["yes", 'no, "never"', "é\n\0😀", "/a%{b", "yesterday"])),
            ["yes", 'no, "never"', "é\n\0😀", "/a%{b", "yesterday"],
            ["yester", "no", "\\", ""],
        ),
        (StructuredOutput(CHOICES, '["a", ""]'), ["a", ""], ["b"]),
        (StructuredOutput(GRAMMAR, 'start: "(" start ")" | "x"'), ["x", "((x))"], ["(x", "y"]),
    ],
)
def test_what_fits_and_what_does_not(wanted: StructuredOutput, good: list[str], bad: list[str]) -> None:
    GRAMMARS.check(wanted)
    assert all(fits(wanted, text) for text in good)
    assert not any(fits(wanted, text) for text in bad)
    assert all(begins(wanted, text[: len(text) // 2]) for text in good if text.isascii())


def test_the_end_is_allowed_exactly_when_it_may_end() -> None:
    """Whatever ends it: the model's token, one of the request's, a token that is also a part of what is asked for."""
    brace = ids("}")[0]
    for text, may_end in (("", False), ('{"name":"a","age":1', False), ('{"name":"a","age":1}', True)):
        matcher = GRAMMARS.matcher(PERSON, ids(text))
        mask = matcher.mask([STOP, brace, 10**9])
        assert [bool(mask[token >> 3] & 1 << (token & 7)) for token in (STOP, brace)] == [may_end] * 2
        assert matcher.is_complete is may_end
        assert any(matcher.mask([])) is not may_end


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe, byte_fallback_without_strip])
def test_a_token_is_the_bytes_that_it_adds_to_the_text(make) -> None:
    """What a grammar follows is what the client reads."""
    backend = make().backend_tokenizer
    grammars, token_bytes = GrammarTokenizer(backend, backend.get_vocab_size()), TokenBytes(backend)
    by_text: dict[str, list[int]] = {}
    for token_id in range(backend.get_vocab_size()):
        raw = token_bytes(token_id, backend.get_vocab_size() - 1) or b""
        # A part of a character alone is no text.
        if (text := raw.decode(errors="ignore")) and text.encode() == raw:
            by_text.setdefault(text, []).append(token_id)
    assert len(by_text) > 100
    for text, token_ids in by_text.items():
        mask = grammars.matcher(StructuredOutput(CHOICES, json.dumps([text])), []).mask([])
        # Of tokens that are the same, at least one.
        assert any(mask[token_id >> 3] & 1 << (token_id & 7) for token_id in token_ids), text


def nested(depth: int) -> object:
    inner: object = {"type": "string"}
    for _ in range(depth):
        inner = {"type": "array", "items": inner}
    return inner


REFUSED = {
    "no JSON": StructuredOutput(SCHEMA, '{"type":'),
    "NaN": StructuredOutput(SCHEMA, '{"const": NaN}'),
    "half a character": StructuredOutput(SCHEMA, '{"const": "\\ud800"}'),
    "zero byte": StructuredOutput(SCHEMA, "\0"),
    "deep text": StructuredOutput(SCHEMA, "[" * 60_000),
    "deep": schema(nested(300)),
    "no object": schema([1]),
    "number": schema(5),
    "nothing is valid": schema(False),
    "no alternative": schema({"enum": []}),
    "unknown type": schema({"type": "banana"}),
    "unknown keyword": schema({"type": "array", "uniqueItems": True}),
    "unknown keyword, with leave": schema({"uniqueItems": True, "x-guidance": {"lenient": True}}),
    "one of, with leave": schema(
        {"oneOf": [{"type": "integer"}, {"minimum": 2}], "x-guidance": {"coerce_one_of": True}}
    ),
    "unknown format": schema({"type": "string", "format": "nonsense"}),
    "unsatisfiable": schema({"type": "integer", "minimum": 5, "maximum": 3}),
    "itself": schema({"$ref": "#"}),
    "two that are each other": schema(
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    ),
    "dangling": schema({"$ref": "#/$defs/x"}),
    "remote": schema({"$ref": "http://127.0.0.1:1/schema.json"}),
    "file": schema({"$ref": "file:///etc/passwd"}),
    "remote draft": schema({"$schema": "http://127.0.0.1:1/draft"}),
    "2,000 properties": schema({"properties": {f"p{i}": {} for i in range(2000)}, "type": "object"}),
    "factors": schema({"type": "integer", "multipleOf": 987654321}),
    "expression of a schema": schema({"type": "string", "pattern": "("}),
    "exponential": schema({"allOf": [{"anyOf": [{"const": i}, {"const": -i}]} for i in range(30)]}),
    "unclosed": StructuredOutput(REGEX, "(a"),
    "look-ahead": StructuredOutput(REGEX, "(?=a)b"),
    "back reference": StructuredOutput(REGEX, r"(a)\1"),
    "counted": StructuredOutput(REGEX, "((a{1000}){1000}){1000}"),
    "empty expression": StructuredOutput(REGEX, "()"),
    "no letter": StructuredOutput(REGEX, "[^\\x00-\\x{10FFFF}]"),
    "no choice but nothing": StructuredOutput(CHOICES, '[""]'),
    "doubled": StructuredOutput(
        GRAMMAR, "start: T0\n" + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(17)) + "T17: /a/"
    ),
    "no grammar": StructuredOutput(GRAMMAR, "x" * 60_000),
    "unknown rule": StructuredOutput(GRAMMAR, "start: foo"),
    "endless rule": StructuredOutput(GRAMMAR, "start: start"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(GrammarError) as caught:
        GRAMMARS.check(REFUSED[name])
    assert 0 < len(str(caught.value)) <= 200
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "wanted",
    [
        schema({"enum": [f"value {i}" for i in range(4_000)]}),
        schema({"type": "string", "pattern": "^(a+)+$"}),
        StructuredOutput(REGEX, "(a|a)*b(.*a){20}"),
        StructuredOutput(REGEX, ".*a.{30}"),
        schema({"type": "string", "maxLength": 10**8}),
        schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**5}),
        schema({"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}}}}),
        schema({"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
        schema(nested(30)),
        # Nothing that ends.
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"required": ["a"], "properties": {"a": {"$ref": "#/$defs/a"}}}}}),
    ],
    ids=str,
)
def test_what_looks_dangerous_is_compiled(wanted: StructuredOutput) -> None:
    GRAMMARS.check(wanted)


def test_a_tokenizer_of_no_known_kind_has_no_grammars() -> None:
    for make in (word_piece, metaspace_unigram, suffix_bpe, without_decoder):
        with pytest.raises(GrammarError):
            GrammarTokenizer(make().backend_tokenizer, 400)
    with pytest.raises(GrammarError, match="special"):
        GrammarTokenizer(Tokenizer(models.BPE({"a": 0}, [])), 1)
