"""OpenAI's HTTP API as an ASGI application: routes, bodies, runs, answers. What serves is the native API's own code.

An exchange is counted before anything of its body is read, and its body is read through a bounded number of places, as
calls of gRPC are. Each choice is a run of its own and counts as a call. Nothing is answered before all of them are
queued: until then a refusal has a status of its own, afterwards it is an event of the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from importlib.metadata import version
from typing import Any, TypeVar, cast

import orjson

from bucketserve.core.errors import BucketServeError, OverloadedError
from bucketserve.v1 import inference_pb2
from bucketserve_gateway.admission import Admission
from bucketserve_gateway.auth import Identity, Keys
from bucketserve_gateway.models import ModelCard, ModelCatalog
from bucketserve_gateway.openai.answers import Answer, Choice
from bucketserve_gateway.openai.bodies import object_of
from bucketserve_gateway.openai.caller import REQUEST_ID, Caller, caller_of, label_of, metadata_of
from bucketserve_gateway.openai.errors import Headers, HttpError, body_of, headers_of, status_of
from bucketserve_gateway.openai.translation import Wanted, chat_completion, completion
from bucketserve_gateway.reads import Reads
from bucketserve_gateway.servicer import Generate
from bucketserve_gateway.telemetry import GatewayTelemetry

__all__ = ["OpenAIFacade"]

JSON_TYPE = b"application/json"
STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies that would gather it first.
    (b"x-accel-buffering", b"no"),
]
MODELS = "/v1/models"
MAX_LOGPROBS = 128
"""Log-probabilities that are written down at once."""
READERS = {"/v1/completions": completion, "/v1/chat/completions": chat_completion}

T = TypeVar("T")
Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Events = AsyncGenerator[inference_pb2.GenerateResponse, None]


class _ClientGoneError(Exception):
    """The client has closed its connection: nobody is to be told anything."""


class OpenAIFacade:
    """The application."""

    def __init__(
        self,
        generate: Generate,
        catalog: ModelCatalog,
        keys: Keys,
        admission: Admission,
        telemetry: GatewayTelemetry,
        max_body_bytes: int,
    ) -> None:
        """Takes what serves, as the native API has it, and the most bytes of a body."""
        self._generate = generate
        self._catalog = catalog
        self._keys = keys
        self._admission = admission
        self._telemetry = telemetry
        self._max_body_bytes = max_body_bytes
        self._reads = Reads.of(max_body_bytes, admission.refusal)
        self._created = int(time.time())
        self.is_serving = False
        """What /health says."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serves one exchange."""
        exchange = _Exchange(scope, receive, send)
        try:
            await self._route(exchange)
        except _ClientGoneError:
            return
        except Exception as error:
            if not isinstance(error, BucketServeError):
                self._telemetry.unexpected(exchange.path, error)
            await exchange.fail(error)

    async def _route(self, exchange: _Exchange) -> None:
        path = exchange.path
        if path in READERS:
            exchange.check_method("POST")
            await self._complete(exchange, READERS[path], self._identify(exchange))
        elif path == MODELS:
            exchange.check_method("GET", "HEAD")
            identity = self._identify(exchange)
            models = [self._model(card) for card in self._catalog.cards() if identity.may_use(card.name)]
            await exchange.answer(200, {"object": "list", "data": models})
        elif path.startswith(MODELS + "/"):
            exchange.check_method("GET", "HEAD")
            name = path.removeprefix(MODELS + "/") or "/"
            self._identify(exchange).permit(inference_pb2.GetModelRequest(name=name))
            await exchange.answer(200, self._model(self._catalog.get(name).card))
        elif path == "/health":
            exchange.check_method("GET", "HEAD")
            status = "SERVING" if self.is_serving else "NOT_SERVING"
            await exchange.answer(200 if self.is_serving else 503, {"status": status})
        elif path == "/version":
            exchange.check_method("GET", "HEAD")
            await exchange.answer(200, {"version": version("bucketserve")})
        else:
            raise HttpError(404, f"invalid URL ({exchange.method} {path})", "unknown_url")

    def _model(self, card: ModelCard) -> dict[str, Any]:
        return {
            "id": card.name,
            "object": "model",
            "created": self._created,
            "owned_by": "bucketserve",
            "max_model_len": card.context_tokens,
        }

    def _identify(self, exchange: _Exchange) -> Identity:
        """Returns who asks, before anything of a body is read."""
        return self._keys.identify(metadata_of(exchange.headers))

    async def _complete(
        self, exchange: _Exchange, read: Callable[[dict[str, Any], Caller], Wanted], identity: Identity
    ) -> None:
        """One exchange that generates, from its body to its end."""
        with contextlib.ExitStack() as end:
            end.enter_context(self._admission.call(exchange.peer))
            try:
                body = await self._body(exchange)
                caller = caller_of(exchange.headers)
                wanted = read(object_of(body), caller)
            except BucketServeError as error:
                self._telemetry.refused("", "", error)
                raise
            exchange.names, exchange.request_id = wanted.names, wanted.label
            # The first choice has its place already; the bytes of its request count where it runs.
            more, num_bytes = wanted.num_choices - 1, len(body)
            del body
            for _ in range(more):
                end.enter_context(self._admission.call(exchange.peer))
            end.enter_context(self._admission.room()).resize(more * num_bytes)
            await exchange.while_connected(self._run(exchange, wanted, caller, identity))

    async def _body(self, exchange: _Exchange) -> bytes:
        """Returns the whole body.

        Raises:
            HttpError: it is no JSON by its type, is too long, or took too long to arrive.
        """
        kind = exchange.header("content-type").partition(b";")[0].strip().lower()
        if kind != JSON_TYPE or exchange.header("content-encoding"):
            raise HttpError(415, "send the body as content-type application/json, without content-encoding")
        length = exchange.header("content-length")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise _too_long(self._max_body_bytes)
        try:
            return await self._reads.read(exchange.peer, lambda: exchange.body(self._max_body_bytes))
        except OverloadedError as error:
            # The connection stays for what still comes: closed now, the client might never see why.
            raise HttpError(408, str(error), error.reason.lower()) from None

    async def _run(self, exchange: _Exchange, wanted: Wanted, caller: Caller, identity: Identity) -> None:
        """Runs all choices at once, and answers."""
        async with contextlib.AsyncExitStack() as end:
            runs: list[Events] = []
            for request in wanted.requests():
                identity.permit(request)
                run = cast(Events, self._generate(request, caller.metadata, None))
                runs.append(await end.enter_async_context(contextlib.aclosing(run)))
            started = await _all(_started(run) for run in runs)
            answer = Answer(wanted, self._catalog.get(started[0].model), started)
            if not wanted.is_stream:
                await _all(_gather(choice, run) for choice, run in zip(answer.choices, runs, strict=True))
                await exchange.answer(200, answer.whole())
                return
            await exchange.begin(200, STREAM_HEADERS)
            await _all(
                self._stream(exchange, answer, choice, run) for choice, run in zip(answer.choices, runs, strict=True)
            )
            last = _event(answer.last_chunk()) if wanted.has_usage else b""
            await exchange.write(last + b"data: [DONE]\n\n", is_last=True)

    @staticmethod
    async def _stream(exchange: _Exchange, answer: Answer, choice: Choice, run: Events) -> None:
        async for event in _small(run):
            is_end = event.HasField("finished")
            piece = choice.end(event.finished) if is_end else choice.piece(event.chunk)
            if piece is not None:
                await exchange.write(_event(answer.chunk(piece)))


