"""InferenceService. Generate is the life of a request, from top to bottom."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.trace import Span

from bucketserve.core.errors import BucketServeError, FieldViolation, InvalidRequestError
from bucketserve.v1 import inference_pb2, inference_pb2_grpc, scheduler_pb2
from bucketserve_gateway.admission import Admission, Room
from bucketserve_gateway.auth import Keys
from bucketserve_gateway.delivery import DeliveryServicer
from bucketserve_gateway.models import ModelCatalog
from bucketserve_gateway.prefixes import prefix_salt
from bucketserve_gateway.quotas import Quotas
from bucketserve_gateway.requests import OpenRequest, OpenRequests, too_late
from bucketserve_gateway.scheduler_link import SchedulerLinks
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_gateway.telemetry import GatewayTelemetry
from bucketserve_gateway.tokenizer_pool import TokenizerPool
from bucketserve_gateway.validation import ValidRequest, check_length, validate

__all__ = ["GatewayParts", "Generate", "InferenceServicer", "text_metadata"]

TEXT_COPIES = 4
"""Of a request's bytes while it is open: the message, its strings."""
BYTES_PER_TOKEN = 48
"""Of a prompt token: a Python integer, its places in a tuple and in the scheduler's record."""
RETRY_S, MOST_RETRY_S = 0.2, 5.0
"""Before the third attempt of a request, and twice as long before each further one, up to the second."""

Generate = Callable[
    [inference_pb2.GenerateRequest, Mapping[str, str], float | None], AsyncIterator[inference_pb2.GenerateResponse]
]
"""InferenceServicer.generate, for whoever else takes requests in."""

