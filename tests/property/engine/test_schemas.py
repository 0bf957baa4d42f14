"""Whatever schema there is: what is written by it is valid by it, in the words of its writer, or it is refused."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bucketserve.engine.grammars import GrammarError
from tests.unit.engine.test_grammars import GRAMMARS, schema
from tests.unit.engine.test_schemas import written

NAMES = st.sampled_from(["a", "b", "kind", "x y", 'q"', "é\n"])
VALUES = st.sampled_from([None, True, 1, -3, 2.5, "a", "b", "", [], {}, [1], {"a": 1}])
TYPES = ["object", "array", "string", "integer", "number", "null", "boolean", ["string", "null"], ["object", "array"]]
OF_NAMES = st.lists(NAMES, max_size=3, unique=True).map(lambda names: {"enum": names}) | st.sampled_from(
    [{"type": "string", "pattern": pattern} for pattern in ("^a", "b$", "^[a-z]+$")]
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    some = st.lists(inner, min_size=1, max_size=3)
    keywords = {
        "type": st.sampled_from(TYPES),
        "properties": st.dictionaries(NAMES, inner, max_size=3),
        "required": st.lists(NAMES, max_size=2, unique=True),
        "patternProperties": st.dictionaries(st.sampled_from(["^a", "b"]), inner, max_size=2),
        "propertyNames": inner | OF_NAMES,
        "enum": st.lists(VALUES, min_size=1, max_size=3),
        "minItems": st.integers(0, 2),
        "maxItems": st.integers(0, 3),
        "minLength": st.integers(0, 2),
        "maxLength": st.integers(0, 4),
        "minimum": st.integers(-3, 3),
        "maximum": st.integers(-3, 5),
        "pattern": st.sampled_from(["^a+$", "b"]),
        "format": st.sampled_from(["date", "binary", "path", "x"]),
        "discriminator": st.just({"propertyName": "kind"}),
        "uniqueItems": st.booleans(),
        "$ref": st.sampled_from(["#", "#/$defs/d"]),
        "$defs": st.fixed_dictionaries({"d": inner}),
        **dict.fromkeys(("const", "default"), VALUES),
        **dict.fromkeys(("additionalProperties", "items", "not"), inner),
        **dict.fromkeys(("prefixItems", "anyOf", "oneOf", "allOf"), some),
    }
    return st.fixed_dictionaries({}, optional=keywords)


@settings(max_examples=200)
@given(objects(st.recursive(st.booleans(), objects, max_leaves=5)), st.integers(0, 2**32))
def test_what_is_written_by_a_schema_is_valid_by_it(value: dict[str, Any], seed: int) -> None:
    wanted = schema(value)
    try:
        GRAMMARS.check(wanted)
    except GrammarError as error:
        assert 0 < len(str(error)) <= 200 and str(error).isprintable()
        return
    try:
        text = written(wanted, seed)
    except GrammarError:
        # Too complex after some tokens.
        return
    assume(text is not None)
    try:
        jsonschema.Draft202012Validator(value).validate(json.loads(text or ""))
    except RecursionError:
        # One that refers to itself is valid for whoever has the time.
        return
