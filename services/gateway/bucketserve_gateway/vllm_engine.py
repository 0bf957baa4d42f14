"""vLLM's engine service, for routers that drive engines by it: a facade over InferenceServicer.generate.

Requests name no model, so there is an answer only where the gateway serves exactly one. Abort ends what was sent on the
same connection and nothing else: ids are labels of clients, who know nothing of each other's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from bucketserve import __version__
from bucketserve.core.errors import (
    BucketServeError,
    FieldViolation,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    UnknownModelError,
)
from bucketserve.facades import vllm_pb2, vllm_pb2_grpc
from bucketserve.rpc.convert import finish_reason_from_pb
from bucketserve.v1 import common_pb2, inference_pb2
from bucketserve_gateway.admission import Admission
from bucketserve_gateway.auth import Identity
from bucketserve_gateway.models import ModelCard, ModelCatalog, ServedModel
from bucketserve_gateway.requests import OpenRequests
from bucketserve_gateway.servicer import Generate, text_metadata
from bucketserve_gateway.validation import MAX_LOGIT_BIASES

__all__ = ["VllmEngineServicer", "request_of"]

MAX_ABORTS = 4096
"""Ids of one Abort."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "config.json", "generation_config.json"),
)
PIECE_BYTES = 64 << 10
CHUNK_COPIES = 3
"""Of a chunk's bytes while the whole is collected and sent: a message whose arrays grow by doubling, and bytes."""

Context = grpc.aio.ServicerContext[Any, Any]


def request_of(asked: vllm_pb2.GenerateRequest, card: ModelCard) -> inference_pb2.GenerateRequest:
    """Returns what a request for the model asks for.

    Raises:
        InvalidRequestError: with everything that it asks for and is not served.
    """
    params = asked.sampling_params
    bad = [
        FieldViolation(name, "not served")
        for name in ("kv_transfer_params", "kv_transfer_params_json", "mm_inputs", "media_refs")
        if asked.HasField(name)
    ]
    bad += [
        FieldViolation(f"sampling_params.{name}", "not served; leave it out")
        for name in ("prompt_logprobs", "truncate_prompt_tokens")
        if params.HasField(name)
    ]
    if params.min_tokens:
        bad.append(FieldViolation("sampling_params.min_tokens", "not served; leave it out, or at 0"))
    if asked.extra_mm_inputs:
        bad.append(FieldViolation("extra_mm_inputs", "not served"))
    if asked.data_parallel_rank:
        bad.append(FieldViolation("data_parallel_rank", "there is one rank: 0"))
    if len(params.logit_bias) > MAX_LOGIT_BIASES:
        bad.append(FieldViolation("sampling_params.logit_bias", f"at most {MAX_LOGIT_BIASES}"))
    elif any(token_id < 0 for token_id in params.logit_bias):
        bad.append(FieldViolation("sampling_params.logit_bias", "token ids must not be negative"))
    if params.HasField("structural_tag"):
        bad.append(FieldViolation("sampling_params.structural_tag", "not served"))
    if params.n > 1:
        bad.append(FieldViolation("sampling_params.n", "one output a request"))
    bad += [
        FieldViolation(f"sampling_params.{name}", "must not be negative")
        for name in ("logprobs", "seed")
        if getattr(params, name) < 0
    ]
    num_ids = len(asked.tokenized.input_ids)
    if num_ids >= card.context_tokens:
        # Counted before they are copied.
        description = f"{num_ids} tokens fill the context of {card.context_tokens}"
        bad.append(FieldViolation("tokenized.input_ids", description))
    if bad:
        raise InvalidRequestError(bad)
    request = inference_pb2.GenerateRequest(
        structured_output=_structure(params),
        request_id=asked.request_id,
        model=card.name,
        sampling=common_pb2.SamplingParams(
            # Who leaves it out means the engine's default.
            temperature=params.temperature if params.HasField("temperature") else 1.0,
            top_p=params.top_p or None,
            top_k=params.top_k,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty or None,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=params.logit_bias,
            seed=params.seed if params.HasField("seed") else None,
        ),
        stopping=common_pb2.StoppingParams(
            max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
            stop_strings=params.stop,
            stop_token_ids=params.stop_token_ids,
            ignore_eos=params.ignore_eos,
        ),
        response=inference_pb2.ResponseOptions(num_logprobs=params.logprobs if params.HasField("logprobs") else None),
    )
    match asked.WhichOneof("input"):
        case "tokenized":
            request.token_ids.ids.extend(asked.tokenized.input_ids)
            request.token_ids.SetInParent()
        case "text":
            request.prompt = asked.text
    return request


def _structure(params: vllm_pb2.SamplingParams) -> common_pb2.StructuredOutput | None:
    """Returns what the output must be; None if it may be anything."""
    match params.WhichOneof("constraint"):
        case "json_schema" | "regex" | "grammar" as kind:
            return common_pb2.StructuredOutput(**{kind: getattr(params, kind)})
        case "json_object" if params.json_object:
            return common_pb2.StructuredOutput(json_schema='{"type":"object"}')
        case "choice":
            return common_pb2.StructuredOutput(choices=common_pb2.Choices(texts=params.choice.choices))
    return None


