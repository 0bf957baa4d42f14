"""bucketserve keys: what clients show to a gateway that has a keys file."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer
from pydantic import ValidationError

from bucketserve_cli.terminal import InputError, errors

__all__ = ["keys_app"]

keys_app = typer.Typer(help="Keys of clients.")


@keys_app.callback()
def _keys() -> None:
    """Keys of clients."""


class KeyClass(StrEnum):
    """Classes of requests."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class KeyScope(StrEnum):
    """What a key is for."""

    GENERATE = "generate"
    JOBS = "jobs"
    ADMIN = "admin"


@keys_app.command()
def new(
    tenant: Annotated[str, typer.Option(help="whose requests and jobs they will be")],
    name: Annotated[str, typer.Option(help="what the key is called in the file; default: by tenant and hash")] = "",
    model: Annotated[
        list[str] | None, typer.Option(help="a model that it is for; repeated: several; default: all")
    ] = None,
    class_: Annotated[
        list[KeyClass] | None, typer.Option("--class", help="a class that it is for; may be repeated; default: both")
    ] = None,
    scope: Annotated[
        list[KeyScope] | None,
        typer.Option(help="what it is for; may be repeated; admin: any tenant; default: generate and jobs"),
    ] = None,
) -> None:
    """Draw a key. What the gateway's keys_file needs goes to standard output, the key, this once, to standard error."""
    from bucketserve_gateway.keys import Key, hash_of, new_key

    key = new_key()
    table = {
        "name": name or f"{tenant}-{hash_of(key)[:8]}",
        "sha256": hash_of(key),
        "tenant": tenant,
        "models": model,
        "classes": class_,
        "scopes": scope,
    }
    given = {field: value for field, value in table.items() if value}
    try:
        Key.model_validate(given)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InputError(f"--{wrong['loc'][0]}: {wrong['msg'].removeprefix('Value error, ')}") from None
    print("[[keys]]")
    for field, value in given.items():
        # Of printable text TOML has the strings of JSON.
        print(f"{field} = {json.dumps(value, ensure_ascii=False)}")
    errors.print(key, soft_wrap=True, highlight=False, markup=False)