class _Exchange:
    """A request and its response, as ASGI has them."""

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: Headers = scope["headers"]
        host, port = scope["client"] or ("", 0)
        self.peer = f"http:{host}:{port}"
        """The connection; a client may have several."""
        self.names: Mapping[str, str] = {}
        """For errors: fields of the native API -> parameters."""
        self._receive = receive
        self._send = send
        self._is_begun = False
        self.request_id = label_of(self.header(REQUEST_ID).decode("latin-1")) or uuid.uuid4().hex

    def header(self, name: str) -> bytes:
        """Returns a header of the request; empty if it has none of that name."""
        wanted = name.encode()
        return next((value for key, value in self.headers if key == wanted), b"")

    def check_method(self, *methods: str) -> None:
        """Raises an error unless the request has one of these methods."""
        if self.method not in methods:
            message = f"not allowed to {self.method} on {self.path}"
            raise HttpError(405, message, "method_not_supported", [(b"allow", ", ".join(methods).encode())])

    async def body(self, most: int) -> bytes:
        """Returns the body, which may have that many bytes."""
        pieces, num_bytes, is_whole = list[bytes](), 0, False
        while not is_whole:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _ClientGoneError
            pieces.append(message.get("body", b""))
            num_bytes += len(pieces[-1])
            if num_bytes > most:
                raise _too_long(most)
            is_whole = not message.get("more_body", False)
        return b"".join(pieces)

    async def while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Does the work; stops it when the client goes away."""
        task = asyncio.create_task(work)
        gone = asyncio.create_task(self._gone())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in (task, gone):
                each.cancel()
            await asyncio.wait({task, gone})
        if task.cancelled():
            raise _ClientGoneError
        task.result()

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def begin(self, status: int, headers: Headers) -> None:
        """Sends the head of the response."""
        self._is_begun = True
        headers = [*headers, (REQUEST_ID.encode(), self.request_id.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes, is_last: bool = False) -> None:
        """Sends a piece of the response, as soon as the client takes it."""
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def answer(
        self, status: int, document: Mapping[str, Any], headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        """Sends a response."""
        data = orjson.dumps(document)
        length = (b"content-length", b"%d" % len(data))
        await self.begin(status, [(b"content-type", JSON_TYPE), length, *headers])
        await self.write(data, is_last=True)

    async def fail(self, error: Exception) -> None:
        """Sends an error: as the response, or at the end of the stream that has begun."""
        body = body_of(error, self.names)
        if self._is_begun:
            await self.write(_event(body), is_last=True)
        else:
            await self.answer(status_of(error), body, headers_of(error))


def _event(document: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


def _too_long(most: int) -> HttpError:
    return HttpError(413, f"a body has at most {most} bytes", "request_too_large")


async def _started(run: Events) -> inference_pb2.GenerateStarted:
    """Returns the first event of a run: it is queued."""
    return (await anext(run)).started


async def _gather(choice: Choice, run: Events) -> None:
    async for event in _small(run):
        choice.gather(event)


async def _small(run: Events) -> AsyncIterator[inference_pb2.GenerateResponse]:
    """Yields a run's events, those with many log-probabilities in parts between which others have their turn.

    What waited for a client that does not read may be thousands of them, which take time to write down.
    """
    async for event in run:
        chunk = event.chunk
        most = max(MAX_LOGPROBS // (1 + len(chunk.logprobs[0].top)), 1) if chunk.logprobs else 0
        if len(chunk.logprobs) <= most:
            yield event
            continue
        for start in range(0, len(chunk.logprobs), most):
            part = slice(start, start + most)
            yield inference_pb2.GenerateResponse(
                chunk=inference_pb2.GenerateChunk(
                    text="" if start else chunk.text, token_ids=chunk.token_ids[part], logprobs=chunk.logprobs[part]
                )
            )
            await asyncio.sleep(0)


async def _all(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns what all return, done at once; of errors raises the first, when all others have been stopped."""
    each = list(works)
    if len(each) == 1:
        return [await each[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in each]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
