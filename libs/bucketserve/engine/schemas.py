"""JSON schemas as clients' libraries write them: what llguidance knows by other words, and where what it refuses is.

Nothing that a schema forbids is let through: what is put into other words means the same, and what is left out means
nothing.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["escaped", "place_of", "prepared", "schemas_in"]

FREE_FORMATS = ("binary", "password", "path")
"""Formats of pydantic and OpenAPI that any string has."""
ANNOTATIONS = {"title", "description"}
_ONE = (
    *("items", "additionalItems", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else"),
    *("unevaluatedItems", "unevaluatedProperties"),
)
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

MAX_TRIED = 4
"""Alternatives that are compiled alone to find those that overlap."""
OVERLAP = "alternatives may overlap; use anyOf, or a required property with another const in each"
MAX_WORDS = 4_000
"""Comparisons of alternatives, orders of values, and properties in cases: what needs more is left as it is."""
MAX_NAMES = 64
"""Names and values of a schema that are looked at to see what it excludes."""
MAX_UNIQUE = 4
"""Values of which each may be there once: all their orders are said, which are 65."""
MAX_DEPTH = 16
"""Properties of properties that are looked at to tell alternatives apart: their types may be recursive."""
MAX_STEPS = 8
"""From one reference to the next."""
ANY_TYPE = frozenset(("array", "boolean", "integer", "null", "number", "object", "string"))
TYPE_OF = {bool: "boolean", int: "integer", str: "string", type(None): "null"}
CONDITION = ("if", "then", "else")
SHOWN_CHARACTERS = 40
"""The compiler's words have at least the beginning of an expression."""

SHOWN_NAME = 128
"""Characters of a name in a place that is told."""

Schema = dict[str, Any]


def place_of(text: str, words: str, has_overlap: Callable[[str], bool]) -> str:
    """Returns which keyword of a schema is refused, and where; empty if that can't be told.

    Args:
        text: the schema.
        words: the compiler's.
        has_overlap: whether a schema is refused because alternatives of it may overlap.
    """
    try:
        root = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    found, _ = _prepare(root)
    if not found:
        return ""
    unknown = re.search(r"Unimplemented keys: \[([^\]]*)", words)
    for key in re.findall(r'"([^"]+)"', unknown[1]) if unknown else ():
        for pointer, schema in found:
            if key in schema:
                return f"{key} at {pointer} is not supported"
    if unknown := re.search(r"Unknown format: (\S+)", words):
        for pointer, schema in found:
            if schema.get("format") == unknown[1]:
                return f"format {unknown[1]} at {pointer} is not supported"
    if "regex" in words:
        return _expression(found, words)
    if "oneOf" in words:
        outside = {name: root[name] for name in ("$defs", "definitions") if name in root}
        alternatives = [(pointer, schema) for pointer, schema in found if "oneOf" in schema]
        # The innermost ones are refused by themselves.
        for pointer, schema in alternatives[: -MAX_TRIED - 1 : -1]:
            if len(alternatives) == 1 or has_overlap(json.dumps({**schema, **outside})):
                return f"oneOf at {pointer} is not supported: {OVERLAP}"
    return ""


def subschemas(root: Any) -> Iterator[tuple[str, Schema]]:
    """Yields each schema that is an object, inner ones after those that they are in, with its JSON pointer."""
    # No recursion: how deep it is its writer decides.
    waiting: list[tuple[str, Any]] = [("#", root)]
    while waiting:
        pointer, schema = waiting.pop()
        if not isinstance(schema, dict):
            continue
        inner = [(name, schema[name]) for name in _ONE if isinstance(schema.get(name), dict)]
        for name in _MANY:
            if isinstance(found := schema.get(name), list):
                inner += [(f"{name}/{i}", each) for i, each in enumerate(found)]
        for name in _NAMED:
            if isinstance(found := schema.get(name), dict):
                inner += [(f"{name}/{escaped(key)}", each) for key, each in found.items()]
        waiting += [(f"{pointer}/{step}", each) for step, each in reversed(inner)]
        # Whoever says it in other words says those in it where they were written.
        yield pointer, schema


def escaped(name: str) -> str:
    """Returns a name as a step of a JSON pointer; of a long one its beginning, since there may be many pointers."""
    return name[:SHOWN_NAME].replace("~", "~0").replace("/", "~1")


def prepared(text: str) -> str:
    """Returns a schema in words that llguidance knows; as it is, if it is none."""
    try:
        root = json.loads(text)
    except (ValueError, RecursionError):
        return text
    _, is_changed = _prepare(root)
    try:
        return json.dumps(root) if is_changed else text
    except RecursionError:
        return text


