"""JSON schemas as clients' libraries write them: what llguidance knows by other words, and where what it refuses is.

Nothing that a schema forbids is let through: what is put into other words means the same, and what is left out means
nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["place_of", "prepared", "schemas_in"]

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
SHOWN_CHARACTERS = 40
"""The compiler's words have at least the beginning of an expression."""

Schema = dict[str, Any]


def place_of(text: str, words: str, has_overlap: Callable[[str], bool]) -> str:
    """Returns which keyword of a schema is refused, and where; empty if that can't be told.

    Args:
        text: the schema.
        words: the compiler's.
        has_overlap: whether a schema is refused because alternatives of it may overlap.
    """
    try:
        root = json.loads(prepared(text))
    except (ValueError, RecursionError):
        return ""
    found = list(subschemas(root))
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
        yield pointer, schema
        inner = [(name, schema[name]) for name in _ONE if isinstance(schema.get(name), dict)]
        for name in _MANY:
            if isinstance(found := schema.get(name), list):
                inner += [(f"{name}/{i}", each) for i, each in enumerate(found)]
        for name in _NAMED:
            if isinstance(found := schema.get(name), dict):
                inner += [(f"{name}/{key.replace('~', '~0').replace('/', '~1')}", each) for key, each in found.items()]
        waiting += [(f"{pointer}/{step}", each) for step, each in reversed(inner)]


def prepared(text: str) -> str:
    """Returns a schema in words that llguidance knows; as it is, if it is none."""
    try:
        root = json.loads(text)
    except (ValueError, RecursionError):
        return text
    is_changed = False
    for _, schema in subschemas(root):
        # One after the other.
        is_changed |= any([_discriminate(schema), _name(schema, root), _free(schema)])
    try:
        return json.dumps(root) if is_changed else text
    except RecursionError:
        return text


def schemas_in(grammar: str) -> Iterator[str]:
    """Yields the schemas in a grammar of the library's."""
    _, *rest = grammar.split("%json")
    for after in rest:
        try:
            _, length = json.JSONDecoder().raw_decode(after.lstrip())
        except (ValueError, RecursionError):
            continue
        yield after.lstrip()[:length]


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
