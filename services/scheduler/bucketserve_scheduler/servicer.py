"""SchedulerService: the streams of gateways and workers, each reduced to posting to a loop and emptying an outbox."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import grpc

from bucketserve.core.errors import FieldViolation, InvalidRequestError
from bucketserve.core.types import RequestId
from bucketserve.rpc.convert import role_from_pb, role_to_pb
from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.interceptors import first_message
from bucketserve.rpc.outbox import Outbox
from bucketserve.tasks import end_task
from bucketserve.v1 import scheduler_pb2, scheduler_pb2_grpc
from bucketserve_scheduler.loop import SchedulingLoop
from bucketserve_scheduler.models import ServedModel, ServedModels
from bucketserve_scheduler.peers import GatewayPeer, WorkerPeer
from bucketserve_scheduler.settings import SchedulerSettings

__all__ = ["SchedulerServicer"]

GATEWAY_OUTBOX_LIMIT = 65_536
HEARTBEAT_S = 0.5
MOST_CONTEXT_TOKENS = 1 << 28
"""Lengths are sorted into cells up to there: what is far beyond every model is a mistake."""

M = TypeVar("M")

SubmitRequests = AsyncIterator[scheduler_pb2.SubmitRequest]
WorkRequests = AsyncIterator[scheduler_pb2.WorkRequest]
SubmitContext = grpc.aio.ServicerContext[scheduler_pb2.SubmitRequest, scheduler_pb2.SubmitResponse]
WorkContext = grpc.aio.ServicerContext[scheduler_pb2.WorkRequest, scheduler_pb2.WorkResponse]
StatusContext = grpc.aio.ServicerContext[scheduler_pb2.GetStatusRequest, scheduler_pb2.GetStatusResponse]


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Speaks to gateways and workers; decides nothing."""

    def __init__(
        self,
        *,
        settings: SchedulerSettings,
        deployment: Deployment,
        scheduler_id: str,
        models: ServedModels,
        clock: Callable[[], float],
    ) -> None:
        """clock: seconds, never going back."""
        self._settings = settings
        self._deployment = deployment
        self._scheduler_id = scheduler_id
        self._models = models
        self._clock = clock

    async def Submit(
        self, request_iterator: SubmitRequests, context: SubmitContext
    ) -> AsyncIterator[scheduler_pb2.SubmitResponse]:
        """One stream per gateway and model."""
        self._deployment.check(context.invocation_metadata())
        hello = (await first_message(request_iterator)).hello
        _check("hello", gateway_id=hello.gateway_id, model=hello.model)
        model = self._models.of(hello.model)
        await model.check_led_here()
        peer = GatewayPeer(hello.gateway_id, Outbox(GATEWAY_OUTBOX_LIMIT), hello.instance)
        model.gateways.connect(peer)
        reader = asyncio.create_task(_read_gateway(request_iterator, model, peer))
        beat = asyncio.create_task(
            _beat(peer.outbox, lambda: scheduler_pb2.SubmitResponse(heartbeat=_heartbeat(model)))
        )
        try:
            yield scheduler_pb2.SubmitResponse(hello=model.hello())
            yield scheduler_pb2.SubmitResponse(adapters=model.gateways.adapters)
            async for message in peer.outbox.messages():
                yield message
        finally:
            beat.cancel()
            model.gateways.disconnect(peer, self._clock())
            await end_task(reader, grpc.RpcError)

    async def Work(
        self, request_iterator: WorkRequests, context: WorkContext
    ) -> AsyncIterator[scheduler_pb2.WorkResponse]:
        """One stream per worker."""
        self._deployment.check(context.invocation_metadata())
        hello = (await first_message(request_iterator)).hello
        _check("hello", worker_id=hello.worker_id, model=hello.model, context_tokens=hello.context_tokens)
        role_from_pb(hello.role)
        model = self._models.of(hello.model)
        await model.check_led_here()
        loop = model.loop_for(hello.context_tokens)
        peer = await loop.connect(hello)
        reader = asyncio.create_task(self._read_worker(request_iterator, loop, peer))
        beat = asyncio.create_task(_beat(peer.outbox, lambda: scheduler_pb2.WorkResponse(heartbeat=_heartbeat(model))))
        try:
            yield scheduler_pb2.WorkResponse(
                welcome=scheduler_pb2.WorkerWelcome(
                    scheduler=model.hello(),
                    report_interval_ms=round(self._settings.report_interval_s * 1e3),
                )
            )
            async for message in peer.outbox.messages():
                yield message
        finally:
            beat.cancel()
            try:
                await end_task(reader, grpc.RpcError)
            finally:
                await loop.disconnect(peer)

    async def GetStatus(
        self, request: scheduler_pb2.GetStatusRequest, context: StatusContext
    ) -> scheduler_pb2.GetStatusResponse:
        """What the scheduler sees."""
        return scheduler_pb2.GetStatusResponse(
            scheduler_id=self._scheduler_id,
            models=[
                self._model_status(model, model.loop)
                for model in self._models.all()
                if model.is_led_here and model.loop is not None
            ],
        )

    async def tell_adapters(self) -> None:
        """Tells gateways which adapters there are, for ever."""
        while True:
            for model in self._models.all():
                model.tell_adapters()
            await asyncio.sleep(HEARTBEAT_S)

    async def _read_worker(self, requests: WorkRequests, loop: SchedulingLoop, peer: WorkerPeer) -> None:
        try:
            async for message in requests:
                await loop.hear(peer, message)
        finally:
            peer.outbox.close()

    def _model_status(self, model: ServedModel, loop: SchedulingLoop) -> scheduler_pb2.ModelStatus:
        now_s = self._clock()
        view = loop.core.status()
        return scheduler_pb2.ModelStatus(
            model=loop.model,
            buckets=[
                scheduler_pb2.BucketStatus(
                    low_tokens=bucket.bucket.low,
                    high_tokens=bucket.bucket.high,
                    num_waiting=bucket.num_waiting,
                    waiting_tokens=bucket.waiting_tokens,
                )
                for bucket in view.buckets
            ],
            workers=[
                scheduler_pb2.WorkerStatus(
                    worker_id=peer.worker_id,
                    role=role_to_pb(view.roles.get(worker_id, role_from_pb(peer.hello.role))),
                    engine=peer.hello.engine,
                    report=peer.report,
                    report_age_ms=max(round((now_s - peer.reported_s) * 1e3), 0),
                    is_draining=peer.is_draining,
                )
                for worker_id, peer in sorted(loop.workers.items())
            ],
            num_waiting=view.num_waiting,
            num_running=view.num_running,
            policy=self._settings.policy,
            num_finished=loop.num_finished,
            num_batches=loop.num_batches,
            scheduler=model.hello(),
        )


