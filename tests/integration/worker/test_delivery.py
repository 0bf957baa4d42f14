"""Output reaches its gateway whatever happens to the streams."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import grpc
import pytest

from bucketserve.rpc.deployment import Deployment
from bucketserve.store.embedded import free_port
from bucketserve.v1 import delivery_pb2, delivery_pb2_grpc
from bucketserve_worker import delivery as delivery_module
from bucketserve_worker.delivery import DeliveryPool
from tests.e2e.observe import eventually


class RestlessGateway(delivery_pb2_grpc.DeliveryServiceServicer):
    """Ends every stream after a few messages, in peace or not; keeps what it has been given."""

    def __init__(self, how: str) -> None:
        self.how, self.num_streams = how, 0
        self.tokens: dict[str, list[int]] = {}
        self._rng = random.Random(3)

    async def Deliver(self, request_iterator, context) -> AsyncIterator[delivery_pb2.DeliverResponse]:
        self.num_streams += 1
        left, received = self._rng.randrange(1, 6), 0
        # Who it is; not counted.
        await anext(aiter(request_iterator))
        async for message in request_iterator:
            for delivery in message.deliveries:
                tokens = self.tokens.setdefault(delivery.run_id, [])
                assert delivery.first_index <= len(tokens), "a gap"
                tokens += delivery.token_ids[len(tokens) - delivery.first_index :]
            received += 1
            left -= 1
            if left == 0 and self.how == "in peace, unacknowledged":
                return
            yield delivery_pb2.DeliverResponse(num_received=received)
            if left == 0:
                if self.how == "with an error":
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "restless")
                return


@pytest.mark.parametrize("how", ["in peace", "in peace, unacknowledged", "with an error"])
async def test_every_token_arrives_once_though_streams_keep_ending(how: str) -> None:
    gateway, lost = RestlessGateway(how), list[str]()
    server = grpc.aio.server()
    delivery_pb2_grpc.add_DeliveryServiceServicer_to_server(gateway, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    pool = DeliveryPool(
        "w",
        Deployment(),
        fingerprint=lambda: "f",
        flush_s=0.001,
        give_up_s=30.0,
        on_stop=lambda keys: None,
        on_lost=lambda a, _: lost.append(a),
    )
    for index in range(300):
        for name in ("a", "b", "c"):
            pool.send(address, delivery_pb2.TokenDelivery(run_id=name, first_index=index, token_ids=[index]))
        await asyncio.sleep(0.002)
    await pool.flush(20.0)
    assert gateway.tokens == {name: list(range(300)) for name in ("a", "b", "c")}
    assert gateway.num_streams > 3
    assert not lost
    await pool.close()
    await server.stop(0)


def output(name: str, index: int) -> delivery_pb2.TokenDelivery:
    return delivery_pb2.TokenDelivery(run_id=name, first_index=index, token_ids=[index])


async def test_a_stream_that_breaks_now_and_then_is_not_an_absence_that_goes_on() -> None:
    gateway, lost = RestlessGateway("with an error"), list[str]()
    server = grpc.aio.server()
    delivery_pb2_grpc.add_DeliveryServiceServicer_to_server(gateway, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    pool = DeliveryPool(
        "w",
        Deployment(),
        fingerprint=lambda: "f",
        flush_s=0,
        give_up_s=1.0,
        on_stop=lambda keys: None,
        on_lost=lambda a, _: lost.append(a),
    )
    # For three times as long as an absence may last.
    for index in range(150):
        pool.send(address, output("a", index))
        await asyncio.sleep(0.02)
    await pool.flush(20.0)
    assert not lost
    assert gateway.tokens == {"a": list(range(150))}
    await pool.close()
    await server.stop(0)


async def test_output_for_a_gateway_that_takes_the_place_of_a_lost_one_is_not_lost_with_it() -> None:
    lost: list[set[str]] = []
    port = free_port()
    address = f"127.0.0.1:{port}"
    pool = DeliveryPool(
        "w",
        Deployment(),
        fingerprint=lambda: "f",
        flush_s=0,
        give_up_s=2.0,
        on_stop=lambda keys: None,
        on_lost=lambda _, ids: lost.append(ids),
    )
    pool.send(address, output("of the former", 0))
    await asyncio.sleep(1.8)
    # Another process is at that address by now, but no connection has been made yet.
    pool.send(address, output("of the new one", 0))
    await eventually(lambda: lost, 10)
    assert lost == [{"of the former"}]
    gateway = RestlessGateway("in peace")
    server = grpc.aio.server()
    delivery_pb2_grpc.add_DeliveryServiceServicer_to_server(gateway, server)
    server.add_insecure_port(address)
    await server.start()
    await eventually(lambda: gateway.tokens, 10)
    assert gateway.tokens == {"of the new one": [0]}
    assert len(lost) == 1
    await pool.close()
    await server.stop(0)


async def test_a_gateway_that_stays_away_is_given_up_with_all_its_output() -> None:
    lost: set[str] = set()
    address = f"127.0.0.1:{free_port()}"
    pool = DeliveryPool(
        "w",
        Deployment(),
        fingerprint=lambda: "f",
        flush_s=0,
        give_up_s=0.5,
        on_stop=lambda keys: None,
        on_lost=lambda _, ids: lost.update(ids),
    )
    assert not pool.is_delivering
    for index in range(10):
        pool.send(address, output(f"r{index}", 0))
        assert pool.is_delivering
        await asyncio.sleep(0.1)
    await eventually(lambda: len(lost) == 10, 10)
    assert not pool.is_delivering
    await eventually(lambda: not pool._streams, 10)
    await pool.close()


class SilentGateway(delivery_pb2_grpc.DeliveryServiceServicer):
    """Takes everything and acknowledges nothing, as behind a link that has stalled."""

    async def Deliver(self, request_iterator, context) -> AsyncIterator[delivery_pb2.DeliverResponse]:
        yield delivery_pb2.DeliverResponse()
        async for _ in request_iterator:
            pass


async def test_a_gateway_that_stops_answering_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "STALL_S", 0.3)
    lost: set[str] = set()
    server = grpc.aio.server()
    delivery_pb2_grpc.add_DeliveryServiceServicer_to_server(SilentGateway(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    pool = DeliveryPool(
        "w",
        Deployment(),
        fingerprint=lambda: "f",
        flush_s=0,
        give_up_s=0.3,
        on_stop=lambda keys: None,
        on_lost=lambda _, ids: lost.update(ids),
    )
    pool.send(address, output("a", 0))
    await eventually(lambda: lost == {"a"}, 20)
    await pool.close()
    await server.stop(0)
