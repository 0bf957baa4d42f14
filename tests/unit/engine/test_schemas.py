"""Schemas as clients' libraries write them: each has outputs, which are valid, or is refused by keyword and place."""

from __future__ import annotations

import datetime
import decimal
import enum
import ipaddress
import json
import random
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from openai.lib._pydantic import to_strict_json_schema
from pydantic import AnyUrl, BaseModel, Field, SecretStr, TypeAdapter

from bucketserve.engine.grammars import GrammarError
from bucketserve.engine.schemas import prepared
from bucketserve.ports import StructuredOutput
from tests.unit.engine.test_grammars import GRAMMAR, GRAMMARS, STOP, TOKENIZER, fits, schema

MAX_TOKENS = 400
CLOSING = {TOKENIZER.token_to_id(text) for text in '"}],:'}


class Color(enum.Enum):
    RED = "red"
    BLUE = "dark blue (+1)"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    kind: Literal["dog", "wolf"] = "dog"
    name: str | None = None


class Node(BaseModel):
    """Refers to itself."""

    value: int
    children: list[Node] = Field(default=[], max_length=2)


class Order(BaseModel):
    """What is usual in one."""

    number: int = Field(gt=0, description="of the order")
    color: Color
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    other: Cat | Dog | None = None
    tags: dict[str, int] = {}
    due: datetime.date | None
    sizes: tuple[int, float]
    level: Level = Level.LOW


TYPES: dict[str, Any] = {
    "order": Order,
    "discriminated": Annotated[Cat | Dog, Field(discriminator="kind")],
    "union": Cat | Dog,
    "optional": int | None,
    "primitives": int | float | str | bool,
    "enum": Color,
    "integers' enum": Level,
    "literal": Literal[1, "a", None, True],
    "dict": dict[str, int],
    "dict by enum": dict[Color, int],
    "dict by literal": dict[Literal["a", 'b"'], Cat],
    "dict by pattern": dict[Annotated[str, Field(pattern="^[a-z]{1,3}$")], int],
    "recursive": Node,
    "list of unions": list[int | str],
    "bounded list": Annotated[list[int], Field(min_length=1, max_length=3)],
    "tuple": tuple[int, str],
    "tuple of any length": tuple[bool, ...],
    "date": datetime.date,
    "datetime": datetime.datetime,
    "time": datetime.time,
    "duration": datetime.timedelta,
    "uuid": uuid.UUID,
    "decimal": decimal.Decimal,
    "float": Annotated[float, Field(gt=0, lt=1)],
    "multiple": Annotated[int, Field(multiple_of=5)],
    "text": Annotated[str, Field(pattern="^[a-z]+$", min_length=2, max_length=5)],
    "bytes": bytes,
    "path": Path,
    "secret": SecretStr,
    "url": AnyUrl,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "none": None,
}
DRAFT_7, DRAFT_2020 = "http://json-schema.org/draft-07/schema#", "https://json-schema.org/draft/2020-12/schema"
SAFE = 2**53 - 1


def closed(**properties: object) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


