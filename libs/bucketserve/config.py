"""Reads settings once, at start: flag > environment > file > default, every problem reported at once.

Each service declares its section as a frozen pydantic model; this module only gathers the raw values. Environment
variables are BUCKETSERVE_<SECTION>_<FIELD>; the file (BUCKETSERVE_CONFIG or --config) is TOML with one table per
section. It does not know any service's settings.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from bucketserve.addresses import Address, AddressError, check_endpoint, redact
from bucketserve.core.errors import SettingsError

__all__ = [
    "AddressList",
    "DeploymentSettings",
    "ListenAddress",
    "Loaded",
    "NamedTexts",
    "OptionalListen",
    "OptionalTarget",
    "Section",
    "TelemetrySettings",
    "TlsSettings",
    "load_settings",
    "named_texts",
    "optional",
    "section_of",
]

PREFIX = "BUCKETSERVE_"
CONFIG_VARIABLE = "BUCKETSERVE_CONFIG"
SECTIONS = ("gateway", "scheduler", "worker", "deployment", "tls", "telemetry")
"""All that an environment or a file may speak of; a process reads those that concern it."""


def optional(check: Callable[[str], str]) -> Callable[[str], str]:
    """Returns a check that lets an empty text pass."""
    return lambda text: text and check(text)


def _listen(text: str) -> str:
    return str(Address.parse(text))


def _target(text: str) -> str:
    address = Address.parse(text)
    if address.is_wildcard or not address.port:
        raise AddressError(f"{text!r} is where one may listen, not where one can be reached")
    return str(address)


def _targets(text: str) -> str:
    return ",".join(_target(item.strip()) for item in text.split(","))


ListenAddress = Annotated[str, AfterValidator(_listen)]
"""host:port to listen on; 0.0.0.0 and [::] both mean every address of the machine, of both families."""
OptionalListen = Annotated[str, AfterValidator(optional(_listen))]
OptionalTarget = Annotated[str, AfterValidator(optional(_target))]
"""host:port to be reached at."""
AddressList = Annotated[str, AfterValidator(_targets)]
"""One or more host:port to connect to, separated by commas."""


def named_texts(value: Any) -> Any:
    """Returns the table that a text is: name=value,name=value, or a JSON object; what is neither stays as it is.

    Raises:
        ValueError: a name or a value is missing, or a name is there twice.
    """
    if isinstance(value, dict):
        return _distinct(list(value.items()))
    if not isinstance(value, str):
        return value
    if value.startswith("{"):
        return _json_object(value)
    # A comma begins another pair only where name= follows: folders may have commas in their names.
    pairs = [item.partition("=") for item in re.split(r",\s*(?=[^,=/]+=)", value) if item.strip()]
    return _distinct([(name.strip(), path.strip()) for name, _, path in pairs])


def _json_object(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not a JSON object: {error}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is named twice")
    if bad := [name or path for name, path in pairs if not name or not path]:
        raise ValueError(f"write name=value, not {bad[0]!r}")
    return result


NamedTexts = Annotated[dict[str, str], BeforeValidator(named_texts)]
"""A table; as text name=value,name=value, or a JSON object, which may have any name and text."""


class Section(BaseModel):
    """Base of every settings section: immutable, unknown fields are refused.

    A field with repr=False may hold credentials: what was given for it is in no message.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_not_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError("a number is needed")
        return value


class TelemetrySettings(Section):
    """[telemetry]: traces, logs."""

    otlp_endpoint: Annotated[str, AfterValidator(optional(check_endpoint))] = Field(
        "", repr=False, description="OTLP gRPC endpoint for traces, such as http://jaeger:4317; empty: off"
    )
    sample_ratio: float = Field(1.0, ge=0, le=1, description="share of traces that are recorded")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level to log")
    log_format: Literal["auto", "json", "text"] = Field("auto", description="auto: text on a terminal, else JSON")