def _prepare(root: Any) -> tuple[list[tuple[str, Schema]], bool]:
    """Puts a schema into other words; returns those in it, with pointers as they were written, and if any changed."""
    found, is_changed, words = [], False, iter(range(MAX_WORDS))
    for pointer, schema in subschemas(root):
        found.append((pointer, schema))
        # One after the other.
        changes = [_discriminate(schema), _one_of(schema, root, words), _name(schema, root), _free(schema)]
        changes.append(_tuple(schema))
        is_changed |= any([*changes, _unique(schema, root, words), _not(schema), _if(schema, root, words)])
    return found, is_changed


def schemas_in(grammar: str) -> Iterator[str]:
    """Yields the schemas in a grammar of the library's, and what only looks like one."""
    # No split: a schema may have the word in a text of its own.
    for found in re.finditer(r"%json\s*", grammar):
        try:
            _, end = json.JSONDecoder().raw_decode(grammar, found.end())
        except (ValueError, RecursionError):
            continue
        yield grammar[found.end() : end]


def _expression(found: list[tuple[str, Schema]], words: str) -> str:
    """Returns which of the schemas has the expression that the compiler's words are of."""
    for pointer, schema in found:
        named = schema.get("patternProperties")
        patterns = [("patternProperties", each) for each in named] if isinstance(named, dict) else []
        for key, pattern in [("pattern", schema.get("pattern")), *patterns]:
            shown = " ".join(pattern.split())[:SHOWN_CHARACTERS] if isinstance(pattern, str) else ""
            if shown and shown in words:
                return f"{key} at {pointer} is not supported: {words.rpartition('error: ')[2]}"
    return ""


def _discriminate(schema: Schema) -> bool:
    """Has what tells alternatives apart be there: OpenAPI says so, where a model's default leaves it out."""
    discriminator, required = schema.get("discriminator"), schema.get("required", [])
    name = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    if "oneOf" not in schema or not isinstance(name, str) or not isinstance(required, list) or name in required:
        return False
    schema["required"] = [*required, name]
    return True


def _name(schema: Schema, root: Any) -> bool:
    """Says of what names properties have by the properties themselves, where it says all of them."""
    names = schema.get("propertyNames")
    if isinstance(names, dict) and isinstance(names.get("$ref"), str) and not names.keys() - {"$ref", *ANNOTATIONS}:
        names = _referred(root, names["$ref"])
    if names is True:
        names = {}
    if not isinstance(names, dict) or names.get("type", "string") != "string":
        return False
    told = names.keys() - {"type", *ANNOTATIONS}
    values = schema.get("additionalProperties", True)
    if told and ("properties" in schema or "patternProperties" in schema):
        return False
    if told in ({"const"}, {"enum"}):
        allowed = names["enum"] if told == {"enum"} else [names["const"]]
        if not isinstance(allowed, list) or not all(isinstance(each, str) for each in allowed):
            return False
        # One expression rather than properties: their values' schema would be there once for each.
        if allowed:
            schema["patternProperties"] = {f"^({'|'.join(map(_literal, allowed))})$": values}
        schema["additionalProperties"] = False
    elif told == {"pattern"} and isinstance(names["pattern"], str):
        schema["patternProperties"] = {names["pattern"]: values}
        schema["additionalProperties"] = False
    elif told:
        return False
    del schema["propertyNames"]
    return True


def _one_of(schema: Schema, root: Any, words: Iterator[int]) -> bool:
    """Says "any of" where no two alternatives can be had at once."""
    found = schema.get("oneOf")
    if not isinstance(found, list) or not found or "anyOf" in schema:
        return False
    if not all(_are_disjoint(a, b, root, words) for a, b in itertools.combinations(found, 2)):
        return False
    schema["anyOf"] = schema.pop("oneOf")
    return True


def _are_disjoint(a: Any, b: Any, root: Any, words: Iterator[int], depth: int = 0) -> bool:
    """Whether it can be seen that nothing fits both: by values, types or properties, of which some have their own."""
    a, b = _resolved(a, root), _resolved(b, root)
    if depth > MAX_DEPTH or next(words, None) is None or not isinstance(a, dict) or not isinstance(b, dict):
        return False
    values, others = _values(a, root), _values(b, root)
    if values is not None and others is not None:
        return not {*map(_key, values)} & {*map(_key, others)}
    types, other_types = _types_of(values, a), _types_of(others, b)
    if types and other_types and not types & other_types:
        return True
    if not types == other_types == {"object"}:
        return False
    (required, properties), (other_required, other_properties) = _shape(a), _shape(b)
    return (
        any(_are_disjoint(properties.get(n), other_properties.get(n), root, words, depth + 1)
            for n in required if n in other_required)
        or (_is_closed(b) and any(name not in other_properties for name in required))
        or (_is_closed(a) and any(name not in properties for name in other_required))
    )  # fmt: skip


