"""The HTTP server over real sockets: what is slow, silent or does not read is cut, and keeps nobody's place."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace

import pytest

from bucketserve.core.errors import EngineError, SettingsError
from bucketserve.store.embedded import free_port
from bucketserve.v1 import common_pb2, inference_pb2
from bucketserve_gateway import reads
from bucketserve_gateway.admission import Admission
from bucketserve_gateway.auth import Keys
from bucketserve_gateway.openai import Batches, BatchLines, Files, HttpServer, OpenAIFacade, exchange, server
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_gateway.submissions import Submissions
from tests.e2e.observe import eventually
from tests.unit.gateway.builders import catalog

HEAD = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
SHORT_S = 0.3
"""In place of half a minute."""


class Telemetry:
    """Keeps what nobody foresaw."""

    def __init__(self) -> None:
        self.unexpected_errors: list[BaseException] = []

    def unexpected(self, method: str, error: BaseException) -> None:
        self.unexpected_errors.append(error)

    def refused(self, model: str, request_class: str, error: BaseException) -> None:
        pass


class Runs:
    """Generates chunks of a size, as fast as they are taken; counts those that are open."""

    def __init__(self, num_chunks: int = 2, text: str = "ab", error: Exception | None = None) -> None:
        self.num_chunks, self.text, self.error = num_chunks, text, error
        self.num_open = 0
        self.num_sent = 0

    async def generate(
        self, request: inference_pb2.GenerateRequest, metadata: Mapping[str, str], remaining_s: float | None
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.num_open += 1
        try:
            yield inference_pb2.GenerateResponse(started=inference_pb2.GenerateStarted(model="demo", prompt_tokens=1))
            for _ in range(self.num_chunks):
                self.num_sent += 1
                # As where tokens are waited for.
                await asyncio.sleep(0)
                yield inference_pb2.GenerateResponse(chunk=inference_pb2.GenerateChunk(text=self.text, token_ids=[5]))
            if self.error is not None:
                raise self.error
            finished = inference_pb2.GenerateFinished(reason=common_pb2.FINISH_REASON_LENGTH)
            yield inference_pb2.GenerateResponse(finished=finished)
        finally:
            self.num_open -= 1


class Served:
    """A server and what is behind it."""

    def __init__(self, runs: Runs, *, max_connections: int = 100, max_bytes: int = 1 << 20) -> None:
        self.runs = runs
        self.telemetry = Telemetry()
        self.admission = Admission(
            max_calls=100,
            max_calls_per_connection=100,
            max_bytes=max_bytes,
            on_refused=lambda reason: None,
        )
        self.port = free_port()
        submissions = Submissions(None, None, GatewaySettings(), self.admission)
        files = Files(None, submissions, self.admission, 100_000)
        lines = BatchLines(runs.generate, catalog())
        batches = Batches(files, None, submissions, lines, max_lines=10, max_line_bytes=1000)
        facade = OpenAIFacade(
            runs.generate, catalog(), Keys(""), self.admission, self.telemetry, files, batches, 100_000
        )  # type: ignore[arg-type]
        self.http = HttpServer(
            f"127.0.0.1:{self.port}", facade, tls=None, max_connections=max_connections, max_head_bytes=16_384
        )

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def is_quiet(self) -> bool:
        """Whether nothing of anybody is left."""
        state = self.http._state
        left = (self.admission.num_calls, self.admission.num_bytes, self.runs.num_open)
        return not (state.connections or state.tasks or any(left))


@contextlib.asynccontextmanager
async def serving(runs: Runs | None = None, **more: int) -> AsyncIterator[Served]:
    served = Served(runs or Runs(), **more)
    await served.http.start()
    try:
        yield served
        await eventually(served.is_quiet, 10)
        assert served.telemetry.unexpected_errors == []
    finally:
        await served.http.stop(0)


async def rest(reader: asyncio.StreamReader) -> bytes:
    """Returns what comes until the connection is closed."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(10):
            return await reader.read()
    return b""


def asking(**members: object) -> bytes:
    """Returns the bytes of a request after which the connection ends."""
    body = json.dumps({"prompt": "a", **members}).encode()
    return HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SILENT_S", SHORT_S)
    monkeypatch.setattr(server, "ARRIVE_S", SHORT_S)
    monkeypatch.setattr(server, "IDLE_S", SHORT_S)
    monkeypatch.setattr(reads, "READ_S", SHORT_S)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n\r\n",
        b"GET /health HT",
        b"GET /health HTTP/1.1\r\nX: ",
        # Kept for a while after an answer, and then no request, or half of one.
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\nGET /hea",
    ],
)
async def test_who_sends_no_request_is_cut(data: bytes) -> None:
    async with serving() as served, served.connected() as (reader, writer):
        writer.write(data)
        answer = await rest(reader)
        assert answer.count(b"HTTP/1.1 503 ") == data.count(b"\r\n\r\n") - data.startswith(b"\r\n")


