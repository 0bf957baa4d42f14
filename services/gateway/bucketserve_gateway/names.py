"""What the names in requests mean: a model's own name, an alias of it, or none at all where there is one model.

The only place that knows; from here on everybody speaks of a model by its own name, which is what workers announce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar

from bucketserve.core.errors import SettingsError, UnknownModelError
from bucketserve_gateway.adapters import split_adapter

__all__ = ["ModelNames", "may_hear"]

MAX_NAME_CHARACTERS = 128
may_hear: ContextVar[Callable[[str], bool]] = ContextVar("may_hear", default=lambda name: True)
"""Whether the caller of the call in hand may learn that a model has that name; set where he is identified."""


class ModelNames:
    """The names of the served models."""

    def __init__(self, models: Iterable[str], aliases: Mapping[str, str] | None = None) -> None:
        """Takes the models' own names, and alias -> model.

        Raises:
            SettingsError: with every name that is none, or means two things or nothing.
        """
        self._models = sorted(models)
        self._model_of = dict(sorted((aliases or {}).items()))
        problems = [
            f"[gateway] {field}: {name!r} is no name: 1 to {MAX_NAME_CHARACTERS} printable characters"
            for field, names in (("models", self._models), ("aliases", self._model_of))
            for name in names
            if not (0 < len(name) <= MAX_NAME_CHARACTERS and name.isprintable())
        ]
        known = frozenset(self._models)
        for alias, model in self._model_of.items():
            if alias in known:
                problems.append(f"[gateway] aliases: {alias!r} is a model's own name; an alias needs another one")
            elif model in self._model_of:
                problems.append(f"[gateway] aliases: {alias!r} is for the alias {model!r}; name the model itself")
            elif model not in known:
                served = ", ".join(self._models) or "none"
                problems.append(
                    f"[gateway] aliases: {alias!r} is for {model!r}, which is no model here; served: {served}"
                )
        if problems:
            raise SettingsError(problems)

    def resolve(self, name: str) -> str:
        """Returns the own name of the model that a name stands for, or of its adapter: that of an alias is the model's.

        Empty stands for the only model, and stays empty where there are several; a name that nobody knows stays too.
        """
        if not name and len(self._models) == 1:
            return self._models[0]
        if name in self._models or name in self._model_of:
            return self._model_of.get(name, name)
        base, adapter = split_adapter(name)
        return f"{self._model_of[base]}:{adapter}" if base in self._model_of else name

    def aliases_of(self, model: str) -> tuple[str, ...]:
        """Returns a model's aliases, in order."""
        return tuple(alias for alias, its in self._model_of.items() if its == model)

    def unknown(self, name: str, adapters: Sequence[str] = ()) -> UnknownModelError:
        """Returns the error that a name stands for no model; says which do, with these adapters, that he may use."""
        served = [known for known in (*self._models, *adapters, *self._model_of) if may_hear.get()(known)]
        message = "" if name else f"name a model: several are served here: {', '.join(served)}"
        return UnknownModelError(name, served, message)
