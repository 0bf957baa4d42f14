"""KV over real gRPC and real shared memory: what comes is what was sent, or it is refused."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from bucketserve.core.types import RequestId
from bucketserve.engine.kv_staging import KvStaging, StagedKv, checksum, locality
from bucketserve.rpc.deployment import Deployment
from bucketserve.v1 import common_pb2, scheduler_pb2, worker_pb2, worker_pb2_grpc
from bucketserve_worker import kv_source
from bucketserve_worker.engine_thread import HandedOver
from bucketserve_worker.kv_holder import Held, KvHolder
from bucketserve_worker.kv_source import PIECE_BYTES, KvSources, KvTransferError
from bucketserve_worker.running import Running

KV_BYTES = 3 * PIECE_BYTES + 12_345
TRAILER = worker_pb2.KvTrailer(token_ids=[5])
DATA = random.Random(1).randbytes(KV_BYTES) + TRAILER.SerializeToString()
SPEC = scheduler_pb2.RunSpec(max_new_tokens=3)
KEY = RequestId("r.1#1")


def held_in(staging: KvStaging) -> Held:
    block = staging.take(len(DATA))
    block.data[:] = DATA
    handed_over = HandedOver(KEY, 7, KV_BYTES, block, checksum(block.data))
    return Held(KEY, Running("r.1", SPEC, common_pb2.BatchInfo(), 1, 1.0, 1.5), handed_over)


class Source(worker_pb2_grpc.WorkerServiceServicer):
    """Sends what it is told to, also what it should not."""

    def __init__(self, data: bytes) -> None:
        self.data, self.num_calls = data, 0

    async def FetchKv(self, request, context) -> AsyncIterator[worker_pb2.FetchKvResponse]:
        self.num_calls += 1
        for begin in range(0, len(self.data), PIECE_BYTES):
            yield worker_pb2.FetchKvResponse(piece=self.data[begin : begin + PIECE_BYTES])


async def serving(source: Source, port: int = 0) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(source, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, port


@asynccontextmanager
async def fetching(source: Source) -> AsyncIterator[tuple[KvSources, str, KvStaging]]:
    server, port = await serving(source)
    staging = KvStaging(2 * len(DATA))
    sources = KvSources("me", Deployment(), KvHolder(30.0, lambda: 0.0), staging, "L")
    try:
        yield sources, f"127.0.0.1:{port}", staging
    finally:
        await sources.close()
        await server.stop(0)


def pull(kv: scheduler_pb2.HeldKv, address: str = "", source: str = "other") -> scheduler_pb2.PullKv:
    return scheduler_pb2.PullKv(run_id="r.1", source_worker_id=source, source_address=address, kv=kv)


async def test_shared_memory_and_stream_bring_the_same_bytes() -> None:
    theirs = KvStaging(2 * len(DATA))
    held = held_in(theirs)
    for path, transport in ((theirs.path, "shared_memory"), (None, "grpc")):
        source = Source(DATA)
        async with fetching(source) as (sources, address, staging):
            fetched = await sources.fetch(pull(held.describe("L", path), address))
            assert (fetched.transport, bytes(fetched.block.data)) == (transport, DATA)
            assert fetched.trailer == TRAILER
            # Shared memory needs no word from the source: all there is to say came with the order.
            assert source.num_calls == (transport == "grpc")
            fetched.block.release()
            assert staging.num_blocks == 0


@pytest.mark.parametrize(
    ("at", "path"), [("another host", None), (None, "/proc/1/fd/999999"), (None, "/proc/self/fd/0"), ("", None)]
)
async def test_memory_out_of_reach_is_asked_for_as_a_stream(at: str | None, path: str | None) -> None:
    theirs = KvStaging(2 * len(DATA))
    kv = held_in(theirs).describe("L", path or theirs.path)
    if at is not None:
        kv.shared_memory.locality = at
    async with fetching(Source(DATA)) as (sources, address, _):
        fetched = await sources.fetch(pull(kv, address))
        assert (fetched.transport, bytes(fetched.block.data)) == ("grpc", DATA)


@pytest.mark.parametrize(
    ("data", "message"),
    [(DATA[:-1] + bytes([DATA[-1] ^ 1]), "checksum"), (DATA[:-1], "announced"), (DATA + b"x", "announced")],
)
async def test_what_is_not_as_announced_is_refused_and_leaves_nothing(data: bytes, message: str) -> None:
    kv = held_in(KvStaging(2 * len(DATA))).describe("L", None)
    async with fetching(Source(data)) as (sources, address, staging):
        with pytest.raises(KvTransferError, match=message):
            await sources.fetch(pull(kv, address))
        assert staging.num_blocks == 0


async def test_a_source_that_is_started_again_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_source, "SILENCE_S", 60.0)
    kv = held_in(KvStaging(2 * len(DATA))).describe("L", None)
    server, port = await serving(Source(DATA))
    sources = KvSources("me", Deployment(), KvHolder(30.0, lambda: 0.0), KvStaging(2 * len(DATA)), "L")
    try:
        (await sources.fetch(pull(kv, f"127.0.0.1:{port}"))).block.release()
        await server.stop(0)
        fetches = [asyncio.create_task(sources.fetch(pull(kv, f"127.0.0.1:{port}"))) for _ in range(3)]
        # Longer than it takes to be refused for the first time.
        await asyncio.sleep(0.5)
        server, _ = await serving(Source(DATA), port)
        for fetched in await asyncio.wait_for(asyncio.gather(*fetches), 30):
            assert bytes(fetched.block.data) == DATA
            fetched.block.release()
    finally:
        await sources.close()
        await server.stop(0)


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_source_of_which_nothing_is_heard_is_given_up(is_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_source, "SILENCE_S", 0.2)
    kv = held_in(KvStaging(2 * len(DATA))).describe("L", None)

    class Silent(Source):
        async def FetchKv(self, request, context) -> AsyncIterator[worker_pb2.FetchKvResponse]:
            yield worker_pb2.FetchKvResponse(piece=self.data[:10])
            await asyncio.sleep(600)

    async with fetching(Silent(DATA)) as (sources, address, staging):
        with pytest.raises(KvTransferError, match="nothing was heard"):
            await sources.fetch(pull(kv, address if is_there else "127.0.0.1:1"))
        assert staging.num_blocks == 0


async def test_a_source_that_is_given_up_for_one_run_goes_on_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_source, "SILENCE_S", 1.0)
    kv = held_in(KvStaging(2 * len(DATA))).describe("L", None)
    goes_on = asyncio.Event()

    class Slow(Source):
        async def FetchKv(self, request, context) -> AsyncIterator[worker_pb2.FetchKvResponse]:
            if not request.secret:
                await asyncio.sleep(600)
            # It says something now and then until the other one was given up.
            begin = 0
            while not goes_on.is_set():
                yield worker_pb2.FetchKvResponse(piece=self.data[begin : begin + 10])
                begin += 10
                await asyncio.sleep(0.1)
            yield worker_pb2.FetchKvResponse(piece=self.data[begin:])

    silent = scheduler_pb2.HeldKv()
    silent.CopyFrom(kv)
    silent.secret = b""
    kv.secret = b"slow"
    async with fetching(Slow(DATA)) as (sources, address, staging):
        slow = asyncio.create_task(sources.fetch(pull(kv, address)))
        with pytest.raises(KvTransferError, match="nothing was heard"):
            await sources.fetch(pull(silent, address))
        goes_on.set()
        fetched = await slow
        assert bytes(fetched.block.data) == DATA
        fetched.block.release()
        assert staging.num_blocks == 0


async def test_kv_of_another_model_is_refused_before_anything_moves() -> None:
    source = Source(DATA)
    async with fetching(source) as (sources, address, staging):
        with pytest.raises(KvTransferError, match="layout"):
            await sources.fetch(pull(held_in(KvStaging(2 * len(DATA))).describe("other", None), address))
        assert (source.num_calls, staging.num_blocks) == (0, 0)


async def test_shared_memory_that_its_owner_uses_anew_is_refused() -> None:
    theirs = KvStaging(2 * len(DATA))
    kv = held_in(theirs).describe("L", theirs.path)
    assert theirs.path is not None
    file = os.open(theirs.path, os.O_RDWR)
    os.pwrite(file, b"new", kv.shared_memory.offset + 100)
    os.close(file)
    async with fetching(Source(DATA)) as (sources, address, staging):
        with pytest.raises(KvTransferError, match="let it go"):
            await sources.fetch(pull(kv, address))
        assert staging.num_blocks == 0


async def test_what_this_worker_holds_itself_changes_hands_without_a_copy() -> None:
    staging, holder = KvStaging(2 * len(DATA)), KvHolder(30.0, lambda: 0.0)
    held = held_in(staging)
    holder.hold(held.running, held.handed_over)
    sources = KvSources("me", Deployment(), holder, staging, "L")
    kv = held.describe("L", staging.path)
    assert (kv.prefill_us, kv.shared_memory.locality) == (500_000, locality())
    fetched = await sources.fetch(pull(kv, source="me"))
    assert fetched.block is held.handed_over.block
    assert len(holder) == 0
    with pytest.raises(KvTransferError, match="not held"):
        await sources.fetch(pull(kv, source="me"))


def test_a_lease_runs_from_the_last_word_of_the_scheduler() -> None:
    now_s = 100.0
    holder = KvHolder(30.0, lambda: now_s)
    held = held_in(KvStaging(2 * len(DATA)))
    holder.hold(held.running, held.handed_over)
    now_s = 125.0
    holder.heard()
    now_s = 155.0
    assert (holder.expired(), holder.num_tokens) == ([], 7)
    now_s = 155.1
    assert holder.expired() == [KEY]
    assert holder.release(KEY)
    assert not holder.release(KEY)
    assert (holder.expired(), holder.num_tokens) == ([], 0)


def test_an_area_that_is_full_still_gives_blocks() -> None:
    staging = KvStaging(8192)
    blocks: list[StagedKv] = [staging.take(5000) for _ in range(3)]
    assert [block.shared_offset for block in blocks] == [0, None, None]
    for block in blocks:
        block.release()
        block.release()
    assert staging.num_blocks == 0
    assert staging.take(8192).shared_offset == 0


@pytest.mark.parametrize("run_id", ["r.2", "r.1#1", "r"])
async def test_kv_of_another_run_is_refused(run_id: str) -> None:
    theirs = KvStaging(2 * len(DATA))
    data = DATA + worker_pb2.KvTrailer(run_id=run_id, handle=b"h").SerializeToString()
    block = theirs.take(len(data))
    block.data[:] = data
    handed_over = HandedOver(KEY, 0, KV_BYTES, block, checksum(block.data))
    held = Held(KEY, Running("r.1", SPEC, common_pb2.BatchInfo(), 1, 1.0, 1.5), handed_over)
    async with fetching(Source(data)) as (sources, address, staging):
        with pytest.raises(KvTransferError, match="another run's"):
            await sources.fetch(pull(held.describe("L", None), address))
        assert staging.num_blocks == 0


def test_kv_that_an_engine_keeps_for_a_time_is_given_up_before_it_is_gone() -> None:
    now_s, staging = 0.0, KvStaging(1)
    holder = KvHolder(30.0, lambda: now_s)
    keys = [RequestId(f"r.{number}#1") for number in range(3)]
    for key, num_tokens in zip(keys, (0, 7, 0), strict=True):
        holder.hold(
            Running(key, SPEC, common_pb2.BatchInfo(), 1, 1.0, 1.5),
            HandedOver(key, num_tokens, 0, staging.take(1), 0),
        )
        now_s += 10.0
    holder.heard()
    # The second one is here, and waits for its scheduler alone.
    assert (holder.expired(), holder.expired(25.0), holder.expired(5.0)) == ([], [keys[0]], [keys[0], keys[2]])
    now_s = 61.0
    assert holder.expired(25.0) == keys