@pytest.mark.usefixtures("short")
async def test_a_slow_body_is_told_so() -> None:
    async with serving() as served, served.connected() as (reader, writer):
        writer.write(HEAD + b"Content-Length: 100\r\n\r\n{")
        head, _, body = (await rest(reader)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["code"] == "slow_request"


@pytest.mark.usefixtures("short")
async def test_the_rest_of_a_refused_body_is_thrown_away_and_may_not_take_for_ever() -> None:
    async with serving() as served, served.connected() as (reader, writer):
        writer.write(HEAD + b"Content-Length: 200000\r\n\r\n" + b"a" * 150_000)
        assert b"413" in await reader.readline()
        await reader.readuntil(b"}}")
        # All of it comes: the connection is good for more.
        writer.write(b"a" * 50_000 + b"GET /version HTTP/1.1\r\n\r\n")
        assert b"200" in await reader.readline()
    async with serving() as served, served.connected() as (reader, writer):
        writer.write(HEAD + b"Content-Length: 200000\r\n\r\n" + b"a" * 150_000)
        assert b" 413 " in await rest(reader)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("is_stream", [False, True])
async def test_who_does_not_read_is_cut(is_stream: bool) -> None:
    runs = Runs(num_chunks=200, text="x" * 100_000)
    async with serving(runs, max_bytes=1 << 26) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1)
        writer.write(asking(stream=is_stream))
        await reader.readexactly(10)
        # It asks for twenty megabytes and takes ten bytes. What it does not take is not made.
        await eventually(served.is_quiet, 10)
        assert (runs.num_sent < 200) == is_stream
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("num_choices", [1, 5])
async def test_an_answer_for_which_there_is_no_room_is_refused_and_its_runs_end(path: str, num_choices: int) -> None:
    runs = ManyLogprobs(num_chunks=100)
    is_chat = path.startswith("chat")
    members: dict[str, object] = {"n": num_choices, "logprobs": is_chat or 3}
    members |= {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3} if is_chat else {"prompt": "a"}
    body = json.dumps(members).encode()
    start = HEAD.replace(b"completions", path.encode(), 1) + b"Connection: close\r\n"
    async with serving(runs) as served:
        async with served.connected() as (reader, writer):
            writer.write(start + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            head, _, answer = (await rest(reader)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 1\r\n" in head
        error = json.loads(answer)["error"]
        assert (error["code"], error["type"]) == ("max_held_bytes", "rate_limit_error")
        # They had only begun.
        assert runs.num_sent < 100
        assert (served.admission.num_bytes, runs.num_open) == (0, 0)


async def test_what_is_gathered_is_held_until_its_client_has_it_or_has_gone() -> None:
    for is_read in (True, False):
        runs = Runs(num_chunks=20, text="x" * 100_000)
        async with serving(runs, max_bytes=1 << 26) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1)
            writer.write(asking())
            await reader.readexactly(10)
            assert 2_000_000 < served.admission.num_bytes < 2_500_000
            assert runs.num_open == 0
            if is_read:
                assert len(await rest(reader)) > 2_000_000
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            await eventually(lambda served=served: served.admission.num_bytes == 0, 10)


async def test_a_client_that_goes_while_its_answer_is_gathered_leaves_nothing() -> None:
    runs = Runs(num_chunks=10**9)
    async with serving(runs) as served, served.connected() as (_, writer):
        writer.write(asking(n=3))
        await eventually(lambda: served.admission.num_bytes > 1000)
        writer.close()
        await eventually(served.is_quiet, 10)


async def test_who_takes_an_answer_bit_by_bit_does_not_hold_it_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "TAKE_S", SHORT_S)
    monkeypatch.setattr(exchange, "TAKE_BYTES_S", 10**9)
    runs = Runs(num_chunks=200, text="x" * 100_000)
    async with serving(runs, max_bytes=1 << 26) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=65_536)

        async def taking() -> int:
            num_bytes = 0
            while piece := await reader.read(100_000):
                num_bytes += len(piece)
                await asyncio.sleep(0.01)
            return num_bytes

        writer.write(asking())
        task = asyncio.create_task(taking())
        await eventually(lambda: runs.num_sent == 200)
        await eventually(lambda: served.admission.num_bytes == 0, 10)
        assert not task.done()
        # What was on its way comes, and then no more.
        assert await task < 20_000_000
        writer.close()


