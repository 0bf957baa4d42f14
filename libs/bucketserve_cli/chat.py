"""`bucketserve chat`: a conversation, line by line, from a terminal or from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from bucketserve.core.errors import BucketServeError
from bucketserve.sync_client import Chunk, SyncClient
from bucketserve_cli.terminal import InputError, describe, errors, print_error

__all__ = ["Conversation", "run_chat"]

COMMANDS = "/system TEXT says what the model is told first, /reset forgets the conversation, /quit leaves"
BOM = b"\xef\xbb\xbf"


@dataclass(slots=True)
class Conversation:
    """What has been said."""

    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)

    def chat(self) -> list[tuple[str, str]]:
        """Returns all turns, as (role, content), for the next request."""
        return [("system", self.system), *self.turns] if self.system else list(self.turns)


def run_chat(client: SyncClient, conversation: Conversation, **options: Any) -> None:
    """Answers each line of standard input until it ends, or until /quit.

    Ctrl-C stops an answer, of which the conversation keeps what is there. At a terminal errors are told and the next
    line is read; from a pipe they end it, like any command.

    Args:
        client: where the answers come from.
        conversation: what has been said before.
        options: further arguments of SyncClient.generate.

    Raises:
        BucketServeError: an answer failed, and nobody is there to be told.
        InputError: a line is not UTF-8, likewise.
    """
    is_terminal = sys.stdin.isatty()
    read = _from_terminal() if is_terminal else _from_pipe
    if is_terminal:
        errors.print(f"{COMMANDS}; Ctrl-C stops an answer.", style="dim", markup=False)
    while True:
        try:
            line = read()
            if line is None or line.rstrip() == "/quit":
                return
            _take(client, conversation, line, options)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            sys.stdout.write("\n")
        except (BucketServeError, grpc.RpcError, InputError) as error:
            if not is_terminal:
                raise
            print_error(str(error) if isinstance(error, InputError) else describe(error))


def _take(client: SyncClient, conversation: Conversation, line: str, options: dict[str, Any]) -> None:
    """Does what a line says, or answers it."""
    text = line.strip()
    if not line.startswith("/"):
        if text:
            conversation.turns.append(("user", text))
            _answer(client, conversation, options)
        return
    command, _, rest = text.partition(" ")
    if command == "/reset":
        conversation.turns.clear()
    elif command == "/system":
        conversation.system = rest.strip()
    else:
        raise InputError(f"there is no {command}: {COMMANDS}. A line that begins with a space is no command")


def _answer(client: SyncClient, conversation: Conversation, options: dict[str, Any]) -> None:
    """Writes the answer as it comes, and adds it to the conversation; one that fails leaves no trace there."""
    pieces: list[str] = []
    is_kept = False
    events: Any = client.generate(chat=conversation.chat(), **options)
    try:
        with contextlib.closing(events):
            for event in events:
                if isinstance(event, Chunk):
                    pieces.append(event.text)
                    sys.stdout.write(event.text)
                    sys.stdout.flush()
        is_kept = True
    except KeyboardInterrupt:
        is_kept = bool(pieces)
    finally:
        if is_kept:
            conversation.turns.append(("assistant", "".join(pieces)))
        else:
            conversation.turns.pop()
        if pieces or is_kept:
            sys.stdout.write("\n")
            sys.stdout.flush()


def _from_terminal() -> Callable[[], str | None]:
    """Returns what reads a line of a terminal; None at its end."""
    with contextlib.suppress(ImportError):
        # Editing and history of lines.
        import readline  # noqa: F401

    def read() -> str | None:
        try:
            line = input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return None
        except UnicodeDecodeError:
            raise InputError("the line is not UTF-8") from None
        try:
            line.encode()
        except UnicodeEncodeError:
            raise InputError("the line is not UTF-8") from None
        return line

    return read


def _from_pipe() -> str | None:
    """Returns a line of standard input; None at its end."""
    line = sys.stdin.buffer.readline()
    try:
        return line.removeprefix(BOM).decode() if line else None
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input is not UTF-8: byte {error.start} of the line is 0x{error.object[error.start]:02x}"
        ) from None
