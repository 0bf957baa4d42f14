"""What of a JSON schema llguidance takes and does not keep to, or compiles without end: refused here, with its place.

Its own limits count what has been made. A number that is a multiple of d is followed by an automaton of d states, and
a text to which n expressions apply at once by one whose steps look at 2^n cases: both are there before it counts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

from bucketserve.engine.schemas import escaped

__all__ = ["refusal"]

MAX_COST = 20_000
"""States and cases of all schemas of a document: some tenths of a second."""
MAX_STEPS = 300_000
"""Of looking for what meets: some tenths of a second."""
MAX_DIGITS = 9
"""Of a divisor; one of more is beyond any bound."""
CHOICES = ("anyOf", "oneOf")
COUNTED = ("multipleOf", "pattern", "format")
HOLDERS = ("properties", "patternProperties", "additionalProperties", "items", "additionalItems", "prefixItems")
"""What has schemas that meet those of another schema when the two have to hold at once."""

DATA = ("const", "default", "enum", "example", "examples")
"""What has values, not schemas, unless a reference points there."""
NAMED = ("properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions")
"""Below which such a word is a name."""

Node = dict[str, Any]


def refusal(text: str) -> str:
    """Returns what a schema has that can't be served, and where; empty if nothing is known, or it is no object."""
    try:
        root = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(root, dict):
        return ""
    nodes = list(_objects("#", root))
    references = [node["$ref"] for _, node in nodes if "$ref" in node]
    if all(isinstance(each, str) and "%" not in each and not _is_data(each) for each in references):
        nodes = [(pointer, node) for pointer, node in nodes if not _is_data(pointer)]
    key = "id" if "draft-04" in str(root.get("$schema")) else "$id"
    for pointer, node in nodes:
        if node is not root and _names_all(node.get(key), root.get(key)):
            return f"{key} at {pointer} is not supported: it may be that of the whole schema"
        if _is_miscounted(node):
            return f"minProperties at {pointer} is not supported: names beside those required may repeat"
    if pointer := _costliest(root, nodes):
        return f"multipleOf, pattern or format at {pointer} is not supported: too complex with what has to hold at once"
    return ""


def _names_all(name: Any, whole: Any) -> bool:
    """Whether a schema's URI may be that of the document, in whose place it would be taken; bases are not followed."""
    if not isinstance(name, str) or (name.startswith("#") and name != "#"):
        return False
    last = _last_segment(name)
    return "%" in name or last in ("", ".", "..") or (isinstance(whole, str) and last == _last_segment(whole))


def _last_segment(uri: str) -> str:
    path = uri.partition("#")[0].partition("?")[0]
    return path.rpartition("/")[2].casefold() if path.count("/") != 2 or "//" not in path else ""


def _is_miscounted(node: Node) -> bool:
    """Whether names that are there twice may stand for properties that are missing."""
    least, required = node.get("minProperties"), node.get("required", [])
    num_named = len({*map(str, required)}) if isinstance(required, list) else 0
    is_closed = node.get("additionalProperties") is False and not node.get("patternProperties")
    return isinstance(least, int | float) and least > num_named + 1 and not is_closed


def _costliest(root: Any, nodes: list[tuple[str, Node]]) -> str:
    """Returns where it would take longest, if it would take too long."""
    if not any(name in node for _, node in nodes for name in COUNTED):
        return ""
    # Below one of these a reference means something else.
    is_whole = not any(isinstance(node.get(name), str) for _, node in nodes[1:] for name in ("$id", "id"))
    of_all = _cost(node for _, node in nodes)
    steps, costs = iter(range(MAX_STEPS)), list[tuple[int, str]]()
    for pointer, node in nodes:
        met: list[Node | None] = [node]
        if _meets(node):
            met = list(_reached(root, node, steps)) if is_whole else [None]
            if next(steps, None) is None:
                return pointer
        if (cost := of_all if None in met else _cost(met)) > 1:
            costs.append((cost, pointer))
    return max(costs)[1] if sum(cost for cost, _ in costs) > MAX_COST else ""


def _cost(nodes: Iterable[Node | None]) -> int:
    """Returns the states for all of some schemas at once, or something beyond what is let through."""
    divisors, expressions = set[int](), set[str]()
    for node in nodes:
        if node is not None:
            divisors.add(_states(node))
            expressions.update(str(node[name]) for name in ("pattern", "format") if name in node)
    product = 1
    for factor in [*divisors, *[2] * len(expressions)]:
        product = min(product * factor, MAX_COST + 1)
    return product


def _states(node: Node) -> int:
    """Returns the states for what a number is a multiple of: its digits without zeros at the end."""
    divisor = node.get("multipleOf")
    if type(divisor) not in (int, float):
        return 1
    digits = "".join(map(str, Decimal(repr(divisor)).as_tuple().digits)).rstrip("0")
    return max(int(digits[:MAX_DIGITS] or 1), 1)


def _meets(node: Node) -> bool:
    """Whether several schemas have to hold at once, and those in them."""
    also = node.get("allOf")
    number = len(also) if isinstance(also, list) else 0
    number += sum(name in node for name in ("$ref", *CHOICES))
    return number + any(not isinstance(node.get(name, True), bool) for name in (*COUNTED, *HOLDERS)) > 1


def _reached(root: Any, start: Node, steps: Iterator[int]) -> Iterator[Node | None]:
    """Yields each schema in one and in what it refers to; None for what can't be followed."""
    waiting, known = [start], set[int]()
    while waiting:
        for _, node in _objects("", waiting.pop(), steps):
            if id(node) in known:
                continue
            known.add(id(node))
            yield node
            if "$ref" in node:
                try:
                    waiting.append(_referred(root, node["$ref"]))
                except LookupError:
                    yield None


def _is_data(pointer: str) -> bool:
    names = pointer.split("/")
    return any(name in DATA and before not in NAMED for before, name in itertools.pairwise(names))


def _objects(pointer: str, root: Any, steps: Iterator[int] | None = None) -> Iterator[tuple[str, Node]]:
    """Yields every object with its pointer, since a reference may name any; at most so many steps, one for a value."""
    waiting = [(pointer, root)]
    while waiting and (steps is None or next(steps, None) is not None):
        pointer, value = waiting.pop()
        if isinstance(value, dict):
            yield pointer, value
            waiting += [(f"{pointer}/{escaped(name)}", each) for name, each in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{pointer}/{i}", each) for i, each in enumerate(value)]


def _referred(root: Any, reference: Any) -> Any:
    """Returns what a pointer into the document points to.

    Raises:
        LookupError: it is none, or is written in a way that readers may take for another.
    """
    if reference == "#":
        return root
    if not isinstance(reference, str) or not reference.startswith("#/") or "%" in reference:
        raise LookupError(reference)
    found = root
    for step in reference[2:].split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found[name]
        elif isinstance(found, list) and name.isascii() and name.isdecimal() and len(name) <= MAX_DIGITS:
            found = found[int(name)]
        else:
            raise LookupError(reference)
    return found