class VllmEngineServicer(vllm_pb2_grpc.VllmEngineServicer):
    """Translates; what it owns is which requests an Abort may end."""

    def __init__(
        self,
        generate: Generate,
        catalog: ModelCatalog,
        admission: Admission,
        requests: OpenRequests,
        *,
        identify: Callable[[Mapping[str, str]], Identity],
        is_serving: Callable[[], bool],
        on_refused: Callable[[BucketServeError], None],
    ) -> None:
        """Takes what serves the requests, the table of those that are open, and who calls, by a call's metadata.

        Reports what never gets there.
        """
        self._generate = generate
        self._catalog = catalog
        self._admission = admission
        self._requests = requests
        self._identify = identify
        self._is_serving = is_serving
        self._on_refused = on_refused
        self._started_s = time.monotonic()
        self._runs: dict[tuple[str, str], set[_Run]] = {}
        """By connection and request id; there may be several of a name."""
        self._archives: dict[str, bytes] = {}
        """Of the tokenizers of models, once somebody has asked for them."""
        self._archiving = asyncio.Lock()

    async def Generate(
        self, request: vllm_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[vllm_pb2.GenerateResponse]:
        """Chunks if asked for, then complete: with all tokens if there were no chunks."""
        is_streamed = request.stream
        try:
            asked = request_of(request, self._model(context).card)
        except BucketServeError as error:
            self._on_refused(error)
            raise
        with_top = bool(asked.response.num_logprobs)
        complete = vllm_pb2.GenerateComplete(finish_reason="abort")
        with self._admission.room() as room:
            with self._run(context.peer(), request.request_id) as run:
                del request
                events = self._generate(asked, text_metadata(context), context.time_remaining())
                async with contextlib.aclosing(events):  # type: ignore[type-var]
                    while (event := await run.following(events)) is not None:
                        match event.WhichOneof("event"):
                            case "started":
                                complete.prompt_tokens = event.started.prompt_tokens
                            case "chunk":
                                complete.completion_tokens += len(event.chunk.token_ids)
                                if is_streamed and event.chunk.token_ids:
                                    yield _chunk(event.chunk, complete.prompt_tokens, with_top)
                                elif not is_streamed:
                                    room.grow(event.chunk.ByteSize() * CHUNK_COPIES)
                                    complete.output_ids.extend(event.chunk.token_ids)
                                    _add_logprobs(complete, event.chunk, with_top)
                            case "finished":
                                _finish(complete, event.finished)
            yield vllm_pb2.GenerateResponse(complete=complete)

    async def Abort(self, request: vllm_pb2.AbortRequest, context: Context) -> vllm_pb2.AbortResponse:
        """Ends requests of the same connection; nobody learns whether an id names anything."""
        if len(request.request_ids) > MAX_ABORTS:
            raise InvalidRequestError([FieldViolation("request_ids", f"at most {MAX_ABORTS}")])
        peer = context.peer()
        for request_id in request.request_ids:
            for run in self._runs.get((peer, request_id), ()):
                run.abort()
        return vllm_pb2.AbortResponse()

    async def HealthCheck(self, request: vllm_pb2.HealthCheckRequest, context: Context) -> vllm_pb2.HealthCheckResponse:
        """As the health service says."""
        is_serving = self._is_serving()
        message = "serving" if is_serving else "no scheduler leads, or the gateway is shutting down"
        return vllm_pb2.HealthCheckResponse(healthy=is_serving, message=message)

    async def GetModelInfo(
        self, request: vllm_pb2.GetModelInfoRequest, context: Context
    ) -> vllm_pb2.GetModelInfoResponse:
        """The model; no path of a tokenizer: GetTokenizer has what is there."""
        card = self._model(context).card
        return vllm_pb2.GetModelInfoResponse(
            model_path=card.name,
            is_generation=True,
            max_context_length=card.context_tokens,
            vocab_size=card.vocab_size,
            served_model_name=card.name,
            eos_token_ids=card.eos_token_ids,
            max_req_input_len=card.context_tokens,
        )

    async def GetServerInfo(
        self, request: vllm_pb2.GetServerInfoRequest, context: Context
    ) -> vllm_pb2.GetServerInfoResponse:
        """The gateway."""
        return vllm_pb2.GetServerInfoResponse(
            active_requests=len(self._requests),
            uptime_seconds=time.monotonic() - self._started_s,
            server_type="bucketserve",
            data_parallel_size=1,
        )

    async def GetLoads(self, request: vllm_pb2.GetLoadsRequest, context: Context) -> vllm_pb2.GetLoadsResponse:
        """What this gateway has open."""
        running = [opened for opened in self._requests if opened.worker_id]
        load = vllm_pb2.SchedulerLoad(
            num_running_reqs=len(running),
            num_waiting_reqs=len(self._requests) - len(running),
            num_total_reqs=len(self._requests),
            num_used_tokens=sum(len(opened.prompt_ids) + len(opened.tokens) for opened in running),
        )
        return vllm_pb2.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(), version=__version__, dp_rank_count=1, loads=[load]
        )

    async def GetTokenizer(
        self, request: vllm_pb2.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[vllm_pb2.GetTokenizerChunk]:
        """The archive, which is made when it is first wanted and the same at every gateway."""
        model = self._model(context)
        if model.directory is None:
            raise NotFoundError("tokenizer", model.card.name)
        async with self._archiving:
            if model.card.name not in self._archives:
                self._archives[model.card.name] = await asyncio.to_thread(_archive_of, model.directory)
        archive = self._archives[model.card.name]
        for start in range(0, len(archive), PIECE_BYTES):
            piece = vllm_pb2.GetTokenizerChunk(data=archive[start : start + PIECE_BYTES])
            if start + PIECE_BYTES >= len(archive):
                piece.sha256 = hashlib.sha256(archive).hexdigest()
            yield piece

    def _model(self, context: Context) -> ServedModel:
        """Returns the only model that the caller's key is for.

        Raises:
            ForbiddenError: there is none.
            UnknownModelError: there are several.
        """
        identity = self._identify(text_metadata(context))
        models = [model for model in self._catalog.models() if identity.may_use(model.card.name)]
        if not models:
            raise ForbiddenError("this key is for no model here")
        if len(models) != 1:
            names = [model.card.name for model in models]
            message = (
                "requests of vllm.grpc.engine.VllmEngine name no model, so they need a gateway that serves exactly "
                f"one, or a key that is for one; here there are {', '.join(names)}"
            )
            raise UnknownModelError("", names, message)
        return models[0]

    @contextlib.contextmanager
    def _run(self, peer: str, request_id: str) -> Iterator[_Run]:
        """Around a request: meanwhile Abort finds it."""
        key, run = (peer, request_id), _Run()
        self._runs.setdefault(key, set()).add(run)
        try:
            yield run
        finally:
            self._runs[key].discard(run)
            if not self._runs[key]:
                del self._runs[key]


class _Run:
    """A request that may be aborted while it waits for its next event."""

    def __init__(self) -> None:
        """Is not aborted."""
        self._is_aborted = False
        self._wait: asyncio.Timeout | None = None

    def abort(self) -> None:
        """Makes the present call of following(), and any later one, return None."""
        if not self._is_aborted and self._wait is not None:
            self._wait.reschedule(asyncio.get_running_loop().time())
        self._is_aborted = True

    async def following(
        self, events: AsyncIterator[inference_pb2.GenerateResponse]
    ) -> inference_pb2.GenerateResponse | None:
        """Returns the next event; None after the last one, or if the request is aborted."""
        if self._is_aborted:
            return None
        try:
            async with asyncio.timeout(None) as self._wait:
                return await anext(events, None)
        except TimeoutError:
            return None
        finally:
            self._wait = None


def _archive_of(directory: Path) -> bytes:
    """Returns a ZIP archive of a tokenizer's files; equal files make equal archives."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                # Without the times of the files.
                entry = zipfile.ZipInfo(name)
                entry.compress_type = zipfile.ZIP_DEFLATED
                writer.writestr(entry, (directory / name).read_bytes())
    return archive.getvalue()


def _chunk(chunk: inference_pb2.GenerateChunk, prompt_tokens: int, with_top: bool) -> vllm_pb2.GenerateResponse:
    answer = vllm_pb2.GenerateStreamChunk(
        token_ids=chunk.token_ids, prompt_tokens=prompt_tokens, completion_tokens=len(chunk.token_ids)
    )
    _add_logprobs(answer, chunk, with_top)
    return vllm_pb2.GenerateResponse(chunk=answer)


def _add_logprobs(
    answer: vllm_pb2.GenerateStreamChunk | vllm_pb2.GenerateComplete,
    chunk: inference_pb2.GenerateChunk,
    with_top: bool,
) -> None:
    for position in chunk.logprobs:
        answer.output_logprobs.token_logprobs.append(position.chosen.logprob)
        answer.output_logprobs.token_ids.append(position.chosen.token_id)
        if with_top:
            answer.output_logprobs.top_logprobs.add(
                values=[top.logprob for top in position.top], token_ids=[top.token_id for top in position.top]
            )


def _finish(complete: vllm_pb2.GenerateComplete, finished: inference_pb2.GenerateFinished) -> None:
    complete.finish_reason = finish_reason_from_pb(finished.reason).value
    complete.cached_tokens = finished.usage.cached_prompt_tokens
    if finished.matched_stop:
        complete.matched_stop_str = finished.matched_stop
    elif finished.HasField("matched_stop_token_id"):
        complete.matched_token_id = finished.matched_stop_token_id