class DeploymentSettings(Section):
    """[deployment]: what keeps its services together and strangers out."""

    name: str = Field(
        "default",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="services of another name are refused; separates deployments that share a Redis",
    )
    token: str = Field(
        "", repr=False, description="secret that services show each other; empty: whoever knows the name is let in"
    )


class TlsSettings(Section):
    """[tls]: one for all processes of a deployment, and for those who call them. Files are PEM."""

    ca_file: str = Field("", description="CAs that certify the services, which internal ports ask for; empty: no TLS")
    cert_file: str = Field("", description="this process's certificate and those between it and the CA")
    key_file: str = Field("", description="its key, not encrypted")
    client_ca_file: str = Field(
        "", description="gateway: CAs of clients' certificates; empty: the public port asks for none"
    )
    peer_name: str = Field(
        "", description="name that the services' certificates carry; empty: the host at which each is called"
    )
    metrics: Literal["", "tls", "mutual"] = Field(
        "", description="/metrics by TLS; mutual: to certificates of ca_file only; empty: plain HTTP"
    )


@dataclass(frozen=True, slots=True)
class Loaded:
    """Validated settings and where each value came from."""

    sections: Mapping[str, Section]
    sources: Mapping[tuple[str, str], str]
    """(section, field) -> flag, environment or file; what is not in it has its default."""

    def describe(self) -> list[tuple[str, str, str, str]]:
        """Returns (section, field, value, source) rows, without credentials."""
        return [
            (section, field, _shown(model, field), self.sources.get((section, field), "default"))
            for section, model in self.sections.items()
            for field in type(model).model_fields
        ]


S = TypeVar("S", bound=Section)


