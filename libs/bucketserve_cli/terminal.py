"""What every command shares: consoles, files that are whole or untouched, and how a command ends.

Exit status: 0, 1 for what failed, 2 for arguments and input files that are wrong, 130 after Ctrl-C. An error is one
line on standard error that begins with "error:", whatever the terminal's width.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import grpc
import typer
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperGroup

from bucketserve.addresses import AddressError, channel_target
from bucketserve.core.errors import BucketServeError, OverloadedError, UnavailableError

__all__ = [
    "UINT32",
    "Commands",
    "InputError",
    "an_address",
    "as_json",
    "console",
    "describe",
    "errors",
    "in_range",
    "plain_table",
    "print_error",
    "print_json",
    "replaced_file",
]

UINT32 = 2**32 - 1
WIDE = 200
"""Columns where there is no terminal: what reads the output can break lines by itself."""
_WRONG_PATH = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# typer exports this subclass alone.
_UsageError: Any = typer.BadParameter.__base__


def _console(stream: TextIO, *, is_error: bool) -> Console:
    is_narrow = stream.isatty() or "COLUMNS" in os.environ
    return Console(stderr=is_error, width=None if is_narrow else WIDE, highlight=not is_error)


console, errors = _console(sys.stdout, is_error=False), _console(sys.stderr, is_error=True)


class InputError(Exception):
    """An argument or an input file is wrong; the message says which and where."""


class Commands(TyperGroup):
    """A group whose commands end as this module says."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **named: Any) -> Any:
        """Runs a command and leaves with its exit status."""
        arguments = list(sys.argv[1:] if args is None else args)
        named["standalone_mode"] = False
        try:
            for argument in arguments:
                if not _is_utf8(argument):
                    raise InputError(f"argument {argument!r} is not UTF-8")
            status = super().main(arguments, *more, **named)
        except _UsageError as error:
            where = f" ({error.ctx.command_path} --help)" if error.ctx is not None else ""
            print_error(error.format_message().rstrip(".") + where)
            status = 2
        except InputError as error:
            print_error(str(error))
            status = 2
        except (BucketServeError, grpc.RpcError) as error:
            print_error(describe(error))
            status = 1
        except OSError as error:
            print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
            status = 2 if isinstance(error, _WRONG_PATH) else 1
        sys.exit(status if isinstance(status, int) else 0)


def describe(error: BucketServeError | grpc.RpcError) -> str:
    """Returns what the server said: the reason, the message with every violation, when to try again."""
    if not isinstance(error, BucketServeError):
        # With asyncio or without: the error of a call knows how the call ended.
        call: Any = error
        return f"{call.code().name}: {call.details()}"
    text = f"{error.reason}: {error}"
    if isinstance(error, OverloadedError | UnavailableError):
        text += f" (try again in {error.retry_delay_s:g} s)"
    return text


def print_json(value: object) -> None:
    """Writes one line of JSON to standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def as_json(message: Message) -> dict[str, Any]:
    """Returns a message as JSON has it: fields by name, values of enumerations by theirs, all numbers as numbers."""

    def one(field: Any, value: Any) -> Any:
        if field.message_type is not None:
            return as_json(value)
        return field.enum_type.values_by_number[value].name if field.enum_type is not None else value

    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            found[field.name] = [one(field, each) for each in value]
        elif not field.has_presence or message.HasField(field.name):
            found[field.name] = one(field, value)
    return found


def print_error(message: str) -> None:
    """Writes "error: " and the message to standard error, as one line unless the message has several."""
    errors.print(Text.assemble(("error: ", "red"), message), soft_wrap=True)


def plain_table(*columns: str) -> Table:
    """Returns a table without lines that breaks what a narrow terminal has no room for, and cuts nothing."""
    return Table(*(Column(name, overflow="fold") for name in columns), box=None)


def in_range(low: float, high: float, *, low_open: bool = False) -> Callable[[str | float], float]:
    """Returns a parser of options: a finite number from low (or above it) to high."""

    def parse(value: str | float) -> float:
        try:
            parsed = float(value)
        except ValueError:
            raise typer.BadParameter(f"{value!r} is not a number") from None
        if not low <= parsed <= high or (low_open and parsed == low) or math.isnan(parsed):
            raise typer.BadParameter(f"{parsed:g} is not in {'(' if low_open else '['}{low:g}, {high:g}]")
        return parsed

    parse.__name__ = "number"
    return parse


def an_address(address: str) -> str:
    """Returns an address that has the form host:port, or several with a scheme of gRPC's (dns:///name:port)."""
    try:
        return channel_target(address)
    except AddressError as error:
        raise typer.BadParameter(str(error)) from None


@contextmanager
def replaced_file(path: Path) -> Iterator[TextIO]:
    """Yields a file that takes the place of `path` when the block ends without an error; else that stays as it was.

    Devices and pipes are written to as they are.

    Raises:
        OSError: the file can't be written; says so before anything else is done.
    """
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    target = path.resolve()
    with _named(path):
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(13, "Permission denied")
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
        with _named(path):
            Path(name).chmod(mode)
            Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors name the file that was asked for."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