async def test_others_have_their_turn_while_a_large_answer_is_made_and_sent() -> None:
    runs, num_tokens = ManyLogprobs(num_chunks=200), 200_000
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        last_s = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now_s = time.thread_time()
            # What takes the time of the processor: others on this machine do not count.
            longest_s, last_s = max(longest_s, now_s - last_s), now_s

    async with serving(runs, max_bytes=1 << 27) as served, served.connected() as (reader, writer):
        watching = asyncio.create_task(watch())
        writer.write(asking(logprobs=3))
        num_bytes = 0
        while piece := await reader.read(1 << 20):
            num_bytes += len(piece)
        watching.cancel()
    assert num_bytes > 50 * num_tokens
    assert longest_s < 0.05


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"GET /version HTTP/1.1\r\n" + b"X:\r\n" * 2000,
        CHUNKED + b"1\r\n{\r\n" * 5000,
        CHUNKED + b"0\r\n" + b"X:\r\n" * 2000,
        b"GET /version HTTP/1.1\r\n\r\n" * 2000,
    ],
)
async def test_what_is_made_of_too_many_pieces_is_cut_before_all_of_them_are_looked_at(data: bytes) -> None:
    async with serving() as served, served.connected() as (reader, writer):
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
        assert (await rest(reader)).count(b"HTTP/1.1 200 ") <= server.MAX_PIPELINED + 1


@pytest.mark.parametrize("first", [b"", b"GET /version HTTP/1.1\r\n\r\n"])
@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize(
    ("start", "end", "piece", "status"),
    [
        (b"GET /version HTTP/1.1\r\nX: ", b"\r\n\r\n", b"a" * 16_000, 200),
        (b"GET /version HTTP/1.1\r\nX: ", b"\r\n\r\n", b"a" * 17_000, 431),
        (b"GET /version HTTP/1.1\r\n", b"\r\n", b"X: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 400, 431),
        (b"GET /version?", b" HTTP/1.1\r\n\r\n", b"a" * 17_000, 431),
    ],
)  # fmt: skip
async def test_a_head_is_too_large_however_it_arrives(
    start: bytes, end: bytes, piece: bytes, status: int, is_whole: bool, first: bytes
) -> None:
    async with serving() as served, served.connected() as (reader, writer):
        if first:
            writer.write(first)
            await reader.readuntil(b"}")
        data = start + piece + end
        for part in [data] if is_whole else [data[:-3], data[-3:]]:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.05)
        assert b" %d " % status in await reader.readline()


@pytest.mark.parametrize("further", [b"GARBAGE\r\n\r\n", b"GET /version HTTP/1.1\r\nX: " + b"a" * 17_000])
@pytest.mark.parametrize("is_stream", [True, False])
async def test_what_follows_a_request_and_is_none_is_no_part_of_its_answer(further: bytes, is_stream: bool) -> None:
    body = json.dumps({"prompt": "a", "stream": is_stream}).encode()
    async with serving(Runs(num_chunks=10_000)) as served, served.connected() as (reader, writer):
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        if is_stream:
            await reader.readuntil(b"data: ")
        else:
            await eventually(lambda: served.runs.num_open == 1)
        writer.write(further)
        # The connection is cut.
        assert b"HTTP/1.1 4" not in await rest(reader)


@pytest.mark.parametrize("size", [100, 1000])
async def test_a_body_in_many_frames_is_read(size: int) -> None:
    body = json.dumps({"prompt": "a" * 99_000}).encode()
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    frames = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    async with serving() as served, served.connected() as (reader, writer):
        writer.write(CHUNKED + frames)
        assert b" 200 " in await reader.readline()


async def test_who_reads_slowly_gets_everything() -> None:
    runs = Runs(num_chunks=50, text="x" * 100_000)
    async with serving(runs) as served, served.connected() as (reader, writer):
        writer.write(asking(stream=True))
        pieces = []
        while piece := await reader.read(200_000):
            pieces.append(piece)
            await asyncio.sleep(0.001)
        assert b"".join(pieces).count(b"x" * 100_000) == 50
        assert b"".join(pieces).endswith(b"0\r\n\r\n")