def _tuple(schema: Schema) -> bool:
    """Leaves out what follows a tuple of old where there is none: the library would not look at the new one."""
    if "additionalItems" not in schema or isinstance(schema.get("items"), list):
        return False
    del schema["additionalItems"]
    return True


def _unique(schema: Schema, root: Any, words: Iterator[int]) -> bool:
    """Says of a few values all orders in which each is there once at most."""
    if "uniqueItems" not in schema:
        return False
    at_most, values = schema.get("maxItems"), _values(schema.get("items"), root)
    if schema["uniqueItems"] is True and not (type(at_most) is int and at_most <= 1):
        if values is None or len(values) > MAX_UNIQUE or not {"prefixItems", "anyOf"}.isdisjoint(schema):
            return False
        orders = [order for n in range(len(values) + 1) for order in itertools.permutations(values, n)]
        if not _are_left(words, len(orders)):
            return False
        # Until 2020-12 a tuple was said otherwise.
        first, others = ("prefixItems", "items") if _is_newest(root) else ("items", "additionalItems")
        schema["anyOf"] = [
            {first: [{"const": value} for value in order], others: False, "minItems": len(order)} for order in orders
        ]
    elif not isinstance(schema["uniqueItems"], bool):
        return False
    del schema["uniqueItems"]
    return True


def _not(schema: Schema) -> bool:
    """Says what there may be instead, where that is a few values, some types, or an object without a property."""
    if "not" not in schema:
        return False
    wrong = schema["not"]
    told = wrong.keys() - ANNOTATIONS if isinstance(wrong, dict) else None
    if wrong is True or told == set():
        schema["enum"] = []
    elif told == {"type"} and (types := _types(wrong)) and (mine := _types(schema) if "type" in schema else ANY_TYPE):
        allowed = mine - types
        if "integer" in types and "number" in allowed:
            return False
        schema["type"] = sorted(allowed - {"integer"} if "number" in allowed else allowed)
    elif told in ({"const"}, {"enum"}):
        values, others = _values(schema, None), _values(wrong, None)
        if values is None or others is None or {"const", "enum"} <= schema.keys():
            return False
        schema["enum"] = _without(values, others)
        schema.pop("const", None)
    elif told == {"required"}:
        names = _shape(wrong)[0]
        if _types(schema) != {"object"} or "anyOf" in schema or not names or names != wrong["required"]:
            return False
        schema["anyOf"] = [{"properties": {name: False}} for name in names]
    elif wrong is not False:
        return False
    del schema["not"]
    return True


def _if(schema: Schema, root: Any, words: Iterator[int]) -> bool:
    """Says each case of conditions on one property of an object, if that has one of a few values."""
    also = schema.get("allOf")
    holders = [each for each in (schema, *(also if isinstance(also, list) else [])) if isinstance(each, dict)]
    if all(holder.keys().isdisjoint(CONDITION) for holder in holders):
        return False
    conditions = [holder for holder in holders if "if" in holder and holder.keys() & {"then", "else"}]
    if conditions:
        cases = _cases(conditions, schema, root)
        if cases is None or "anyOf" in schema or not _are_left(words, len(cases) * len(_shape(schema)[1])):
            return False
        schema["anyOf"] = cases
    for holder in holders:
        for key in CONDITION:
            holder.pop(key, None)
    return True


def _cases(conditions: list[Schema], schema: Schema, root: Any) -> list[Any] | None:
    """Returns what there may be instead of conditions in a schema; None if that can't be said once each."""
    wanted = {name: each for holder in conditions for name, each in _shape(holder["if"])[1].items()}
    if len(wanted) != 1 or _types(schema) != {"object"}:
        return None
    (name,) = wanted
    mine, is_there = _values(_shape(schema)[1].get(name), root), name in _shape(schema)[0]
    if mine is None:
        return None
    # Which conditions hold, and with which values of the property.
    held: dict[tuple[bool, ...], list[Any]] = {}
    of_each = [_condition(holder["if"], name) for holder in conditions]
    for value in mine:
        held.setdefault(tuple(each is not None and _key(value) in each[0] for each in of_each), []).append(value)
    without = None if is_there else tuple(each is not None and not each[1] for each in of_each)
    cases, used = list[Any](), Counter[tuple[int, bool]]()
    for holds in held if without is None else {**held, without: None}:
        of_property = {"enum": held[holds]} if holds in held else False
        case: Schema = {"properties": {name: of_property}} | ({} if holds == without else {"required": [name]})
        parts = [(i, holds[i], conditions[i].get("then" if holds[i] else "else", True)) for i in range(len(holds))]
        parts = [part for part in parts if part[2] is not True]
        used.update((i, is_held) for i, is_held, _ in parts)
        cases.append({"allOf": [case, *(part for _, _, part in parts)]})
    # What is said more than once in each would be said without end.
    return None if None in of_each or max(used.values(), default=0) > 1 else cases


