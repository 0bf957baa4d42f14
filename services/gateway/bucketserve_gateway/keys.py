"""The keys file: keys of clients, and what tenants may use.

A key is 32 random bytes, so that the file holds no more of it than its SHA-256: what can't be guessed needs no slow
hash.
"""

from __future__ import annotations

import hashlib
import secrets
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from bucketserve.core.errors import SettingsError
from bucketserve.core.types import RequestClass

__all__ = [
    "EVERYBODY",
    "MAX_TENANT_CHARACTERS",
    "Grant",
    "Key",
    "KeysFile",
    "Limits",
    "Scope",
    "hash_of",
    "new_key",
    "read_keys_file",
]

PREFIX = "bsk_"
"""Of a key: what finds one in a log or a repository knows it by that."""
MAX_TENANT_CHARACTERS = 64
EVERYBODY = "*"
"""In place of a tenant's name: each that has no table of its own."""

M = TypeVar("M", bound=BaseModel)


class Scope(StrEnum):
    """What a key is for."""

    GENERATE = "generate"
    JOBS = "jobs"
    ADMIN = "admin"
    """To speak for any tenant: for what stands between tenants and the gateway."""


def _distinct(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    if values is not None and (not values or len(set(values)) < len(values)):
        raise ValueError("name at least one, and each once; leave it out for all")
    return values


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("printable characters only")
    return text


class Grant(BaseModel):
    """What somebody may do. What is left out allows all, but for the scopes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: Annotated[str, AfterValidator(_printable)] = Field(min_length=1, max_length=MAX_TENANT_CHARACTERS)
    models: Annotated[tuple[str, ...] | None, AfterValidator(_distinct)] = None
    classes: Annotated[tuple[RequestClass, ...] | None, AfterValidator(_distinct)] = None
    scopes: Annotated[tuple[Scope, ...], AfterValidator(_distinct)] = (Scope.GENERATE, Scope.JOBS)


class Key(Grant):
    """A table [[keys]] of the file."""

    name: Annotated[str, AfterValidator(_printable)] = Field(min_length=1, max_length=128)
    """Whose it is, for those who keep the file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Limits(BaseModel):
    """A table [[tenants]] of the file: what a tenant may use; 0: as much as there is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, AfterValidator(_printable)] = Field(min_length=1, max_length=MAX_TENANT_CHARACTERS)
    requests_per_minute: int = Field(0, ge=0, le=10**9)
    tokens_per_minute: int = Field(0, ge=0, le=10**12)
    """Of prompts and outputs together."""
    requests_at_once: int = Field(0, ge=0, le=10**9)
    tokens_at_once: int = Field(0, ge=0, le=10**12)
    """Of all that wait or run: prompts and max_tokens."""


class KeysFile(NamedTuple):
    """What the file has."""

    keys: list[Key]
    tenants: list[Limits]


def read_keys_file(path: Path) -> KeysFile:
    """Returns what is in a file.

    Raises:
        SettingsError: with everything that is wrong with it.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError([f"keys file {path}: {error.strerror}"]) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError([f"keys file {path} is not TOML: {error}"]) from None
    problems: list[str] = []
    found = KeysFile(_tables(content, "keys", Key, problems), _tables(content, "tenants", Limits, problems))
    if not content.get("keys") or not content.keys() <= {"keys", "tenants"}:
        # No keys are not what somebody wants who takes all away: a file that is being written looks like this.
        problems.insert(0, "one or more tables [[keys]] are needed, and nothing else but [[tenants]]")
    for kind in ("name", "sha256"):
        problems += _twice(kind, [getattr(key, kind) for key in found.keys])
    problems += _twice("name", [limits.name for limits in found.tenants])
    if problems:
        raise SettingsError([f"keys file {path}: {problem}" for problem in problems])
    return found


def _tables(content: Mapping[str, Any], name: str, model: type[M], problems: list[str]) -> list[M]:
    tables = content.get(name, [])
    if not isinstance(tables, list):
        problems.append(f"write [[{name}]], not [{name}]")
        return []
    read = []
    for i, table in enumerate(tables):
        try:
            read.append(model.model_validate(table))
        except ValidationError as error:
            problems += [
                f"{name}[{i}].{'.'.join(str(step) for step in item['loc'])}: "
                + item["msg"].removeprefix("Value error, ")
                for item in error.errors()
            ]
    return read


def _twice(kind: str, values: list[str]) -> list[str]:
    twice = sorted({value for value in values if values.count(value) > 1})
    return [f"{kind} {twice[0]!r} is there twice"] if twice else []


def hash_of(key: str) -> str:
    """Returns what the file holds of a key."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def new_key() -> str:
    """Returns a key that nobody has."""
    return PREFIX + secrets.token_urlsafe(32)