async def _read_gateway(requests: SubmitRequests, model: ServedModel, peer: GatewayPeer) -> None:
    try:
        async for message in requests:
            if message.WhichOneof("message") == "run":
                ticket = message.run.ticket
                _check(
                    "run.ticket",
                    run_id=ticket.run_id,
                    model=ticket.model == model.name,
                    prompt_tokens=ticket.prompt_tokens,
                    max_new_tokens=ticket.max_new_tokens,
                    gateway_id=ticket.gateway_id,
                    context_tokens=ticket.context_tokens,
                )
                _check("run", spec=message.run.spec)
                await model.loop_for(ticket.context_tokens).submit(message.run)
            elif message.WhichOneof("message") == "cancel" and model.loop is not None:
                await model.loop.cancel(RequestId(message.cancel.run_id))
    finally:
        peer.outbox.close()


def _check(message: str, *, context_tokens: int = 1, **required: object) -> None:
    """Refuses a message that lacks what everything else builds on.

    Raises:
        InvalidRequestError: with every field that is missing, or a context that nothing can have.
    """
    bad = [FieldViolation(f"{message}.{name}", "must be set") for name, value in required.items() if not value]
    if not 0 < context_tokens <= MOST_CONTEXT_TOKENS:
        bad.append(FieldViolation(f"{message}.context_tokens", f"1 to {MOST_CONTEXT_TOKENS:,}"))
    if bad:
        raise InvalidRequestError(bad)


def _heartbeat(model: ServedModel) -> scheduler_pb2.Heartbeat:
    return scheduler_pb2.Heartbeat(problem=model.seat.problem)


async def _beat(outbox: Outbox[M], heartbeat: Callable[[], M]) -> None:
    """Says that we are alive, until the stream ends."""
    while not outbox.is_closed:
        await asyncio.sleep(HEARTBEAT_S)
        outbox.send(heartbeat())
