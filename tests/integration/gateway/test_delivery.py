"""Streams of workers to a gateway."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import grpc

from bucketserve.rpc.deployment import Deployment
from bucketserve.v1 import delivery_pb2, delivery_pb2_grpc
from bucketserve_gateway.delivery import DeliveryServicer
from bucketserve_worker.delivery import DeliveryPool
from tests.e2e.observe import eventually


class Counted(DeliveryServicer):
    """Counts the streams that were opened."""

    num_streams = 0

    async def Deliver(self, request_iterator, context):
        self.num_streams += 1
        async for response in super().Deliver(request_iterator, context):
            yield response


class Run:
    """An open request that keeps its output."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def deliver(self, delivery: delivery_pb2.TokenDelivery, worker_id: str, fingerprint: str) -> bool:
        assert (worker_id, delivery.first_index) == ("w", len(self.tokens))
        self.tokens += delivery.token_ids
        return True


async def test_workers_of_two_models_may_have_one_id() -> None:
    runs = {"a": Run(), "b": Run()}
    gateway = Counted(SimpleNamespace(get=runs.get), Deployment())
    server = grpc.aio.server()
    delivery_pb2_grpc.add_DeliveryServiceServicer_to_server(gateway, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    stopped: dict[str, list[str]] = {name: [] for name in runs}
    pools = {
        name: DeliveryPool(
            "w",
            Deployment(),
            fingerprint=lambda: "f",
            flush_s=0.001,
            give_up_s=30.0,
            on_stop=stopped[name].extend,
            on_lost=lambda address, run_ids: None,
        )
        for name in runs
    }
    for index in range(60):
        for name, pool in pools.items():
            pool.send(address, delivery_pb2.TokenDelivery(run_id=name, first_index=index, token_ids=[index]))
        await asyncio.sleep(0.02)
    await eventually(lambda: all(run.tokens == list(range(60)) for run in runs.values()))
    assert gateway.num_streams == 2
    gateway.stop(SimpleNamespace(run_id="a", worker_id="w"))
    await eventually(lambda: "a" in stopped["a"])
    # The end of one is not the other's.
    await pools.pop("a").close()
    gateway.stop(SimpleNamespace(run_id="b", worker_id="w"))
    await eventually(lambda: "b" in stopped["b"])
    await pools.pop("b").close()
    await eventually(lambda: not gateway._outboxes)
    gateway.stop(SimpleNamespace(run_id="b", worker_id="w"))
    await server.stop(0)
