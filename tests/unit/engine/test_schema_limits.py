"""What would be compiled without end is refused before it is begun; what is served keeps to what the schema says."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from bucketserve.engine import schema_limits
from bucketserve.engine.grammars import GrammarError
from bucketserve.engine.schema_limits import refusal
from bucketserve.engine.schemas import prepared
from bucketserve.ports import StructuredOutput
from tests.unit.engine.test_grammars import GRAMMAR, GRAMMARS, fits, schema

LETTERS = "abcdefghijklmnopqrst"
PATTERNS = [{"type": "string", "pattern": f".*{letter}.*"} for letter in LETTERS]
DIVISORS = [{"type": "integer", "multipleOf": number} for number in (101, 103, 107)]
CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}", **PATTERNS[i]} for i in range(20)} | {"d20": {}}


def within(name: str, schemas: list[Any]) -> dict[str, Any]:
    """All of the schemas at once for what is at one place."""
    return {"allOf": [{name: {"a": each} if name == "properties" else each} for each in schemas]}


ENDLESS: dict[str, dict[str, Any]] = {
    "divisor": {"type": "integer", "multipleOf": 98765431},
    "power of two": {"type": "integer", "multipleOf": 2**20},
    "fractions": {"type": "integer", "multipleOf": 123.4567},
    "divisors": {"type": "integer", "allOf": DIVISORS},
    "many divisors": {"properties": {f"p{i}": {"type": "integer", "multipleOf": 10_001 + i} for i in range(300)}},
    "expressions": {"type": "string", "allOf": PATTERNS},
    "choices of expressions": {"allOf": [{"anyOf": PATTERNS[i : i + 5]} for i in range(0, 20, 5)]},
    "chain": {"$ref": "#/$defs/d0", "$defs": CHAIN},
    "chain by anchors": {
        "$ref": "#d0",
        "$defs": {f"d{i}": {**PATTERNS[i], "$anchor": f"d{i}", "$ref": f"#d{i + 1}"} for i in range(20)},
    },
    "properties": within("properties", PATTERNS),
    "divisors of properties": within("properties", DIVISORS),
    "divisors of items": within("items", DIVISORS),
    "divisors of further properties": within("additionalProperties", DIVISORS),
    "choice beside properties": {
        "properties": {"a": {"type": "integer", "multipleOf": 401}},
        "anyOf": [{"properties": {"a": {"multipleOf": 503}}}, {"type": "null"}],
    },
    "condition": {
        "type": "object",
        "properties": {"k": {"enum": ["x", "y"]}, "a": {"type": "integer", "multipleOf": 401}},
        "required": ["k"],
        "if": {"properties": {"k": {"const": "x"}}},
        "then": {"properties": {"a": {"multipleOf": 503}}},
    },
    "where only a reference leads": {"$ref": "#/x/0", "x": [{"type": "integer", "multipleOf": 98765431}]},
    "through another document": {
        "$ref": "a",
        "$defs": {
            "a": {"$id": "a", "$ref": "#/$defs/b", "multipleOf": 401, "$defs": {"b": {"multipleOf": 503}}},
            "b": {"type": "integer"},
        },
    },
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_would_be_compiled_without_end_is_refused(name: str) -> None:
    # Not by compiling it: whoever lets it through has this wait for minutes and take gigabytes.
    assert refusal(prepared(json.dumps(ENDLESS[name])))


@pytest.mark.parametrize(
    "wanted",
    [
        schema(ENDLESS["divisor"]),
        StructuredOutput(schema(0).kind, '{"type": "integer", "multiple\\u004ff": 98765431}'),
        StructuredOutput(GRAMMAR, f"start: a\na: %json\n {json.dumps(ENDLESS['divisor'])}"),
        StructuredOutput(GRAMMAR, f"start: %json {json.dumps({'x-note': '%json 1', **ENDLESS['divisor']})}"),
    ],
)
def test_it_is_refused_wherever_it_is_asked_for(wanted: StructuredOutput) -> None:
    with pytest.raises(GrammarError, match=r"^multipleOf, pattern or format at # is not supported"):
        GRAMMARS.check(wanted)


SERVED: dict[str, dict[str, Any]] = {
    "cents": {"type": "number", "multipleOf": 0.01},
    "hundreds": {"type": "integer", "multipleOf": 1e9},
    "divisors": {"type": "integer", "allOf": [{"multipleOf": 7}, {"multipleOf": 11}]},
    "expressions": {"type": "string", "allOf": [{"pattern": each} for each in ("[A-Z]", "[a-z]", "[0-9]", "^.{3,}$")]},
    "properties": {
        "type": "object",
        "properties": {letter: each for letter, each in zip(LETTERS, PATTERNS, strict=True)},
    },
    "one expression often": within("properties", [{"type": "string", "pattern": "^a+$"}] * 20),
    "alternatives": {"anyOf": PATTERNS},
    "with a title": {"$ref": "#/$defs/d", "title": "x", "$defs": {"d": {"anyOf": PATTERNS}}},
    "data": {
        "type": "object",
        "properties": {"default": {"type": "string", "default": "x"}, "a": {"allOf": PATTERNS[:2]}},
        "examples": [{"id": "a", "minProperties": 3, "default": {"$id": ""}}, *PATTERNS],
    },
    "one property beside those required": {"type": "object", "minProperties": 2, "required": ["a"]},
    "URIs of its own": {"$id": "http://x/y", "type": "integer", "$defs": {"a": {"$id": "z"}, "b": {"$id": "#b"}}},
    "properties of these names": {
        "type": "object",
        "properties": {each: {"type": "integer"} for each in ("multipleOf", "minProperties", "$id", "id", "pattern")},
    },
}


@pytest.mark.parametrize("name", SERVED)
def test_what_can_be_compiled_is_served(name: str) -> None:
    GRAMMARS.check(schema(SERVED[name]))


def test_what_is_served_is_kept_to() -> None:
    assert fits(schema(SERVED["divisors"]), "154") and not fits(schema(SERVED["divisors"]), "155")
    assert fits(schema(SERVED["expressions"]), '"aB3"') and not fits(schema(SERVED["expressions"]), '"ab3"')


def test_a_document_of_many_references_is_not_looked_through_without_end() -> None:
    met = {f"p{i}": {"$ref": "#/$defs/a", "items": {}} for i in range(2000)}
    document = {"properties": met, "$defs": {"a": {"properties": {f"q{i}": {"pattern": "a"} for i in range(500)}}}}
    assert refusal(json.dumps(document))


def test_a_long_list_behind_many_references_is_not_looked_through_without_end() -> None:
    met = {f"p{i}": {"$ref": "#/$defs/a", "items": {}} for i in range(1000)}
    document = {"properties": met, "$defs": {"a": {"pattern": "a", "enum": ["b"] * 2000}}}
    assert refusal(json.dumps(document))


def test_a_document_in_which_references_mean_something_else_is_looked_through_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number = [0]
    states = schema_limits._states

    def counted(node: dict[str, Any]) -> int:
        number[0] += 1
        return states(node)

    monkeypatch.setattr(schema_limits, "_states", counted)
    met = [{"allOf": [{}, {}]} for _ in range(1000)]
    refusal(json.dumps({"x": met, "pattern": "a", "items": {"id": "b"}}))
    assert number[0] < 10_000


def test_places_take_little_memory_however_long_names_are() -> None:
    document = json.dumps({"properties": {"p" * 30_000: {"anyOf": [{"pattern": "a"}] * 1500}}})
    tracemalloc.start()
    try:
        refusal(document)
        prepared(document)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # All of its places in full are 45 MB.
    assert peak < 8 << 20


@pytest.mark.parametrize(
    "value", [None, True, -1, 0, 1e400, float("nan"), "x", [], [{}], {"a": {}}, {"$ref": {}}, ["~"]]
)
def test_nonsense_is_left_to_the_compiler(value: object) -> None:
    for name in ("multipleOf", "pattern", "$id", "required", "allOf", "anyOf", "$ref", "properties"):
        refusal(json.dumps({name: value, "pattern": "a", "anyOf": [{}]}))
        refusal(json.dumps({"items": {name: value, "pattern": "a", "items": {}}, "allOf": value}))
    refusal(json.dumps({"minProperties": value, "required": value}))
    refusal(json.dumps(value))
