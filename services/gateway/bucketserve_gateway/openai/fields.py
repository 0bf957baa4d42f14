"""The members of a JSON object, taken one by one and checked; what nobody has taken is unknown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from bucketserve_gateway.openai.errors import ParameterError

__all__ = ["Fields"]

MAX_NAME_CHARACTERS = 64


class Fields:
    """An object's members. One that is null counts as not given."""

    def __init__(self, members: Mapping[str, Any], path: str = "") -> None:
        """Takes the members; path stands before their names in errors, such as messages[0]."""
        self._members = members
        self._path = f"{path}." if path else ""
        self._taken: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        """Yields the names of the members."""
        return iter(self._members)

    def __len__(self) -> int:
        """Number of members."""
        return len(self._members)

    def name(self, name: str) -> str:
        """Returns the name by which errors call a member."""
        return self._path + name

    def take(self, name: str) -> Any:
        """Returns a member as it is; None if it was not given."""
        self._taken.add(name)
        return self._members.get(name)

    def text(self, name: str) -> str | None:
        """Returns a string."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def flag(self, name: str) -> bool | None:
        """Returns a truth value."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "a boolean")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """Returns an integer from low to high."""
        value = self.take(name)
        if value is None:
            return None
        if type(value) is not int:
            raise self._wrong(name, "an integer")
        if not low <= value <= high:
            raise ParameterError(self.name(name), f"{value} is not from {low} to {high}", "invalid_value")
        return value

    def number(self, name: str) -> float | None:
        """Returns a number, an integer included, that is finite."""
        value = self.take(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._wrong(name, "a number")
        return float(value)

    def objects(self, name: str, most: int) -> list[Fields] | None:
        """Returns a list of at most so many objects."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, list) and len(value) > most:
            raise ParameterError(self.name(name), f"at most {most}", "array_above_max_length")
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._wrong(name, "an array of objects")
        return [Fields(item, f"{self.name(name)}[{i}]") for i, item in enumerate(value)]

    def object(self, name: str) -> Fields | None:
        """Returns an object."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return None if value is None else Fields(value, self.name(name))

    def only(self, name: str, *neutral: Any) -> None:
        """Takes a member that has no counterpart: it may have the values that change nothing.

        Raises:
            ParameterError: it has another one.
        """
        value = self.take(name)
        if value is not None and not any(type(value) is type(each) and value == each for each in neutral):
            raise ParameterError(self.name(name), "not supported by this server", "unsupported_parameter")

    def end(self) -> None:
        """Checks that every member was taken.

        Raises:
            ParameterError: one is unknown.
        """
        for name, value in self._members.items():
            if name not in self._taken and value is not None:
                shown = self.name(name)[:MAX_NAME_CHARACTERS]
                raise ParameterError(shown, "unknown parameter", "unknown_parameter")

    def _wrong(self, name: str, wanted: str) -> ParameterError:
        return ParameterError(self.name(name), f"invalid type: {wanted} is needed", "invalid_type")