GenerateContext = grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]
TokenizeContext = grpc.aio.ServicerContext[inference_pb2.TokenizeRequest, inference_pb2.TokenizeResponse]
ListContext = grpc.aio.ServicerContext[inference_pb2.ListModelsRequest, inference_pb2.ListModelsResponse]
GetContext = grpc.aio.ServicerContext[inference_pb2.GetModelRequest, inference_pb2.GetModelResponse]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayParts:
    """What the servicer works with."""

    settings: GatewaySettings
    gateway_id: str
    delivery_address: str
    catalog: ModelCatalog
    keys: Keys
    admission: Admission
    quotas: Quotas
    tokenizers: TokenizerPool
    requests: OpenRequests
    schedulers: SchedulerLinks
    delivery: DeliveryServicer
    telemetry: GatewayTelemetry


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """The public API."""

    def __init__(self, parts: GatewayParts) -> None:
        """Opens nothing."""
        self._parts = parts

    def Generate(
        self, request: inference_pb2.GenerateRequest, context: GenerateContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """One request of a client."""
        return self.generate(request, text_metadata(context), context.time_remaining())

    async def generate(
        self, request: inference_pb2.GenerateRequest, metadata: Mapping[str, str], remaining_s: float | None
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Validate, tokenise, submit, stream, finish. Leaving early, for whatever reason, stops the work everywhere.

        Args:
            request: what is asked for.
            metadata: the caller's, for its trace context.
            remaining_s: seconds until nobody waits any more; None for never.

        Raises:
            BucketServeError: it can't be served, or failed.
        """
        parts = self._parts
        with ExitStack() as end:
            span = parts.telemetry.begin(request, metadata)
            end.callback(span.end)
            room = end.enter_context(parts.admission.room())
            opened = await self._open(request, remaining_s, span, room)
            end.callback(self._close, opened, span)
            if opened.deadline_s is not None:
                # The scheduler drops it as well, unless it is one that took over: of what runs it knows no deadlines.
                left_s = opened.deadline_s - time.monotonic()
                end.callback(asyncio.get_running_loop().call_later(left_s, self._expire, opened).cancel)
            scheduler = parts.schedulers.of(opened.model)
            scheduler.submit(opened)
            await opened.accepted(parts.settings.scheduler_wait_s, lambda: scheduler.problem)
            yield inference_pb2.GenerateResponse(started=_started(opened))
            async for chunk in opened.chunks():
                yield inference_pb2.GenerateResponse(chunk=chunk)
            # Everything is booked before the client sees the end: it may hang up at once.
            end.close()
            yield inference_pb2.GenerateResponse(finished=opened.finished)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: TokenizeContext
    ) -> inference_pb2.TokenizeResponse:
        """The ids that Generate would see; a text that can't fit the context is refused as there."""
        generate = inference_pb2.GenerateRequest(model=request.model)
        match request.WhichOneof("input"):
            case "prompt":
                generate.prompt = request.prompt
            case "chat":
                generate.chat.CopyFrom(request.chat)
        with self._parts.admission.room() as room:
            room.resize(request.ByteSize() * TEXT_COPIES)
            valid = validate(generate, self._parts.catalog, max_prompt_bytes=self._parts.settings.max_prompt_bytes)
            token_ids = await self._tokenize(valid)
            room.grow(len(token_ids) * BYTES_PER_TOKEN)
            return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: ListContext
    ) -> inference_pb2.ListModelsResponse:
        """All models."""
        return inference_pb2.ListModelsResponse(models=[card.to_pb() for card in self._parts.catalog.cards()])

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: GetContext
    ) -> inference_pb2.GetModelResponse:
        """One model."""
        if not request.name:
            raise InvalidRequestError([FieldViolation("name", "must not be empty")])
        return inference_pb2.GetModelResponse(model=self._parts.catalog.get(request.name).card.to_pb())

    async def _open(
        self, request: inference_pb2.GenerateRequest, remaining_s: float | None, span: Span, room: Room
    ) -> OpenRequest:
        """Returns the request, validated, tokenised, counted in `room` and in the table.

        Raises:
            BucketServeError: it can't be served; nothing of it reached the scheduler.
        """
        parts, settings = self._parts, self._parts.settings
        arrival_s, num_bytes = time.monotonic(), request.ByteSize()
        try:
            async with asyncio.timeout(remaining_s):
                room.resize(num_bytes * TEXT_COPIES)
                valid = validate(request, parts.catalog, max_prompt_bytes=settings.max_prompt_bytes)
                with parts.telemetry.tokenizing(span):
                    prompt_ids = await self._tokenize(valid)
                await parts.tokenizers.check_structure(valid.model, valid.structured_output)
                room.resize(num_bytes * TEXT_COPIES + len(prompt_ids) * BYTES_PER_TOKEN)
                max_tokens = check_length(prompt_ids, valid.max_tokens, valid.model.card, _input_field(valid))
                charge = await parts.quotas.take(valid.tenant, len(prompt_ids) + max_tokens)
        except (BucketServeError, TimeoutError) as failed:
            error = failed if isinstance(failed, BucketServeError) else too_late()
            parts.telemetry.refused("", "", error)
            raise error from None
        ticket, spec = self._describe(valid)
        ticket.traceparent, ticket.tracestate = parts.telemetry.context(span)
        spec.traceparent, spec.tracestate = ticket.traceparent, ticket.tracestate
        opened = OpenRequest(
            valid,
            prompt_ids,
            max_tokens,
            ticket,
            spec,
            max_attempts=settings.max_attempts,
            # Each alternative that is reported is as large as a token.
            max_pending_tokens=settings.output_queue_tokens // (1 + (valid.num_logprobs or 0)),
            resume=self._resume,
        )
        opened.charge = charge
        opened.arrival_s = arrival_s
        opened.deadline_s = None if remaining_s is None else arrival_s + remaining_s
        parts.requests.add(opened)
        parts.telemetry.opened(opened)
        return opened

    def _expire(self, opened: OpenRequest) -> None:
        """Ends a request whose deadline has passed, and its work, though its client may not look for it."""
        if not opened.is_over:
            opened.expire()
            self._stop(opened)

    def _close(self, opened: OpenRequest, span: Span) -> None:
        """Takes a request out of the table; what still runs of it is stopped."""
        parts = self._parts
        parts.requests.remove(opened)
        is_begun = opened.worker_id or opened.tokens
        parts.quotas.settle(opened.charge, len(opened.prompt_ids) + len(opened.tokens) if is_begun else 0)
        if opened.finished is None:
            self._stop(opened)
        parts.telemetry.closed(opened, span)

    def _stop(self, opened: OpenRequest) -> None:
        """Tells scheduler and worker that a request is over."""
        self._parts.schedulers.of(opened.model).cancel(opened.run_id)
        self._parts.delivery.stop(opened)

    def _resume(self, opened: OpenRequest, former: str) -> None:
        """Submits the next attempt: the second at once, further ones after a while, since something may be wrong.

        Nothing is where a worker made room: such a one goes on at once, and is none of those counted.
        """
        parts = self._parts
        parts.requests.resumed(opened, former)
        scheduler = parts.schedulers.of(opened.model)
        scheduler.cancel(former)
        parts.telemetry.resumed(opened)
        number = opened.attempt - opened.num_preemptions
        if opened.was_preempted or number <= 2:
            scheduler.submit(opened)
            return
        delay_s = min(RETRY_S * 2.0 ** min(number - 3, 16), MOST_RETRY_S)
        asyncio.get_running_loop().call_later(delay_s, self._submit_if_open, opened, opened.run_id)

    def _submit_if_open(self, opened: OpenRequest, run_id: str) -> None:
        if self._parts.requests.get(run_id) is opened and not opened.is_over:
            self._parts.schedulers.of(opened.model).submit(opened)

    async def _tokenize(self, valid: ValidRequest) -> Sequence[int]:
        if valid.token_ids is not None:
            return valid.token_ids
        if valid.chat is not None:
            return await self._parts.tokenizers.encode_chat(valid.model, valid.chat, valid.tools)
        return await self._parts.tokenizers.encode(valid.model, valid.prompt or "")

    def _describe(self, valid: ValidRequest) -> tuple[scheduler_pb2.Ticket, scheduler_pb2.RunSpec]:
        """Returns what the scheduler and what workers need to know of a request in all its attempts."""
        ticket = scheduler_pb2.Ticket(
            model=valid.model.base_name,
            adapter=valid.model.adapter,
            request_class=valid.request_class,
            tenant=valid.tenant,
            slo=valid.slo,
            gateway_id=self._parts.gateway_id,
            context_tokens=valid.model.card.context_tokens,
            tokenizer=valid.model.fingerprint,
            needs_grammar=valid.structured_output.WhichOneof("constraint") is not None,
        )
        spec = scheduler_pb2.RunSpec(
            request_class=valid.request_class,
            sampling=valid.sampling,
            structured_output=valid.structured_output if ticket.needs_grammar else None,
            stop_token_ids=valid.stop_token_ids,
            num_logprobs=valid.num_logprobs,
            delivery_address=self._parts.delivery_address,
            tpot_ms=valid.slo.tpot_ms if valid.slo.HasField("tpot_ms") else None,
            prefix_salt=prefix_salt("" if self._parts.settings.share_prefixes else valid.tenant, valid.model.adapter),
            adapter=valid.model.adapter,
        )
        return ticket, spec


def _started(opened: OpenRequest) -> inference_pb2.GenerateStarted:
    return inference_pb2.GenerateStarted(
        request_id=opened.label,
        model=opened.valid.model.card.name,
        prompt_tokens=len(opened.prompt_ids),
        seed=opened.valid.sampling.seed,
    )


def _input_field(valid: ValidRequest) -> str:
    if valid.token_ids is not None:
        return "token_ids.ids"
    return "chat" if valid.chat is not None else "prompt"


def text_metadata(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    """Returns the call's metadata that is text."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