# What zod-to-json-schema (draft 7) and zod 4's own toJSONSchema (2020-12) write.
ZOD: dict[str, dict[str, Any]] = {
    "object": {"$schema": DRAFT_7, **closed(a={"type": "string"}, b={"type": ["string", "null"]})},
    "optional": {"$schema": DRAFT_7, **closed(a={"type": "number"}), "required": []},
    "record": {"type": "object", "additionalProperties": {"type": "number"}},
    "record, zod 4": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "null"}},
    "record by enum": {
        "type": "object",
        "propertyNames": {"type": "string", "enum": ["x", "y"]},
        "additionalProperties": {"type": "boolean"},
    },
    "record by pattern": {
        "type": "object",
        "propertyNames": {"type": "string", "pattern": "^[a-z]{1,3}$"},
        "additionalProperties": {"type": "boolean"},
    },
    "tuple": {
        "$schema": DRAFT_7,
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
        "items": [{"type": "string"}, {"type": "boolean"}],
    },
    "tuple, zod 4": {"$schema": DRAFT_2020, "type": "array", "prefixItems": [{"type": "string"}], "items": False},
    "discriminated": {"anyOf": [closed(k={"type": "string", "const": each}) for each in "ab"]},
    "discriminated, zod 4": {"oneOf": [closed(k={"type": "string", "const": each}) for each in "ab"]},
    "literals": {"type": ["string", "number"], "enum": ["a", 1]},
    "integer": {"$schema": DRAFT_2020, **closed(a={"type": "integer", "minimum": -SAFE, "maximum": SAFE})},
    "positive": {"type": "integer", "exclusiveMinimum": 0},
    "email": {"type": "string", "format": "email"},
    "date": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid", "pattern": "^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f-]{17}$"},
    "any": closed(a={}),
    "default": closed(a={"default": "x", "type": "string", "description": "y"}),
    "recursive": {
        "$ref": "#/definitions/n",
        "$schema": DRAFT_7,
        "definitions": {"n": {**closed(next={"anyOf": [{"$ref": "#/definitions/n"}, {"type": "null"}]})}},
    },
    "recursive, zod 4": closed(next={"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
    "intersection": {"allOf": [{**closed(a={"type": "null"}), "additionalProperties": True}, {"required": ["b"]}]},
}
PAYMENT = {
    "type": "object", "additionalProperties": False,
    "properties": {"by": {"enum": ["card", "cash"]}, "number": {"type": "integer"}},
}  # fmt: skip
SCHEMAS: dict[str, Any] = {
    **{f"pydantic: {name}": TypeAdapter(kind).json_schema() for name, kind in TYPES.items()},
    **{f"OpenAI's parse: {kind.__name__}": to_strict_json_schema(kind) for kind in (Cat, Dog, Node)},
    **{f"zod: {name}": value for name, value in ZOD.items()},
    "set of an enum": {
        "type": "array",
        "items": {"$ref": "#/$defs/Color"},
        "minItems": 1,
        "uniqueItems": True,
        "$defs": {"Color": {"enum": ["r", "g", 1, True]}},
    },
    "set of an enum, draft 7": {
        "$schema": DRAFT_7,
        "type": "array",
        "items": {"enum": ["r", "g"]},
        "uniqueItems": True,
    },
    "tuple with a word of old": {
        "type": "array",
        "prefixItems": [{"type": "string"}],
        "additionalItems": False,
        "minItems": 1,
        "maxItems": 2,
    },
    "bag": {"type": "array", "items": {"type": "null"}, "uniqueItems": False},
    "at most one": {"type": "array", "items": {"type": "integer"}, "maxItems": 1, "uniqueItems": True},
    "never there": {"type": "object", "properties": {"a": {"not": {}}, "b": {"type": "null"}}, "required": ["b"]},
    "not null": {"type": ["null", "integer", "boolean"], "not": {"type": "null"}},
    "not these": {"enum": ["a", "b", True, 1], "not": {"enum": ["a", 1]}},
    "not both": {"type": "object", "properties": {n: {"type": "null"} for n in "ab"}, "not": {"required": ["a", "b"]}},
    "if": {
        **PAYMENT,
        "if": {"properties": {"by": {"const": "card"}}},
        "then": {"required": ["number"]},
        "else": {"properties": {"number": False}},
    },
    "if it is there": {
        **PAYMENT,
        "if": {"properties": {"by": {"const": "card"}}, "required": ["by"]},
        "then": {"required": ["number"]},
    },
    "one of many": {
        "type": "object",
        "properties": {"k": {"enum": [f"k{i}" for i in range(9)]}, "v": {}},
        "required": ["k", "v"],
        "allOf": [
            {"if": {"properties": {"k": {"const": f"k{i}"}}}, "then": {"properties": {"v": {"const": i}}}}
            for i in range(8)
        ],
    },
    "OpenAPI: told apart by properties": {
        "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}, {"const": "none"}],
        "$defs": {"A": closed(a={"type": "integer"}), "B": closed(b={"type": "integer"})},
    },
    "OpenAPI: discriminated": {
        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
        "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat"}},
        "$defs": {each.__name__: each.model_json_schema() for each in (Cat, Dog)},
    },
}


