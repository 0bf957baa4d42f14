"""KServe v2 with Triton's streaming: a facade over InferenceServicer.generate.

A request is one prompt, given as a tensor; its responses are text. On a stream there may be many at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from bucketserve import __version__
from bucketserve.core.errors import (
    BucketServeError,
    FieldViolation,
    ForbiddenError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    UnknownModelError,
)
from bucketserve.facades import kserve_pb2, kserve_pb2_grpc
from bucketserve.rpc.convert import finish_reason_from_pb
from bucketserve.rpc.status import status_of
from bucketserve.v1 import inference_pb2
from bucketserve_gateway.admission import Admission, text_bytes
from bucketserve_gateway.auth import Identity
from bucketserve_gateway.kserve_tensors import INPUTS, OUTPUTS, VERSION, Inference, check_version, inference_of
from bucketserve_gateway.models import ModelCatalog
from bucketserve_gateway.servicer import Generate, text_metadata

__all__ = ["KserveServicer"]

MAX_RUNS = 64
"""Of a stream at once: the next request is read when one of them has ended."""
MAX_ANSWERS = 64
"""Responses of a stream that wait to be sent; beyond these its requests keep their own tokens."""
MAX_LABEL_CHARACTERS = 128
IDLE_S = 30.0
"""A stream on which nothing has run for so long gives its place to another, if all are taken."""

Context = grpc.aio.ServicerContext[Any, Any]


class KserveServicer(kserve_pb2_grpc.GRPCInferenceServiceServicer):
    """Translates; decides nothing but how much of a stream runs at once."""

    def __init__(
        self,
        generate: Generate,
        catalog: ModelCatalog,
        admission: Admission,
        *,
        identify: Callable[[Mapping[str, str]], Identity],
        max_prompt_bytes: int,
        max_streams: int,
        is_serving: Callable[[], bool],
        is_leaving: Callable[[], bool],
        on_refused: Callable[[BucketServeError], None],
        on_unexpected: Callable[[str, BaseException], None],
    ) -> None:
        """Takes what serves the requests, who says how the gateway is, and who calls, by the metadata of a call.

        Reports what never comes to be served.
        """
        self._generate = generate
        self._catalog = catalog
        self._admission = admission
        self._identify = identify
        self._max_prompt_bytes = max_prompt_bytes
        self._max_streams = max_streams
        self._is_serving = is_serving
        self._is_leaving = is_leaving
        self._on_refused = on_refused
        self._on_unexpected = on_unexpected
        self._streams: set[_Stream] = set()

    async def ServerLive(
        self, request: kserve_pb2.ServerLiveRequest, context: Context
    ) -> kserve_pb2.ServerLiveResponse:
        """Who answers is alive."""
        return kserve_pb2.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: kserve_pb2.ServerReadyRequest, context: Context
    ) -> kserve_pb2.ServerReadyResponse:
        """As the health service says."""
        return kserve_pb2.ServerReadyResponse(ready=self._is_serving())

    async def ModelReady(
        self, request: kserve_pb2.ModelReadyRequest, context: Context
    ) -> kserve_pb2.ModelReadyResponse:
        """False for a model that nobody knows, or that the key is not for, since that is how clients wait for one."""
        try:
            self._model(request.name, request.version, context)
        except (UnknownModelError, ForbiddenError):
            return kserve_pb2.ModelReadyResponse(ready=False)
        return kserve_pb2.ModelReadyResponse(ready=self._is_serving())

    async def ServerMetadata(
        self, request: kserve_pb2.ServerMetadataRequest, context: Context
    ) -> kserve_pb2.ServerMetadataResponse:
        """Name and version."""
        return kserve_pb2.ServerMetadataResponse(
            name="bucketserve", version=__version__, extensions=["model_configuration"]
        )

    async def ModelMetadata(
        self, request: kserve_pb2.ModelMetadataRequest, context: Context
    ) -> kserve_pb2.ModelMetadataResponse:
        """The same tensors for every model."""
        tensor = kserve_pb2.ModelMetadataResponse.TensorMetadata
        return kserve_pb2.ModelMetadataResponse(
            name=self._model(request.name, request.version, context),
            versions=[VERSION],
            platform="bucketserve",
            inputs=[tensor(name=name, datatype=kind, shape=[1]) for name, kind in INPUTS.items()],
            outputs=[tensor(name=name, datatype="BYTES", shape=[1]) for name in OUTPUTS],
        )

    async def ModelConfig(
        self, request: kserve_pb2.ModelConfigRequest, context: Context
    ) -> kserve_pb2.ModelConfigResponse:
        """The same tensors for every model."""
        types = {"BYTES": kserve_pb2.TYPE_STRING, "BOOL": kserve_pb2.TYPE_BOOL}
        config = kserve_pb2.ModelConfig(
            name=self._model(request.name, request.version, context),
            platform="bucketserve",
            backend="bucketserve",
            input=[
                kserve_pb2.ModelInput(name=name, data_type=types[kind], dims=[1], optional=name != "text_input")
                for name, kind in INPUTS.items()
            ],
            output=[kserve_pb2.ModelOutput(name=name, data_type=types["BYTES"], dims=[1]) for name in OUTPUTS],
            model_transaction_policy=kserve_pb2.ModelTransactionPolicy(decoupled=True),
        )
        return kserve_pb2.ModelConfigResponse(config=config)

    async def ModelInfer(
        self, request: kserve_pb2.ModelInferRequest, context: Context
    ) -> kserve_pb2.ModelInferResponse:
        """The whole text as one response."""
        asked = self._asked(request)
        if isinstance(asked, BucketServeError):
            raise asked
        if asked.is_streamed:
            description = "ModelInfer has one response; use ModelStreamInfer, or leave it out"
            raise InvalidRequestError([FieldViolation("inputs.stream", description)])
        answers = self._answers(asked, text_metadata(context), context.time_remaining())
        async with contextlib.aclosing(answers):
            return await anext(answers)

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[kserve_pb2.ModelInferRequest], context: Context
    ) -> AsyncIterator[kserve_pb2.ModelStreamInferResponse]:
        """Requests as they come, at most MAX_RUNS at once; responses as they come. Leaving ends them all."""
        with self._place(context.peer()) as stream:
            stream.reader = asyncio.create_task(self._read(stream, request_iterator, context), name="infer-stream")
            try:
                while (answer := await stream.answers.get()) is not None:
                    yield answer
                if stream.error is not None:
                    raise stream.error
            finally:
                await stream.end()

    @contextlib.contextmanager
    def _place(self, peer: str) -> Iterator[_Stream]:
        """Around a stream: each may be about to send the largest message, so there are few.

        Raises:
            OverloadedError: all are taken, or those that a connection may have, and none is idle.
        """
        of_peer = sum(stream.peer == peer for stream in self._streams)
        # As for calls: a connection may have as many as are still free.
        if of_peer >= self._max_streams - len(self._streams):
            refusal = self._admission.refusal("MAX_INFER_STREAMS", f"{len(self._streams)} streams are open here")
            latest_s = time.monotonic() - IDLE_S
            idle = [stream for stream in self._streams if not stream.runs and stream.quiet_s <= latest_s]
            if not idle:
                raise refusal
            longest = min(idle, key=lambda stream: stream.quiet_s)
            self._streams.discard(longest)
            longest.give_way(refusal)
        stream = _Stream(peer)
        self._streams.add(stream)
        try:
            yield stream
        finally:
            self._streams.discard(stream)

    async def _read(
        self, stream: _Stream, requests: AsyncIterator[kserve_pb2.ModelInferRequest], context: Context
    ) -> None:
        """Starts what comes, until no more comes and everything has ended; then says that no more answers follow."""
        metadata = text_metadata(context)
        try:
            while True:
                await stream.slots.acquire()
                # Looked at before anything else may happen: a message may be many times as large as its bytes.
                message = await anext(requests, None)
                if message is None:
                    break
                # Clients are told only by an error's text which request failed; what is no label is not repeated.
                label = message.id if len(message.id) <= MAX_LABEL_CHARACTERS else ""
                asked = self._asked(message)
                del message
                stream.begin(self._run(stream, label, asked, metadata, context.time_remaining()))
            if stream.runs:
                await asyncio.wait(stream.runs)
        except asyncio.CancelledError:
            if stream.error is None:
                raise
        except Exception as error:
            stream.error = error
        await stream.answers.put(None)

    def _asked(self, message: kserve_pb2.ModelInferRequest) -> Inference | BucketServeError:
        """Returns what a request asks for, or what is wrong with it, which is reported."""
        try:
            return inference_of(message, self._max_prompt_bytes)
        except BucketServeError as error:
            self._on_refused(error)
            # Not with the frames that it came through, which have the message.
            return error.with_traceback(None)

    async def _run(
        self,
        stream: _Stream,
        label: str,
        asked: Inference | BucketServeError,
        metadata: Mapping[str, str],
        remaining_s: float | None,
    ) -> None:
        """Puts a request's responses into the stream, or what went wrong."""
        try:
            if isinstance(asked, BucketServeError):
                raise asked
            if self._is_leaving():
                raise UnavailableError("the gateway is shutting down", reason="DRAINING", retry_delay_s=1.0)
            # A request is a call like any other.
            with self._admission.call(stream.peer):
                answers = self._answers(asked, metadata, remaining_s)
                async with contextlib.aclosing(answers):
                    async for answer in answers:
                        await stream.answers.put(kserve_pb2.ModelStreamInferResponse(infer_response=answer))
            return
        except BucketServeError as error:
            status = status_of(error)
            text = f"{status.code.name}: {status.details}"
            if isinstance(error, OverloadedError | UnavailableError):
                text += f" (again in {error.retry_delay_s:g} s)"
        except Exception as error:
            self._on_unexpected("ModelStreamInfer", error)
            text = "INTERNAL: internal error"
        text = f"request {label}: {text}" if label else text
        failed = kserve_pb2.ModelInferResponse(id=label)
        failed.parameters["triton_final_response"].bool_param = True
        await stream.answers.put(kserve_pb2.ModelStreamInferResponse(error_message=text, infer_response=failed))

    async def _answers(
        self, asked: Inference, metadata: Mapping[str, str], remaining_s: float | None
    ) -> AsyncGenerator[kserve_pb2.ModelInferResponse, None]:
        """Yields the responses of a request, the last one with its finish reason.

        Raises:
            BucketServeError: it can't be served, or failed.
        """
        limits = [limit for limit in (remaining_s, asked.timeout_s) if limit is not None]
        model, texts = "", list[str]()
        events = self._generate(asked.request, metadata, min(limits, default=None))
        # What is collected counts as held, like prompts.
        with self._admission.room() as room:
            async with contextlib.aclosing(events):  # type: ignore[type-var]
                async for event in events:
                    match event.WhichOneof("event"):
                        case "started":
                            model = event.started.model
                        case "chunk" if asked.is_streamed and event.chunk.text:
                            yield asked.response(model, event.chunk.text)
                        case "chunk":
                            room.grow(text_bytes(event.chunk.text))
                            texts.append(event.chunk.text)
                        case "finished":
                            reason = finish_reason_from_pb(event.finished.reason).value
                            yield asked.response(model, "".join(texts), reason)

    def _model(self, name: str, version: str, context: Context) -> str:
        """Returns the name of the model that a name, which may be empty, stands for.

        Raises:
            ForbiddenError: the caller's key is not for it.
            UnknownModelError: there is none, or not in that version.
        """
        self._identify(text_metadata(context)).permit(inference_pb2.GetModelRequest(name=name))
        card = self._catalog.get(name).card
        check_version(name, version)
        return card.name


@dataclass(eq=False)
class _Stream:
    """A stream of requests that is open."""

    peer: str
    quiet_s: float = field(default_factory=time.monotonic)
    """Since when nothing runs on it."""
    runs: set[asyncio.Task[None]] = field(default_factory=set)
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_RUNS))
    answers: asyncio.Queue[kserve_pb2.ModelStreamInferResponse | None] = field(
        default_factory=lambda: asyncio.Queue(MAX_ANSWERS)
    )
    """None after the last one."""
    error: Exception | None = None
    """What ends it, after the answers that are there."""
    reader: asyncio.Task[None] | None = None

    def begin(self, run: Coroutine[Any, Any, None]) -> None:
        """Starts a request."""
        task = asyncio.create_task(run, name="infer")
        self.runs.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.runs.discard(task)
        self.quiet_s = time.monotonic()
        self.slots.release()

    def give_way(self, error: OverloadedError) -> None:
        """Ends it with an error; nothing runs on it."""
        self.error = error
        if self.reader is not None:
            self.reader.cancel()

    async def end(self) -> None:
        """Stops what still runs and returns when it has stopped."""
        tasks = [*self.runs, *([self.reader] if self.reader else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