def _condition(condition: Any, name: str) -> tuple[set[Any], bool] | None:
    """Returns the values of a property with which a condition holds, and if it has to be there; None: it is another."""
    if not isinstance(condition, dict) or condition.keys() - {"properties", "required", "type", *ANNOTATIONS}:
        return None
    required, properties = _shape(condition)
    values = _values(properties.get(name), None)
    if values is None or not _are_exact(values, properties[name]):
        return None
    if condition.get("type", "object") != "object" or condition.get("required", required) != required:
        return None
    return None if set(required) - {name} else ({*map(_key, values)}, bool(required))


def _are_exact(values: list[Any], schema: Schema) -> bool:
    """Whether all of the values of a schema fit it, and it says nothing else."""
    if schema.keys() - {"const", "enum", "type", *ANNOTATIONS} or {"const", "enum"} <= schema.keys():
        return False
    return "type" not in schema or _types_of(values, schema) <= _types(schema)


def _are_left(words: Iterator[int], number: int) -> bool:
    return sum(1 for _ in itertools.islice(words, number)) == number


def _is_newest(root: Any) -> bool:
    said = root.get("$schema") if isinstance(root, dict) else None
    return not isinstance(said, str) or "2020-12" in said


def _is_closed(schema: Schema) -> bool:
    return schema.get("additionalProperties") is False and "patternProperties" not in schema


def _shape(schema: Any) -> tuple[list[str], Schema]:
    """Returns what is required of an object, and its properties, as far as that can be read."""
    required, properties = (schema.get(n) if isinstance(schema, dict) else None for n in ("required", "properties"))
    names = [name for name in required[:MAX_NAMES] if isinstance(name, str)] if isinstance(required, list) else []
    return names, properties if isinstance(properties, dict) else {}


def _types_of(values: list[Any] | None, schema: Schema) -> frozenset[str]:
    """Returns the types of a schema's values, if they are few, or those that it says."""
    return _types(schema) if values is None else frozenset(TYPE_OF[type(value)] for value in values)


def _types(schema: Schema) -> frozenset[str]:
    """Returns the types that a schema says; a number may be an integer. Empty: it says none, or some of its own."""
    said = schema.get("type")
    found = [said] if isinstance(said, str) else said
    if (
        not isinstance(found, list)
        or len(found) > len(ANY_TYPE)
        or not all(isinstance(each, str) and each in ANY_TYPE for each in found)
    ):
        return frozenset()
    return frozenset(found) | ({"integer"} if "number" in found else frozenset())


def _values(schema: Any, root: Any) -> list[Any] | None:
    """Returns values that include all that fit a schema; None if they are many, or numbers with a point."""
    schema = _resolved(schema, root)
    if not isinstance(schema, dict):
        return None
    said = schema.get("type")
    few = [False, True] if said == "boolean" else [None] if said == "null" else None
    found = [schema["const"]] if "const" in schema else schema.get("enum", few)
    if not isinstance(found, list) or len(found) > MAX_NAMES:
        return None
    if not all(each is None or isinstance(each, str | int) for each in found):
        return None
    return list({_key(each): each for each in found}.values())


def _without(values: list[Any], others: list[Any]) -> list[Any]:
    keys = {*map(_key, others)}
    return [value for value in values if _key(value) not in keys]


def _key(value: Any) -> tuple[type, Any]:
    """Returns what tells true from 1."""
    return type(value), value


def _resolved(schema: Any, root: Any) -> Any:
    """Returns what a schema refers to, if it does."""
    for _ in range(MAX_STEPS):
        if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
            return schema
        schema = _referred(root, schema["$ref"])
    return None


def _literal(text: str) -> str:
    """Returns an expression that matches a text and nothing else."""
    return "".join(letter if letter.isalnum() or not letter.isascii() else f"\\x{{{ord(letter):x}}}" for letter in text)


def _free(schema: Schema) -> bool:
    if schema.get("format") not in FREE_FORMATS:
        return False
    del schema["format"]
    return True


def _referred(root: Any, reference: str) -> Any:
    """Returns the definition that a reference names; None if it is none, or its name is written in escapes."""
    if any(mark in reference.rpartition("/")[2] for mark in "~%"):
        return None
    for name in ("$defs", "definitions"):
        found = root.get(name) if isinstance(root, dict) else None
        if isinstance(found, dict) and reference.startswith(f"#/{name}/"):
            return found.get(reference.removeprefix(f"#/{name}/"))
    return None
