"""OpenAI's HTTP API as an ASGI application: routes, bodies, runs, answers. What serves is the native API's own code.

An exchange is counted before anything of its body is read, and its body is read through a bounded number of places, as
calls of gRPC are. Each choice is a run of its own and counts as a call. Nothing is answered before all of them are
queued: until then a refusal has a status of its own, afterwards it is an event of the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from importlib.metadata import version
from typing import Any, TypeVar, cast

from bucketserve.core.errors import (
    BucketServeError,
    FieldViolation,
    InvalidRequestError,
    OverloadedError,
    UnknownModelError,
)
from bucketserve.v1 import inference_pb2, job_pb2
from bucketserve_gateway.admission import Admission
from bucketserve_gateway.auth import Identity, Keys
from bucketserve_gateway.keys import MAX_TENANT_CHARACTERS
from bucketserve_gateway.models import ModelCard, ModelCatalog, ServedModel
from bucketserve_gateway.names import may_hear
from bucketserve_gateway.openai.answers import Answer, Choice, gather, small
from bucketserve_gateway.openai.batches import BATCHES, Batches
from bucketserve_gateway.openai.bodies import object_of
from bucketserve_gateway.openai.caller import Caller, caller_of
from bucketserve_gateway.openai.errors import HttpError
from bucketserve_gateway.openai.exchange import (
    EVENT_HEADERS,
    JSON_TYPE,
    ClientGoneError,
    Exchange,
    Message,
    Receive,
    Send,
    event_of,
    too_long,
)
from bucketserve_gateway.openai.files import FILES, Files
from bucketserve_gateway.openai.lines import READERS
from bucketserve_gateway.openai.translation import Wanted
from bucketserve_gateway.reads import Reads
from bucketserve_gateway.servicer import Generate
from bucketserve_gateway.telemetry import GatewayTelemetry

__all__ = ["OpenAIFacade"]

MODELS = "/v1/models"

T = TypeVar("T")
Events = AsyncGenerator[inference_pb2.GenerateResponse, None]


class OpenAIFacade:
    """The application."""

    def __init__(
        self,
        generate: Generate,
        catalog: ModelCatalog,
        keys: Keys,
        admission: Admission,
        telemetry: GatewayTelemetry,
        files: Files,
        batches: Batches,
        max_body_bytes: int,
    ) -> None:
        """Takes what serves, as the native API has it, and the most bytes of a body."""
        self._generate = generate
        self._catalog = catalog
        self._keys = keys
        self._admission = admission
        self._telemetry = telemetry
        self._files = files
        self._batches = batches
        self._max_body_bytes = max_body_bytes
        self._reads = Reads.of(max_body_bytes, admission.refusal)
        self._created = int(time.time())
        self.is_serving = False
        """What /health says."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serves one exchange."""
        exchange = Exchange(scope, receive, send)
        try:
            await self._route(exchange)
        except ClientGoneError:
            return
        except Exception as error:
            if not isinstance(error, BucketServeError):
                self._telemetry.unexpected(exchange.path, error)
            # Without the frames that it came through, which have what was gathered and is not counted any more.
            error.__traceback__ = error.__context__ = None
            await exchange.fail(error)

    async def _route(self, exchange: Exchange) -> None:
        path = exchange.path
        if path in READERS:
            exchange.check_method("POST")
            await self._complete(exchange, READERS[path], self._identify(exchange))
        elif path == MODELS:
            exchange.check_method("GET", "HEAD")
            identity = self._identify(exchange)
            cards = [card for card in self._catalog.cards() if identity.may_use(card.name)]
            models = [self._model(card, name) for card in cards for name in (card.name, *card.aliases)]
            await exchange.answer(200, {"object": "list", "data": models})
        elif path.startswith(MODELS + "/"):
            exchange.check_method("GET", "HEAD")
            name = path.removeprefix(MODELS + "/") or "/"
            self._identify(exchange).permit(inference_pb2.GetModelRequest(name=name))
            await exchange.answer(200, self._model(self._catalog.get(name).card, name))
        elif path == FILES or path.startswith(FILES + "/"):
            await self._serve_file(exchange, self._identify(exchange))
        elif path == BATCHES or path.startswith(BATCHES + "/"):
            await self._serve_batch(exchange, self._identify(exchange))
        elif path == "/health":
            exchange.check_method("GET", "HEAD")
            status = "SERVING" if self.is_serving else "NOT_SERVING"
            await exchange.answer(200 if self.is_serving else 503, {"status": status})
        elif path == "/version":
            exchange.check_method("GET", "HEAD")
            await exchange.answer(200, {"version": version("bucketserve")})
        else:
            raise HttpError(404, f"invalid URL ({exchange.method} {path})", "unknown_url")

    def _model(self, card: ModelCard, name: str) -> dict[str, Any]:
        """Returns a model as it is shown under one of its names; root is its own."""
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "bucketserve",
            "root": card.name,
            "max_model_len": card.context_tokens,
            "parent": card.parent or None,
        }

    def _identify(self, exchange: Exchange) -> Identity:
        """Returns who asks, before anything of a body is read."""
        identity = self._keys.identify(exchange.metadata)
        may_hear.set(identity.may_use)
        return identity

    async def _complete(
        self, exchange: Exchange, read: Callable[[dict[str, Any], Caller], Wanted], identity: Identity
    ) -> None:
        """One exchange that generates, from its body to its end."""
        with contextlib.ExitStack() as end:
            end.enter_context(self._admission.call(exchange.peer))
            try:
                body = await self._body(exchange)
                caller = caller_of(exchange.metadata)
                wanted = read(object_of(body), caller)
            except BucketServeError as error:
                self._telemetry.refused("", "", error)
                raise
            exchange.names, exchange.request_id = wanted.names, wanted.label
            # The first choice has its place already; the bytes of its request count where it runs.
            more, num_bytes = wanted.num_choices - 1, len(body)
            del body
            if more:
                for _ in range(more):
                    end.enter_context(self._admission.call(exchange.peer))
                end.enter_context(self._admission.room()).resize(more * num_bytes)
            await exchange.while_connected(self._run(exchange, wanted, caller, identity))

    async def _serve_file(self, exchange: Exchange, identity: Identity) -> None:
        with self._admission.call(exchange.peer):
            await self._files.serve(exchange, _owner(exchange, identity))

    async def _serve_batch(self, exchange: Exchange, identity: Identity) -> None:
        with self._admission.call(exchange.peer), self._admission.room() as room:
            tenant = _owner(exchange, identity)
            is_new = exchange.method == "POST" and exchange.path.rstrip("/") == BATCHES
            body = await self._body(exchange) if is_new else b""
            await self._batches.serve(exchange, tenant, identity, body, room)

    async def _body(self, exchange: Exchange) -> bytes:
        """Returns the whole body.

        Raises:
            HttpError: it is no JSON by its type, is too long, or took too long to arrive.
        """
        kind = exchange.header("content-type").partition(b";")[0].strip().lower()
        if kind != JSON_TYPE or exchange.header("content-encoding"):
            raise HttpError(415, "send the body as content-type application/json, without content-encoding")
        length = exchange.header("content-length")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise too_long(self._max_body_bytes)
        try:
            return await self._reads.read(exchange.peer, lambda: exchange.body(self._max_body_bytes))
        except OverloadedError as error:
            # The connection stays for what still comes: closed now, the client might never see why.
            raise HttpError(408, str(error), error.reason.lower()) from None

    def _known(self, name: str) -> ServedModel:
        """Returns the model that a name stands for.

        Raises:
            UnknownModelError: there is none; it is counted.
        """
        try:
            return self._catalog.get(name)
        except UnknownModelError as error:
            self._telemetry.refused("", "", error)
            raise

    async def _run(self, exchange: Exchange, wanted: Wanted, caller: Caller, identity: Identity) -> None:
        """Runs all choices at once, and answers."""
        async with contextlib.AsyncExitStack() as end:
            runs: list[Events] = []
            for request in wanted.requests():
                identity.permit(request)
                run = cast(Events, self._generate(request, caller.metadata, None))
                runs.append(await end.enter_async_context(contextlib.aclosing(run)))
            # An adapter may be gone by the time of the answer.
            model = self._known(wanted.prompts[0].model)
            started = await _all(_started(run) for run in runs)
            answer = Answer(wanted, model, started)
            if not wanted.is_stream:
                room = end.enter_context(self._admission.room())
                await _all(gather(choice, run, room) for choice, run in zip(answer.choices, runs, strict=True))
                await exchange.answer(200, answer.whole())
                return
            await exchange.begin(200, EVENT_HEADERS)
            await _all(
                self._stream(exchange, answer, choice, run) for choice, run in zip(answer.choices, runs, strict=True)
            )
            last = event_of(answer.last_chunk()) if wanted.has_usage else b""
            await exchange.write(last + b"data: [DONE]\n\n", is_last=True)

    @staticmethod
    async def _stream(exchange: Exchange, answer: Answer, choice: Choice, run: Events) -> None:
        async for event in small(run):
            is_end = event.HasField("finished")
            piece = choice.end(event.finished) if is_end else choice.piece(event.chunk)
            if piece is not None:
                await exchange.write(event_of(answer.chunk(piece)))


def _owner(exchange: Exchange, identity: Identity) -> str:
    """Returns whose files and batches are asked for.

    Raises:
        ForbiddenError: the key is not for that.
    """
    wanted = caller_of(exchange.metadata).tenant
    message: job_pb2.GetJobRequest | job_pb2.SubmitJobRequest
    if exchange.method == "POST":
        message = job_pb2.SubmitJobRequest(header=job_pb2.JobHeader(tenant=wanted))
        identity.permit(message)
        tenant = message.header.tenant
    else:
        message = job_pb2.GetJobRequest(tenant=wanted)
        identity.permit(message)
        tenant = message.tenant
    if len(tenant) > MAX_TENANT_CHARACTERS or not tenant.isprintable():
        raise InvalidRequestError([FieldViolation("tenant", f"at most {MAX_TENANT_CHARACTERS} printable characters")])
    return tenant or "default"


async def _started(run: Events) -> inference_pb2.GenerateStarted:
    """Returns the first event of a run: it is queued."""
    return (await anext(run)).started


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