class ManyLogprobs(Runs):
    """Generates all its tokens at once, with three alternatives each."""

    async def generate(
        self, request: inference_pb2.GenerateRequest, metadata: Mapping[str, str], remaining_s: float | None
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        top = [common_pb2.TokenLogprob(token_id=i, logprob=-1.0) for i in (5, 6, 7)]
        positions = [
            common_pb2.PositionLogprobs(chosen=common_pb2.TokenLogprob(token_id=5 + i % 300), top=top)
            for i in range(1000)
        ]
        async for event in super().generate(request, metadata, remaining_s):
            if event.HasField("chunk"):
                event.chunk.ClearField("token_ids")
                event.chunk.token_ids.extend(position.chosen.token_id for position in positions)
                event.chunk.logprobs.extend(positions)
            yield event


async def test_many_log_probabilities_come_in_parts_and_none_is_missing() -> None:
    answers = []
    for is_stream in (True, False):
        async with serving(ManyLogprobs(num_chunks=1)) as served, served.connected() as (reader, writer):
            writer.write(asking(stream=is_stream, logprobs=3))
            answers.append((await rest(reader)).partition(b"\r\n\r\n")[2])
    lines = [line.removeprefix(b"data: ") for line in answers[0].splitlines() if line.startswith(b"data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines]
    whole = json.loads(answers[1])
    assert len(choices) > 20
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"] == "ab"
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
    assert tokens == whole["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) == whole["usage"]["completion_tokens"] == 1000


async def test_an_error_after_the_beginning_is_the_last_event_and_one_nobody_foresaw_is_reported() -> None:
    for error in (EngineError("secret"), ValueError("secret")):
        async with serving(Runs(error=error)) as served, served.connected() as (reader, writer):
            writer.write(asking(stream=True))
            answer = await rest(reader)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"data: [DONE]" not in answer
            assert b"secret" not in answer
            assert answer.endswith(
                b'"message":"internal error","type":"server_error","code":null,"param":null}}\n\n\r\n0\r\n\r\n'
            )
            assert served.telemetry.unexpected_errors == ([error] if isinstance(error, ValueError) else [])
            served.telemetry.unexpected_errors.clear()


async def test_one_choice_that_fails_ends_all_of_them() -> None:
    runs = Runs(error=EngineError("no"))
    async with serving(runs) as served, served.connected() as (reader, writer):
        writer.write(asking(n=5))
        assert (await rest(reader)).startswith(b"HTTP/1.1 500 ")


async def test_connections_beyond_the_limit_are_closed() -> None:
    async with serving(max_connections=2) as served, served.connected(), served.connected() as (reader, writer):
        async with served.connected() as (third, _):
            assert await rest(third) == b""
        writer.write(b"GET /version HTTP/1.1\r\n\r\n")
        assert b"200" in await reader.readline()


async def test_an_address_that_is_taken_is_named() -> None:
    async with serving() as served:
        facade = served.http._facade
        second = HttpServer(f"127.0.0.1:{served.port}", facade, tls=None, max_connections=5, max_head_bytes=1000)
        with pytest.raises(SettingsError, match=f"http_listen: can't listen on 127.0.0.1:{served.port}"):
            await second.start()


@pytest.mark.parametrize("listen", ["0.0.0.0", "[::]"])
async def test_every_address_is_one_of_both_families(listen: str) -> None:
    runs, port = Runs(), free_port()
    served = Served(runs)
    http = HttpServer(f"{listen}:{port}", served.http._facade, tls=None, max_connections=5, max_head_bytes=1000)
    await http.start()
    try:
        for host in ("127.0.0.1", "::1"):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"GET /version HTTP/1.1\r\n\r\n")
            assert b"200" in await reader.readline()
            writer.close()
            await writer.wait_closed()
    finally:
        await http.stop(0)


async def test_what_runs_when_it_ends_is_cut_and_leaves_nothing() -> None:
    runs = Runs(num_chunks=10**9)
    served = Served(runs)
    await served.http.start()
    async with served.connected() as (reader, writer):
        writer.write(asking(stream=True))
        await reader.readline()
        await served.http.stop(0.1)
        assert served.is_quiet()


@pytest.mark.parametrize("num_turns", range(5))
async def test_what_was_accepted_as_listening_ends_begins(num_turns: int) -> None:
    made: list[asyncio.Protocol] = []
    begun: list[asyncio.BaseTransport] = []

    class Connection(asyncio.Protocol):
        def __init__(self) -> None:
            made.append(self)

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            begun.append(transport)

    listening = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
    with contextlib.ExitStack() as clients:
        for _ in range(3):
            clients.enter_context(socket.create_connection(listening.sockets[0].getsockname()))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        await server.stop_listening(listening)
        await asyncio.sleep(0.01)
        assert len(begun) == len(made)
        assert listening.sockets == ()
        for transport in begun:
            transport.close()
        await asyncio.sleep(0)


async def test_what_is_written_in_a_turn_of_the_loop_is_sent_together() -> None:
    sent: list[list[bytes]] = []
    there = SimpleNamespace(is_closing=lambda: is_gone, writelines=sent.append, close=lambda: sent.append([]))
    is_gone = False
    transport = server._Gathering(there, asyncio.get_running_loop())
    transport.write(b"a")
    transport.write(b"b")
    assert sent == []
    await asyncio.sleep(0)
    assert sent == [[b"a", b"b"]]
    # What was written before it is closed is sent, and nothing when the connection is gone.
    transport.write(b"c")
    transport.close()
    assert sent[1:] == [[b"c"], []]
    transport.write(b"d")
    is_gone = True
    await asyncio.sleep(0)
    assert len(sent) == 3
