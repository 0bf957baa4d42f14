"""DeliveryService: workers bring the tokens of many requests; stops and acknowledgements go back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.interceptors import first_message
from bucketserve.rpc.outbox import Outbox
from bucketserve.tasks import end_task
from bucketserve.v1 import delivery_pb2, delivery_pb2_grpc
from bucketserve_gateway.requests import OpenRequest, OpenRequests

__all__ = ["DeliveryServicer"]

OUTBOX_LIMIT = 65_536

Deliveries = AsyncIterator[delivery_pb2.DeliverRequest]
Context = grpc.aio.ServicerContext[delivery_pb2.DeliverRequest, delivery_pb2.DeliverResponse]
Response = delivery_pb2.DeliverResponse


class DeliveryServicer(delivery_pb2_grpc.DeliveryServiceServicer):
    """Hands deliveries to the requests that they belong to."""

    def __init__(self, requests: OpenRequests, deployment: Deployment) -> None:
        """Reads the table; owns only the workers' streams."""
        self._deployment = deployment
        self._requests = requests
        self._outboxes: dict[str, list[Outbox[Response]]] = {}
        """By worker id. Workers of two models may have the same; and an older stream may not know yet that it broke."""

    def stop(self, opened: OpenRequest) -> None:
        """Tells the worker that runs a request to stop it."""
        # Whoever has no such run lets that be.
        for outbox in self._outboxes.get(opened.worker_id, ()):
            outbox.send(Response(stopped_run_ids=[opened.run_id]))

    def close(self) -> None:
        """Ends all streams."""
        for outboxes in self._outboxes.values():
            for outbox in outboxes:
                outbox.close()

    async def Deliver(self, request_iterator: Deliveries, context: Context) -> AsyncIterator[Response]:
        """One stream per worker."""
        self._deployment.check(context.invocation_metadata())
        first = await first_message(request_iterator)
        # Answered before there is output: else the worker's call waits for it, with a task, for as long as it is idle.
        await context.send_initial_metadata(())
        outbox: Outbox[Response] = Outbox(OUTBOX_LIMIT)
        self._outboxes.setdefault(first.worker_id, []).append(outbox)
        reader = asyncio.create_task(self._read(request_iterator, first, outbox))
        try:
            async for response in outbox.messages():
                yield response
        finally:
            outboxes = self._outboxes[first.worker_id]
            outboxes.remove(outbox)
            if not outboxes:
                del self._outboxes[first.worker_id]
            await end_task(reader, grpc.RpcError)

    async def _read(self, deliveries: Deliveries, hello: delivery_pb2.DeliverRequest, outbox: Outbox[Response]) -> None:
        num_received = 0
        try:
            async for message in deliveries:
                num_received += 1
                stopped = [delivery.run_id for delivery in message.deliveries if not self._is_wanted(delivery, hello)]
                outbox.send(Response(stopped_run_ids=stopped, num_received=num_received))
        finally:
            outbox.close()

    def _is_wanted(self, delivery: delivery_pb2.TokenDelivery, hello: delivery_pb2.DeliverRequest) -> bool:
        """Hands a delivery of the worker that said hello over; returns False if its worker should stop.

        Whoever knows a run id was told it by the scheduler: nobody can deliver for a run that was not given to him.
        """
        opened = self._requests.get(delivery.run_id)
        is_wanted = opened is not None and opened.deliver(delivery, hello.worker_id, hello.fingerprint)
        return is_wanted or delivery.HasField("finished")