def written(wanted: StructuredOutput, seed: int) -> str | None:
    """An output by a model that knows nothing but likes to end; None if it is too long."""
    draw, tokens = random.Random(seed), list[int]()
    matcher = GRAMMARS.matcher(wanted, ())
    while len(tokens) < MAX_TOKENS:
        mask = matcher.mask([STOP])
        allowed = [i for i in range(8 * len(mask)) if mask[i >> 3] & 1 << (i & 7)]
        if not allowed or STOP in allowed:
            return str(TOKENIZER.decode(tokens, skip_special_tokens=False))
        closing = [token for token in allowed if token in CLOSING]
        tokens.append(draw.choice(closing if closing and draw.random() < 0.7 else allowed))
        matcher.take(tokens[-1])
    return None


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_libraries_write_has_outputs_which_are_valid(name: str) -> None:
    wanted = schema(SCHEMAS[name])
    GRAMMARS.check(wanted)
    texts = [text for seed in range(6) if (text := written(wanted, seed)) is not None]
    assert texts
    kind = TypeAdapter(TYPES[name.partition(": ")[2]]) if name.startswith("pydantic") else None
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMAS[name])
        if kind is not None and name.partition(": ")[2] in ("order", "discriminated", "recursive", "dict by enum"):
            kind.validate_json(text)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("pydantic: discriminated", ['{"kind":"wolf"}', '{"kind":"cat","lives":9}'], ["{}", '{"lives":9}']),
        ("pydantic: dict by enum", ["{}", '{"dark blue (+1)":1,"red":2}'], ['{"blue":1}', '{"red":"x"}']),
        ("pydantic: dict by literal", ['{"b\\"":{"lives":1}}'], ['{"b":{"lives":1}}', '{"a":1}']),
        ("zod: record by pattern", ['{"abc":true}'], ['{"abcd":true}', '{"A":true}', '{"a":1}']),
        ("zod: record, zod 4", ['{"whatever":null}'], ['{"a":1}']),
        ("set of an enum", ['["r"]', '["g",true,1,"r"]'], ["[]", '["r","r"]', "[1,true,1]"]),
        ("set of an enum, draft 7", ["[]", '["g","r"]'], ['["r","r"]', '["b"]']),
        ("tuple with a word of old", ['["a"]', '["a",1]'], ["[1]", "[]"]),
        ("bag", ["[null,null]"], ["[1]"]),
        ("at most one", ["[]", "[12]"], ["[1,2]"]),
        ("never there", ['{"b":null}', '{"b":null,"c":1}'], ['{"a":1,"b":null}']),
        ("not null", ["1", "true"], ["null", '"a"']),
        ("not these", ['"b"', "true"], ['"a"', "1"]),
        ("not both", ["{}", '{"a":null}', '{"b":null}'], ['{"a":null,"b":null}']),
        (
            "if",
            ['{"by":"card","number":1}', '{"number":1}', '{"by":"cash"}'],
            ["{}", '{"by":"card"}', '{"by":"cash","number":1}'],
        ),
        ("if it is there", ["{}", '{"by":"cash"}', '{"by":"cash","number":1}', '{"number":1}'], ['{"by":"card"}']),
        ("one of many", ['{"k":"k3","v":3}', '{"k":"k8","v":"x"}'], ['{"k":"k3","v":4}', '{"k":"k3"}']),
        ("OpenAPI: told apart by properties", ['{"a":1}', '{"b":1}', '"none"'], ["{}", '{"a":1,"b":1}']),
    ],
)
def test_other_words_mean_the_same(name: str, good: list[str], bad: list[str]) -> None:
    assert all(fits(schema(SCHEMAS[name]), text) for text in good)
    assert not any(fits(schema(SCHEMAS[name]), text) for text in bad)