def _shown(section: Section, field: str) -> str:
    value = str(getattr(section, field))
    return "***" if isinstance(section, DeploymentSettings) and field == "token" and value else redact(value)


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
        environ: the process environment. An empty variable is a value. What Kubernetes and Docker put there about
            other services is left alone.
        overrides: section -> field -> value, from command-line flags; None values are not given.
        file: a TOML file; default: the one that BUCKETSERVE_CONFIG names, if any.

    Raises:
        SettingsError: with every problem found, in all sections.
    """
    problems: list[str] = []
    if file is None and environ.get(CONFIG_VARIABLE):
        file = Path(environ[CONFIG_VARIABLE])
    given = _from_file(file, sections, problems) if file is not None else {}
    given |= _from_environment(environ, sections, problems)
    for name, fields in (overrides or {}).items():
        given |= {(name, field): _Given(v, "flag", f"[{name}] {field}") for field, v in fields.items() if v is not None}

    built: dict[str, Section] = {}
    for name, model in sections.items():
        try:
            built[name] = model(**{field: item.value for (section, field), item in given.items() if section == name})
        except ValidationError as error:
            problems.extend(_explain(name, model, item, given) for item in error.errors())
    if problems:
        raise SettingsError(problems)
    return Loaded(built, {key: item.source for key, item in given.items()})


def section_of(loaded: Loaded, name: str, model: type[S]) -> S:
    """Returns a section with its type."""
    return cast(S, loaded.sections[name]) if isinstance(loaded.sections[name], model) else model()


@dataclass(frozen=True, slots=True)
class _Given:
    """A raw value, its source, and what it is called there."""

    value: Any
    source: str
    name: str


_IP = r"(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3}|\[?[0-9a-fA-F:.]*:[0-9a-fA-F:.]*\]?)"
_PROTOCOL = r"(?:TCP|UDP|SCTP)"
_SERVICE_FORMS = tuple(
    (re.compile(rf".+_{name}"), re.compile(value, re.IGNORECASE))
    for name, value in (
        (r"SERVICE_HOST", _IP),
        (r"SERVICE_PORT(?:_[A-Z0-9_]+)?", r"[0-9]{1,5}"),
        (rf"PORT(?:_[0-9]+_{_PROTOCOL}(?:_START|_END)?)?", rf"{_PROTOCOL}://{_IP}:[0-9]{{1,5}}"),
        (rf"PORT_[0-9]+_{_PROTOCOL}_PROTO", _PROTOCOL),
        (rf"PORT_[0-9]+_{_PROTOCOL}_PORT(?:_START|_END)?", r"[0-9]{1,5}"),
        (rf"PORT_[0-9]+_{_PROTOCOL}_ADDR", _IP),
        (r"NAME", r"/.+/.+"),
    )
)
"""What the kubelet (service links) and `docker run --link` tell of a service: ends of names, and values."""


def _is_about_a_service(variable: str, environ: Mapping[str, str]) -> bool:
    """Whether a variable tells where a service is, whose name happens to begin as our settings do."""
    value = environ[variable]
    if any(name.fullmatch(variable) and form.fullmatch(value) for name, form in _SERVICE_FORMS):
        return True
    # Docker also hands on a linked container's environment, as <alias>_ENV_<variable>.
    alias, found, _ = variable.partition("_ENV_")
    return bool(found) and re.fullmatch(r"/.+/.+", environ.get(f"{alias}_NAME", "")) is not None


def _from_environment(
    environ: Mapping[str, str], sections: Mapping[str, type[Section]], problems: list[str]
) -> dict[tuple[str, str], _Given]:
    given = {}
    known = {*SECTIONS, *sections}
    for variable in filter(lambda text: text.startswith(PREFIX), environ):
        name, _, field = variable.removeprefix(PREFIX).partition("_")
        section = name.lower()
        is_field = section in sections and field.lower() in sections[section].model_fields
        if not is_field and _is_about_a_service(variable, environ):
            continue
        if variable != variable.upper() and section in known:
            problems.append(f"{variable}: write settings in capitals, {variable.upper()}")
        elif section in sections:
            given[section, field.lower()] = _Given(environ[variable].strip(), "environment", variable)
        elif section not in known and (meant := difflib.get_close_matches(section, known, n=1, cutoff=0.8)):
            problems.append(f"{variable}: no such section; {PREFIX}{meant[0].upper()}_{field} may be meant")
    return given


def _from_file(file: Path, sections: Mapping[str, type[Section]], problems: list[str]) -> dict[tuple[str, str], _Given]:
    given: dict[tuple[str, str], _Given] = {}
    known = {*SECTIONS, *sections}
    for name, values in _read_file(file, problems).items():
        if name not in known:
            problems.append(f"[{name}]: no such section (in {file}); there are {', '.join(sorted(known))}")
        elif not isinstance(values, dict):
            problems.append(f"{name}: a section is a table, [{name}] (in {file})")
        elif name in sections:
            given |= {(name, field): _Given(value, "file", f"[{name}] {field}") for field, value in values.items()}
    return given


def _read_file(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        # Some editors begin UTF-8 with a mark.
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        problems.append(f"configuration file {file} does not exist; correct --config or {CONFIG_VARIABLE}")
    except OSError as error:
        problems.append(f"configuration file {file} can't be read: {error.strerror}")
    except UnicodeDecodeError:
        problems.append(f"configuration file {file} is not UTF-8")
    except tomllib.TOMLDecodeError as error:
        problems.append(f"configuration file {file} is not TOML: {error}")
    return {}


def _explain(section: str, model: type[Section], item: Any, given: Mapping[tuple[str, str], _Given]) -> str:
    """Returns one line that says what is wrong, where it was set and what is expected."""
    field = str(item["loc"][0]) if item["loc"] else ""
    it = given.get((section, field))
    name, source = (it.name, it.source) if it is not None else (f"[{section}] {field}", "default")
    if item["type"] == "extra_forbidden":
        return f"{name}: no such setting (from {source}){_meant(field, model.model_fields)}"
    message = item["msg"].removeprefix("Value error, ")
    known = model.model_fields.get(field)
    shown = f"got {redact(repr(item['input']))} from" if known is None or known.repr else "from"
    return f"{name}: {message} ({shown} {source})"


def _meant(field: str, fields: Mapping[str, FieldInfo]) -> str:
    close = difflib.get_close_matches(field.lower(), fields, n=1)
    return f"; {close[0]} may be meant" if close else ""
