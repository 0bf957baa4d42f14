"""How a command reaches a deployment: options that all such commands have, beside the address."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import typer

from bucketserve.config import TlsSettings, load_settings, section_of
from bucketserve.core.errors import SettingsError
from bucketserve.process import tls_of
from bucketserve.rpc.tls import Tls
from bucketserve_cli.terminal import InputError

__all__ = ["ApiKey", "Connection", "checked_key", "connects"]

T = TypeVar("T")
ApiKey = Annotated[
    str,
    typer.Option(metavar="KEY", envvar="BUCKETSERVE_API_KEY", show_envvar=False, help="default: BUCKETSERVE_API_KEY"),
]


@dataclass(frozen=True, slots=True)
class Connection:
    """What to call a deployment with."""

    tls: Tls | None
    api_key: str = field(repr=False)


def connects(command: Callable[..., T]) -> Callable[..., T]:
    """Gives a command the options; it gets what they say as its argument `connection`."""

    @functools.wraps(command)
    def run(**values: Any) -> T:
        given = {name: values.pop(name) for name in options}
        return command(**values, connection=_connection(**given))

    options = inspect.signature(_connection, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True)
    others = [parameter for name, parameter in own.parameters.items() if name != "connection"]
    run.__signature__ = own.replace(parameters=[*others, *options.values()])  # type: ignore[attr-defined]
    return run


def _connection(
    *,
    api_key: ApiKey = "",
    tls_ca: Annotated[
        str,
        typer.Option(metavar="FILE", help="PEM with the CAs to trust; default: BUCKETSERVE_TLS_CA_FILE"),
    ] = "",
    tls_cert: Annotated[
        str, typer.Option(metavar="FILE", help="PEM with a certificate to show; default: BUCKETSERVE_TLS_CERT_FILE")
    ] = "",
    tls_key: Annotated[
        str, typer.Option(metavar="FILE", help="PEM with its key; default: BUCKETSERVE_TLS_KEY_FILE")
    ] = "",
) -> Connection:
    flags = {"ca_file": tls_ca or None, "cert_file": tls_cert or None, "key_file": tls_key or None}
    try:
        loaded = load_settings({"tls": TlsSettings}, environ=os.environ, overrides={"tls": flags})
        return Connection(tls_of(section_of(loaded, "tls", TlsSettings)), checked_key(api_key))
    except SettingsError as error:
        raise InputError("; ".join(error.problems)) from None


def checked_key(key: str) -> str:
    """Returns a key as it is sent; raises an InputError if it can't be."""
    key = key.strip()
    # gRPC would refuse it without a word of what is wrong.
    if not key.isascii() or not key.isprintable():
        raise InputError("--api-key: a key has printable ASCII characters only")
    return key