INNER = {"type": "array", "items": {"type": "integer"}}
REFUSED: dict[str, tuple[Any, str]] = {
    "set": (TypeAdapter(dict[str, set[int]]).json_schema(), "uniqueItems at #/additionalProperties"),
    "in a definition": (
        closed(a={"$ref": "#/$defs/x"}) | {"$defs": {"x": {"not": {"minLength": 1}}}}, "not at #/$defs/x",
    ),
    "not": (closed(a={"not": {"type": "integer"}}), "not at #/properties/a "),
    "if": ({"anyOf": [{"type": "null"}, {"if": {}, "then": {"type": "string"}}]}, "if at #/anyOf/1 "),
    "two of many": (
        {"type": "object", "properties": {name: {"type": "boolean"} for name in "ab"}, "required": ["a", "b"],
         "allOf": [{"if": {"properties": {name: {"const": True}}}, "then": {"minProperties": 1}} for name in "ab"]},
        "if at #/allOf/0 ",
    ),
    "inside of what is said otherwise": (
        {"oneOf": [{"type": "null"}, closed(a={"not": {"pattern": "a"}})]}, "not at #/oneOf/1/properties/a ",
    ),
    "dependent": (closed(a={"dependentRequired": {"a": ["b"]}}), "dependentRequired at #/properties/a "),
    "contains": ({"type": "array", "contains": {"type": "null"}}, "contains at # "),
    "strict intersection": ({"allOf": [{"type": "object"}], "unevaluatedProperties": False}, "unevaluatedProperties"),
    "names": ({"type": "object", "propertyNames": {"minLength": 2}}, "propertyNames at # "),
    "names beside properties": ({**closed(a={}), "propertyNames": {"pattern": "a"}}, "propertyNames at # "),
    "overlap": (closed(a=closed(b={"oneOf": [{"type": "integer"}, {"type": "number"}]})),
                "oneOf at #/properties/a/properties/b "),
    "inner overlap": (
        {"oneOf": [closed(k={"const": 1}, v={"oneOf": [{"type": "number"}, {"type": "integer"}]}), {"type": "null"}]},
        "oneOf at #/oneOf/0/properties/v ",
    ),
    "format": (TypeAdapter(list[ipaddress.IPv4Network]).json_schema(), "format ipv4network at #/items "),
    "look-ahead of zod 4's email": (
        closed(a={"type": "string", "format": "email", "pattern": r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)@[a-z]+$"}),
        "pattern at #/properties/a is not supported: look-around",
    ),
    "an expression beside an empty one": (
        closed(a={"type": "string", "pattern": ""}, b={"type": "string", "pattern": "(?=x)y"}),
        "pattern at #/properties/b is not supported: look-around",
    ),
    "names by an escaped reference": (
        {"type": "object", "propertyNames": {"$ref": "#/$defs/a~1b"}, "$defs": {"a~1b": {}, "a/b": {"const": "x"}}},
        "propertyNames at # ",
    ),
    "names that may repeat": (
        TypeAdapter(Annotated[dict[str, int], Field(min_length=2)]).json_schema(), "minProperties at # ",
    ),
    "its own name inside": (
        {"type": "string", "$id": "http://x/y", "$defs": {"a": {"$id": "y#"}}}, "$id at #/$defs/a ",
    ),
    "the empty name": ({"type": "string", "$defs": {"a": {"$id": "#"}}}, "$id at #/$defs/a "),
    "its own name, draft 4": (
        {"$schema": "http://json-schema.org/draft-04/schema#", "type": "string", "id": "http://x/y",
         "definitions": {"a": {"id": "http://X/y"}}},
        "id at #/definitions/a ",
    ),
    "name to be escaped": (closed(**{"a/b~\n\x00": {"not": {"minimum": 1}}}), "not at #/properties/a~1b~0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_with_its_place(name: str) -> None:
    value, words = REFUSED[name]
    with pytest.raises(GrammarError) as caught:
        GRAMMARS.check(schema(value))
    assert str(caught.value).startswith(words), caught.value
    assert len(str(caught.value)) <= 200 and str(caught.value).isprintable()


def test_a_schema_in_a_grammar_is_named_as_well() -> None:
    text = f'start: "a" a | b\na: %json {json.dumps(INNER)}\nb: %json {json.dumps({**INNER, "uniqueItems": True})}'
    with pytest.raises(GrammarError, match=r"^uniqueItems at # is not supported$"):
        GRAMMARS.check(StructuredOutput(GRAMMAR, text))


@pytest.mark.parametrize("value", ["5", "null", "true", '"x"', "[1]"])
def test_what_is_no_schema_in_a_grammar_is_refused_whatever_stands_beside_it(value: str) -> None:
    with pytest.raises(GrammarError):
        GRAMMARS.check(StructuredOutput(GRAMMAR, f"start: %json {value} oneOf"))


@pytest.mark.parametrize(
    "value",
    [
        {"discriminator": {"propertyName": 5}, "oneOf": 5},
        {"discriminator": [], "oneOf": [], "required": "x"},
        {"propertyNames": {"enum": [1]}},
        {"propertyNames": {"enum": "abc"}},
        {"propertyNames": {"$ref": "#/$defs/x"}, "$defs": []},
        {"propertyNames": {"$ref": "#/$defs/x"}, "$defs": {"x": {"$ref": "#/$defs/x"}}},
        {"properties": [], "patternProperties": 5, "allOf": {}, "items": 3, "format": ["x"], "pattern": 5},
        {"format": {"a": 1}},
        [[]],
        None,
    ],
    ids=str,
)
def test_nonsense_stays_what_it_is(value: object) -> None:
    assert prepared(json.dumps(value)) == json.dumps(value)
    with pytest.raises(GrammarError):
        GRAMMARS.check(schema(value))


@pytest.mark.parametrize(
    "value",
    [
        {"const": 1, "enum": [2], "not": {"const": 3}},
        *(
            {
                "type": "object",
                "properties": {"k": {"enum": ["x", "y"]}},
                "required": ["k"],
                "if": {"properties": {"k": {"const": "x", **never}}, "required": ["k"]},
                "then": {"required": ["v"]},
                "else": {"required": ["w"]},
            }
            for never in ({"type": "integer"}, {"enum": ["y"]}, {"enum": ["x", "y"]})
        ),
    ],
    ids=json.dumps,
)
def test_what_contradicts_itself_is_not_said_otherwise(value: object) -> None:
    assert prepared(json.dumps(value)) == json.dumps(value)


def test_alternatives_that_are_made_of_themselves_are_not_looked_at_without_end() -> None:
    of_itself = {
        name: {"type": "object", "required": ["x"], "properties": {"x": {"$ref": f"#/$defs/{name}"}}} for name in "AB"
    }
    text = json.dumps({"$defs": of_itself, "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]})
    assert prepared(text) == text


def test_names_of_properties_may_be_nothing_at_all() -> None:
    assert fits(schema({"type": "object", "propertyNames": {"enum": []}}), "{}")
    assert not fits(schema({"type": "object", "propertyNames": {"enum": []}}), '{"":1}')
    many = {"type": "object", "propertyNames": {"enum": [f"n{i}" for i in range(300)]}}
    inner: object = {"type": "null"}
    for _ in range(5):
        inner = {**many, "additionalProperties": inner}
    # Not 300 times for each level.
    assert len(prepared(json.dumps(inner))) < 3 * len(json.dumps(inner))


def drawn(draw: random.Random, depth: int) -> dict[str, Any]:
    """A schema of keywords that are said otherwise, where that is possible and where it is not."""
    few = ["a", "b", 1, True, None]
    plain: list[dict[str, Any]] = [
        {"const": draw.choice(few)},
        {"enum": draw.sample(few, 3)},
        {"type": draw.choice(["string", "integer", "number", "boolean", "null"])},
        {"type": draw.sample(["string", "integer", "number", "null"], 2)},
        {"$ref": "#/$defs/d"},
        {},
    ]
    if depth == 0 or draw.random() < 0.2:
        return draw.choice(plain)
    kind = draw.randrange(4)
    if kind == 0:
        return {"oneOf": [drawn(draw, depth - 1) for _ in range(draw.randint(1, 3))]}
    if kind == 1:
        return {**draw.choice(plain), "not": draw.choice([*plain, {"required": ["a"]}, True, False])}
    if kind == 2:
        return {"items": draw.choice(plain), "uniqueItems": True, "maxItems": draw.randint(0, 3)}
    names = draw.sample("abc", 2)
    found = {"type": "object", "properties": {n: drawn(draw, depth - 1) for n in names}, "required": names[:1]}
    also: list[dict[str, Any]] = [{} for _ in range(draw.randint(0, 2))]
    for holder in draw.choice([[found], also, [found, *also]]):
        wanted: dict[str, Any] = {"properties": {draw.choice(names): draw.choice(plain)}}
        holder["if"] = wanted | draw.choice([{}, {"required": [*wanted["properties"]]}])
        holder.update({key: drawn(draw, depth - 1) for key in draw.sample(["then", "else"], draw.randint(0, 2))})
    return {**found, "allOf": also, **draw.choice([{}, {"additionalProperties": False}, {"not": {"required": names}}])}


def value(draw: random.Random, depth: int) -> object:
    if depth and draw.random() < 0.5:
        return {name: value(draw, depth - 1) for name in draw.sample("abc", draw.randint(0, 3))}
    if depth and draw.random() < 0.3:
        return draw.choices(["a", "b", 1, True, None], k=draw.randint(0, 3))
    return draw.choice(["a", "b", "c", 1, 2, True, False, None, 1.5])


def test_what_is_said_otherwise_means_the_same_for_any_schema_and_value() -> None:
    draw, num_changed = random.Random(1), 0
    for _ in range(1500):
        definition = draw.choice([{"enum": ["a", "b"]}, {"type": "boolean"}, closed(a={"const": "a"})])
        written = {**drawn(draw, 3), "$defs": {"d": definition}}
        said = json.loads(prepared(json.dumps(written)))
        if said == written:
            continue
        num_changed += 1
        mine, its = (jsonschema.Draft202012Validator(each) for each in (written, said))
        for each in (value(draw, 2) for _ in range(15)):
            assert mine.is_valid(each) == its.is_valid(each), (written, said, each)
    assert num_changed > 300
