"""Reads settings once, at start: flag > environment > file > default, every problem reported at once.

Each service declares its section as a frozen pydantic model; this module only gathers the raw values. Environment
variables are BUCKETSERVE_<SECTION>_<FIELD>; the file (BUCKETSERVE_CONFIG or --config) is TOML with one table per
section. It does not know any service's settings.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from bucketserve.core.errors import SettingsError

__all__ = ["Loaded", "Section", "TelemetrySettings", "load_settings", "section_of", "split_host_port"]

PREFIX = "BUCKETSERVE_"
CONFIG_VARIABLE = "BUCKETSERVE_CONFIG"


class Section(BaseModel):
    """Base of every settings section: immutable, unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TelemetrySettings(Section):
    """[telemetry]: traces, logs."""

    otlp_endpoint: str = Field("", description="OTLP gRPC endpoint for traces, such as http://jaeger:4317; empty: off")
    sample_ratio: float = Field(1.0, ge=0, le=1, description="share of new traces that are recorded")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level to log")
    log_format: Literal["auto", "json", "text"] = Field("auto", description="auto: text on a terminal, else JSON")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Validated settings and where each value came from."""

    sections: Mapping[str, Section]
    sources: Mapping[tuple[str, str], str]
    """(section, field) -> flag, environment, file or default."""

    def describe(self) -> list[tuple[str, str, str, str]]:
        """Returns (section, field, value, source) rows; secrets are masked."""
        rows = []
        for section, model in self.sections.items():
            for field in type(model).model_fields:
                value = getattr(model, field)
                shown = "***" if isinstance(value, SecretStr) and value.get_secret_value() else str(value)
                rows.append((section, field, _without_password(shown), self.sources.get((section, field), "default")))
        return rows


S = TypeVar("S", bound=Section)


def load_settings(
    sections: Mapping[str, type[Section]],
    *,
    environ: Mapping[str, str],
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    file: Path | None = None,
) -> Loaded:
    """Returns the effective settings of the named sections.

    Args:
        sections: section name -> its model.
        environ: the process environment.
        overrides: section -> field -> value, from command-line flags; None values are not given.
        file: a TOML file; default: the one that BUCKETSERVE_CONFIG names, if any.

    Raises:
        SettingsError: with every problem found, in all sections.
    """
    problems: list[str] = []
    sources: dict[tuple[str, str], str] = {}
    raw: dict[str, dict[str, Any]] = {name: {} for name in sections}

    def put(section: str, values: Mapping[str, Any], source: str) -> None:
        for field, value in values.items():
            if value is None:
                continue
            raw[section][field] = value
            sources[section, field] = source

    if file is None and environ.get(CONFIG_VARIABLE):
        file = Path(environ[CONFIG_VARIABLE])
    if file is not None:
        for name, values in _read_file(file, problems).items():
            if name in sections and isinstance(values, dict):
                put(name, values, "file")
    for variable, value in environ.items():
        for name in sections:
            start = f"{PREFIX}{name.upper()}_"
            if variable.startswith(start) and value != "":
                put(name, {variable.removeprefix(start).lower(): value}, "environment")
    for name, values in (overrides or {}).items():
        put(name, values, "flag")

    built: dict[str, Section] = {}
    for name, model in sections.items():
        try:
            built[name] = model(**raw[name])
        except ValidationError as error:
            problems.extend(_explain(name, item, sources) for item in error.errors())
    if problems:
        raise SettingsError(problems)
    return Loaded(built, sources)


def section_of(loaded: Loaded, name: str, model: type[S]) -> S:
    """Returns a section with its type."""
    return cast(S, loaded.sections[name]) if isinstance(loaded.sections[name], model) else model()


def split_host_port(address: str) -> tuple[str, int]:
    """Returns host and port of "host:port" or "[v6]:port".

    Raises:
        ValueError: there is no port, or it isn't a number from 0 to 65535.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


def _read_file(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        problems.append(f"configuration file {file} does not exist; correct --config or {CONFIG_VARIABLE}")
    except tomllib.TOMLDecodeError as error:
        problems.append(f"configuration file {file} is not TOML: {error}")
    return {}


def _explain(section: str, item: Any, sources: Mapping[tuple[str, str], str]) -> str:
    """Returns one line that says what is wrong, where it was set and what is expected."""
    field = str(item["loc"][0]) if item["loc"] else ""
    source = sources.get((section, field), "default")
    name = f"{PREFIX}{section}_{field}".upper() if source == "environment" else f"[{section}] {field}"
    if item["type"] == "extra_forbidden":
        return f"{name}: no such setting (from {source})"
    return f"{name}: {item['msg']} (got {item['input']!r} from {source})"


def _without_password(text: str) -> str:
    """Masks the password of a URL such as redis://user:password@host."""
    head, separator, tail = text.rpartition("@")
    if separator and "://" in head:
        scheme, _, credentials = head.partition("://")
        return f"{scheme}://{credentials.split(':')[0]}:***@{tail}"
    return text
