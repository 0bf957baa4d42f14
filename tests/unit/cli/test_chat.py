"""A conversation: what is sent with each line, and what is left of answers that were stopped or failed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from bucketserve.core.errors import InvalidRequestError, UnavailableError
from bucketserve.v1 import inference_pb2
from bucketserve_cli.chat import Conversation, run_chat
from bucketserve_cli.terminal import InputError


class Client:
    """Answers "a1", "a2" and so on; or begins to, and stops or fails."""

    def __init__(self) -> None:
        self.sent: list[list[tuple[str, str]]] = []
        self.then: dict[int, BaseException] = {}
        self.num_closed = 0

    def generate(self, *, chat: list[tuple[str, str]], **options: Any) -> Iterator[inference_pb2.GenerateChunk]:
        self.sent.append(chat)
        number = len(self.sent)
        try:
            if not isinstance(self.then.get(number), UnavailableError):
                yield inference_pb2.GenerateChunk(text="a")
            if number in self.then:
                raise self.then[number]
            yield inference_pb2.GenerateChunk(text=str(number))
        finally:
            self.num_closed += 1


class Input(io.StringIO):
    """Standard input with these lines."""

    def __init__(self, content: bytes, *, is_terminal: bool) -> None:
        super().__init__(content.decode(errors="surrogateescape"))
        self.buffer = io.BytesIO(content)
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def talk(
    monkeypatch: pytest.MonkeyPatch, client: Client, lines: bytes, *, is_terminal: bool = False, system: str = ""
) -> Conversation:
    monkeypatch.setattr("sys.stdin", Input(lines, is_terminal=is_terminal))
    conversation = Conversation(system)
    run_chat(client, conversation)  # type: ignore[arg-type]
    return conversation


TALK = b"one\n/system be brief\n\n two \n/reset\n/system\nthree\n/quit\nfour\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_each_line_is_answered_with_what_was_said_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_terminal: bool
) -> None:
    client = Client()
    conversation = talk(monkeypatch, client, TALK, is_terminal=is_terminal)
    assert client.sent == [
        [("user", "one")],
        [("system", "be brief"), ("user", "one"), ("assistant", "a1"), ("user", "two")],
        [("user", "three")],
    ]
    assert conversation.turns == [("user", "three"), ("assistant", "a3")]
    out = capsys.readouterr().out
    assert out.replace("> ", "") == "a1\na2\na3\n"
    assert ("> " in out) == is_terminal
    assert client.num_closed == 3


def test_the_end_of_the_input_is_the_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    client = Client()
    talk(monkeypatch, client, "\ufeffone\r\ntwo".encode(), system="first")
    assert [sent[-1] for sent in client.sent] == [("user", "one"), ("user", "two")]
    assert client.sent[0][0] == ("system", "first")
    assert capsys.readouterr().out == "a1\na2\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_terminal: bool
) -> None:
    client = Client()
    client.then[1] = KeyboardInterrupt()
    talk(monkeypatch, client, b"one\ntwo\n", is_terminal=is_terminal)
    assert client.sent[1] == [("user", "one"), ("assistant", "a"), ("user", "two")]
    assert capsys.readouterr().out.replace("> ", "").strip() == "a\na2"
    assert client.num_closed == 2


@pytest.mark.parametrize("error", [InvalidRequestError([]), UnavailableError("nobody")], ids=["late", "at once"])
def test_an_answer_that_fails_leaves_no_trace_at_a_terminal_and_ends_a_pipe(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    client = Client()
    client.then[1] = error
    talk(monkeypatch, client, b"one\ntwo\n", is_terminal=True)
    assert client.sent[1] == [("user", "two")]
    client = Client()
    client.then[1] = error
    with pytest.raises(type(error)):
        talk(monkeypatch, client, b"one\ntwo\n")
    assert len(client.sent) == 1


@pytest.mark.parametrize("line", [b"/rest", b"/", b"/system2 x", b"gr\xf6\xdfe"])
def test_what_is_no_command_is_not_sent(monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    client = Client()
    with pytest.raises(InputError):
        talk(monkeypatch, client, line + b"\n")
    talk(monkeypatch, client, line + b"\n /etc/passwd\n", is_terminal=True)
    assert client.sent == [[("user", "/etc/passwd")]]
