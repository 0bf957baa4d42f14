"""KV over real gRPC and real shared memory: what comes is what was sent, or it is refused."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest

from bucketserve.core.types import RequestId
from bucketserve.engine.kv_staging import KvStaging, StagedKv, checksum, locality, page_checksums
from bucketserve.rpc.deployment import Deployment
from bucketserve.v1 import common_pb2, scheduler_pb2, worker_pb2, worker_pb2_grpc
from bucketserve_worker import kv_source
from bucketserve_worker.engine_thread import HandedOver
from bucketserve_worker.kv_holder import Held, KvHolder
from bucketserve_worker.kv_source import PIECE_BYTES, KvSources, KvTransferError
from bucketserve_worker.running import Running
from bucketserve_worker.servicer import WorkerServicer

PAGE_BYTES = 700_000
NUM_PAGES = 5
KV_BYTES = (NUM_PAGES - 1) * PAGE_BYTES + 123_456
SPEC = scheduler_pb2.RunSpec(max_new_tokens=3, token_ids=[1, 2, 3])
KV = random.Random(1).randbytes(KV_BYTES)
TRAILER = worker_pb2.KvTrailer(
    token_ids=[5],
    spec=SPEC.SerializeToString(),
    page_checksums=page_checksums(memoryview(KV), PAGE_BYTES),
    run_id="r.1",
)
DATA = KV + TRAILER.SerializeToString()
KEY = RequestId("r.1#1")


def held_in(staging: KvStaging) -> Held:
    block = staging.take(len(DATA))
    block.data[:] = DATA
    handed_over = HandedOver(KEY, 7, KV_BYTES, block, checksum(block.data[KV_BYTES:]))
    return Held(KEY, Running("r.1", SPEC, common_pb2.BatchInfo(), 1, 1.0, 1.5), handed_over)


class Source(worker_pb2_grpc.WorkerServiceServicer):
    """Sends what it is told to, also what it should not."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data, self.asked = data, list[tuple[int, int]]()

    async def FetchKv(self, request, context) -> AsyncIterator[worker_pb2.FetchKvResponse]:
        self.asked.append((request.begin, request.end))
        data = self.data[request.begin : request.end]
        for begin in range(0, len(data), PIECE_BYTES):
            yield worker_pb2.FetchKvResponse(piece=data[begin : begin + PIECE_BYTES])


async def serving(source: worker_pb2_grpc.WorkerServiceServicer, port: int = 0) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(source, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, port


def reading(staging: KvStaging, holder: KvHolder | None = None, num_known: int = 0) -> KvSources:
    def known(spec: scheduler_pb2.RunSpec) -> int:
        assert spec == SPEC
        return num_known

    own = holder or KvHolder(30.0, lambda: 0.0)
    return KvSources("me", Deployment(), own, staging, "L", PAGE_BYTES, known)


@asynccontextmanager
async def fetching(
    source: worker_pb2_grpc.WorkerServiceServicer, num_known: int = 0
) -> AsyncIterator[tuple[KvSources, str, KvStaging]]:
    server, port = await serving(source)
    staging = KvStaging(2 * len(DATA))
    sources = reading(staging, num_known=num_known)
    try:
        yield sources, f"127.0.0.1:{port}", staging
    finally:
        await sources.close()
        await server.stop(0)


def pull(kv: scheduler_pb2.HeldKv, address: str = "", source: str = "other") -> scheduler_pb2.PullKv:
    return scheduler_pb2.PullKv(run_id="r.1", source_worker_id=source, source_address=address, kv=kv)


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("num_known", [0, 1, NUM_PAGES - 1])
async def test_shared_memory_and_stream_bring_the_pages_that_are_not_here(num_known: int, is_whole: bool) -> None:
    theirs = KvStaging(2 * len(DATA))
    held = held_in(theirs)
    begin = 0 if is_whole else num_known * PAGE_BYTES
    for path, transport in ((theirs.path, "shared_memory"), (None, "grpc")):
        source = Source()
        async with fetching(source, num_known) as (sources, address, staging):
            fetched = await sources.fetch(pull(held.describe("L", path), address), is_whole=is_whole)
            assert (fetched.transport, bytes(fetched.block.data)) == (transport, KV[begin:])
            assert (fetched.kv_bytes, fetched.num_known_pages) == (KV_BYTES - begin, begin // PAGE_BYTES)
            assert fetched.trailer == TRAILER
            # Shared memory needs no word from the source: all there is to say came with the order.
            assert source.asked == ([(KV_BYTES, len(DATA)), (begin, KV_BYTES)] if transport == "grpc" else [])
            fetched.block.release()
            assert staging.num_blocks == 0


@pytest.mark.parametrize("has_memory", [False, True])
async def test_nothing_has_to_come_of_what_is_here_to_the_last_page(has_memory: bool) -> None:
    theirs = KvStaging(1 << 22)
    kv = random.Random(2).randbytes(2 * PAGE_BYTES)
    trailer = worker_pb2.KvTrailer(
        spec=SPEC.SerializeToString(), page_checksums=page_checksums(memoryview(kv), PAGE_BYTES), run_id="r.1"
    )
    data = kv + trailer.SerializeToString()
    block = theirs.take(len(data))
    block.data[:] = data
    handed_over = HandedOver(KEY, 7, len(kv), block, checksum(block.data[len(kv) :]))
    held = Held(KEY, Running("r.1", SPEC, common_pb2.BatchInfo(), 1, 1.0, 1.5), handed_over)
    # Whoever thinks to have more than there is has all of it.
    for num_known in (2, 3):
        source = Source(data)
        async with fetching(source, num_known) as (sources, address, staging):
            fetched = await sources.fetch(pull(held.describe("L", theirs.path if has_memory else None), address))
            assert (fetched.kv_bytes, fetched.num_known_pages, len(fetched.block.data)) == (0, 2, 0)
            assert source.asked == ([] if has_memory else [(len(kv), len(data))])
            fetched.block.release()
            assert staging.num_blocks == 0
            assert staging.take(staging.num_bytes).shared_offset == 0


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (0, 0),
        (5, 0),
        (0, 7),
        (PIECE_BYTES - 1, 2 * PIECE_BYTES + 1),
        (len(DATA), 0),
        (9, 5),
        (0, 2**64 - 1),
        (2**64 - 1, 0),
    ],
)
async def test_a_holder_gives_the_bytes_that_are_asked_for(begin: int, end: int) -> None:
    holder, staging = KvHolder(30.0, lambda: 0.0), KvStaging(2 * len(DATA))
    held = held_in(staging)
    holder.hold(held.running, held.handed_over)
    secret = next(iter(holder)).secret
    server, port = await serving(WorkerServicer(holder, Deployment()))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        request = worker_pb2.FetchKvRequest(run_id="r.1", secret=secret, begin=begin, end=end)
        pieces = [response.piece async for response in stub.FetchKv(request, metadata=Deployment().metadata)]
    await server.stop(0)
    assert b"".join(pieces) == DATA[begin : end or None]
    assert all(0 < len(piece) <= PIECE_BYTES for piece in pieces)


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
        assert (fetched.transport, bytes(fetched.block.data)) == ("grpc", KV)


def spoiled(at: int) -> bytes:
    return DATA[:at] + bytes([DATA[at] ^ 1]) + DATA[at + 1 :]


@pytest.mark.parametrize("at", [len(DATA) - 1, KV_BYTES, KV_BYTES - 1, 2 * PAGE_BYTES, PAGE_BYTES])
async def test_what_is_not_as_it_was_sent_is_refused_and_leaves_nothing(at: int) -> None:
    theirs = KvStaging(2 * len(DATA))
    held = held_in(theirs)
    for path in (theirs.path, None):
        kv = held.describe("L", path)
        held.handed_over.block.data[:] = spoiled(at)
        async with fetching(Source(spoiled(at)), 1) as (sources, address, staging):
            with pytest.raises(KvTransferError, match="checksum mismatch"):
                await sources.fetch(pull(kv, address))
            assert staging.num_blocks == 0


async def test_a_page_that_does_not_come_may_be_anything() -> None:
    kv = held_in(KvStaging(2 * len(DATA))).describe("L", None)
    async with fetching(Source(spoiled(PAGE_BYTES - 1)), 1) as (sources, address, _):
        assert bytes((await sources.fetch(pull(kv, address))).block.data) == KV[PAGE_BYTES:]
        with pytest.raises(KvTransferError, match="checksum mismatch"):
            await sources.fetch(pull(kv, address), is_whole=True)


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("num_asked", [0, 1])
async def test_fewer_or_more_bytes_than_asked_for_are_refused(num_asked: int, change: int) -> None:
    class Other(Source):
        async def FetchKv(self, request, context) -> AsyncIterator[worker_pb2.FetchKvResponse]:
            request.end += change * (len(self.asked) == num_asked)
            async for response in super().FetchKv(request, context):
                yield response

    kv = held_in(KvStaging(2 * len(DATA))).describe("L", None)
    async with fetching(Other(DATA + b"x")) as (sources, address, staging):
        with pytest.raises(KvTransferError, match="were asked for"):
            await sources.fetch(pull(kv, address))
        assert staging.num_blocks == 0


@pytest.mark.parametrize(
    ("kv_bytes", "num_bytes"), [(KV_BYTES, KV_BYTES - 1), (1 << 40, (1 << 40) + 9), (KV_BYTES, 1 << 40)]
)
async def test_lengths_that_can_not_be_are_refused_before_memory_is_taken(kv_bytes: int, num_bytes: int) -> None:
    kv = held_in(KvStaging(2 * len(DATA))).describe("L", None)
    kv.kv_bytes, kv.num_bytes = kv_bytes, num_bytes
    source = Source()
    async with fetching(source) as (sources, address, staging):
        with pytest.raises(KvTransferError, match="more than this worker has"):
            await sources.fetch(pull(kv, address))
        assert (source.asked, staging.num_blocks) == ([], 0)


@pytest.mark.parametrize("has_memory", [False, True])
async def test_a_transfer_that_is_called_off_leaves_nothing(has_memory: bool) -> None:
    theirs = KvStaging(2 * len(DATA))
    kv = held_in(theirs).describe("L", theirs.path if has_memory else None)
    is_asked = asyncio.Event()

    class Slow(Source):
        async def FetchKv(self, request, context) -> AsyncIterator[worker_pb2.FetchKvResponse]:
            async for response in super().FetchKv(request, context):
                yield response
                if request.begin == PAGE_BYTES:
                    is_asked.set()
                    await asyncio.sleep(600)

    async with fetching(Slow(), 1) as (sources, address, staging):
        fetch = asyncio.create_task(sources.fetch(pull(kv, address)))
        if has_memory:
            await asyncio.sleep(0)
        else:
            await is_asked.wait()
            assert staging.num_blocks == 1
        fetch.cancel()
        await asyncio.wait([fetch])
        if not fetch.cancelled():
            # It was through before.
            fetch.result().block.release()
        assert staging.num_blocks == 0


async def test_memory_is_given_back_only_when_nobody_copies_into_it_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_source, "INLINE_BYTES", PAGE_BYTES)
    theirs = KvStaging(2 * len(DATA))
    kv = held_in(theirs).describe("L", theirs.path)
    is_copying, may_go_on, copy = threading.Event(), threading.Event(), np.copyto

    def slow(to: np.ndarray, source: np.ndarray) -> None:
        if len(to) > PAGE_BYTES:
            is_copying.set()
            may_go_on.wait(30)
        copy(to, source)

    monkeypatch.setattr(np, "copyto", slow)
    async with fetching(Source()) as (sources, address, staging):
        fetch = asyncio.create_task(sources.fetch(pull(kv, address)))
        await asyncio.to_thread(is_copying.wait, 30)
        for _ in range(3):
            fetch.cancel()
            await asyncio.sleep(0.01)
        assert not fetch.done()
        assert staging.num_blocks == 1
        may_go_on.set()
        await asyncio.wait([fetch])
        assert fetch.cancelled()
        assert staging.num_blocks == 0


async def test_other_threads_go_on_while_kv_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    progress, is_done = [0], threading.Event()

    def beside() -> None:
        while not is_done.is_set():
            progress[0] += 1
            time.sleep(0)

    made = list[int]()

    async def here(compute: Callable[[], None], num_bytes: int) -> None:
        before = progress[0]
        compute()
        made.append(progress[0] - before)

    monkeypatch.setattr(kv_source, "_computed", here)
    source, into = (memoryview(bytearray(32 << 20)) for _ in range(2))
    before_s = sys.getswitchinterval()
    thread = threading.Thread(target=beside)
    # Nobody is made to give way: another thread runs only if whoever runs lets it.
    sys.setswitchinterval(1000)
    thread.start()
    try:
        sources = reading(KvStaging(1))
        while not any(made) and len(made) < 200:
            await sources._read(scheduler_pb2.PullKv(), source, 0, into)
            await asyncio.sleep(0.001)
    finally:
        is_done.set()
        sys.setswitchinterval(before_s)
        thread.join()
    assert any(made)


async def test_memory_of_a_worker_that_has_ended_is_let_go() -> None:
    theirs, others = KvStaging(2 * len(DATA)), KvStaging(2 * len(DATA))
    async with fetching(Source()) as (sources, address, _):
        for staging in (theirs, others):
            (await sources.fetch(pull(held_in(staging).describe("L", staging.path), address))).block.release()
        await sources.sweep()
        assert len(sources._files._maps) == 2
        theirs.close()
        await sources.sweep()
        assert [path for path, _ in sources._files._maps] == [others.path]


async def test_a_channel_that_nobody_uses_is_closed_and_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = held_in(KvStaging(2 * len(DATA))).describe("L", None)
    async with fetching(Source()) as (sources, address, staging):
        for idle_s, number in ((60.0, 1), (0.0, 0)):
            monkeypatch.setattr(kv_source, "PEER_IDLE_S", idle_s)
            fetch = asyncio.create_task(sources.fetch(pull(kv, address)))
            while not fetch.done():
                # Under nobody's call.
                await sources.sweep()
                await asyncio.sleep(0.001)
            fetch.result().block.release()
            await sources.sweep()
            assert len(sources._peers) == number
        assert staging.num_blocks == 0


async def test_a_source_that_is_started_again_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_source, "SILENCE_S", 60.0)
    kv = held_in(KvStaging(2 * len(DATA))).describe("L", None)
    server, port = await serving(Source(DATA))
    sources = reading(KvStaging(4 * len(DATA)))
    try:
        (await sources.fetch(pull(kv, f"127.0.0.1:{port}"))).block.release()
        await server.stop(0)
        fetches = [asyncio.create_task(sources.fetch(pull(kv, f"127.0.0.1:{port}"))) for _ in range(3)]
        # Longer than it takes to be refused for the first time.
        await asyncio.sleep(0.5)
        server, _ = await serving(Source(DATA), port)
        for fetched in await asyncio.wait_for(asyncio.gather(*fetches), 30):
            assert bytes(fetched.block.data) == KV
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
            yield worker_pb2.FetchKvResponse(piece=self.data[KV_BYTES : KV_BYTES + 10])
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
            begin = request.begin
            while begin < KV_BYTES and not goes_on.is_set():
                yield worker_pb2.FetchKvResponse(piece=self.data[begin : begin + 10])
                begin += 10
                await asyncio.sleep(0.1)
            yield worker_pb2.FetchKvResponse(piece=self.data[begin : request.end])

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
        assert bytes(fetched.block.data) == KV
        fetched.block.release()
        assert staging.num_blocks == 0


async def test_kv_of_another_model_is_refused_before_anything_moves() -> None:
    source = Source(DATA)
    async with fetching(source) as (sources, address, staging):
        with pytest.raises(KvTransferError, match="layout"):
            await sources.fetch(pull(held_in(KvStaging(2 * len(DATA))).describe("other", None), address))
        assert (source.asked, staging.num_blocks) == ([], 0)


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
    sources = reading(staging, holder, num_known=2)
    kv = held.describe("L", staging.path)
    assert (kv.prefill_us, kv.shared_memory.locality) == (500_000, locality())
    fetched = await sources.fetch(pull(kv, source="me"))
    assert fetched.block is held.handed_over.block
    assert (fetched.kv_bytes, fetched.num_known_pages, fetched.trailer) == (KV_BYTES, 0, TRAILER)
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


@pytest.mark.parametrize("run_id", ["", "r.2", "r.1#1", "r"])
async def test_kv_of_another_run_is_refused(run_id: str) -> None:
    theirs = KvStaging(2 * len(DATA))
    data = worker_pb2.KvTrailer(run_id=run_id, handle=b"h").SerializeToString()
    block = theirs.take(len(data))
    block.data[:] = data
    handed_over = HandedOver(KEY, 0, 0, block, checksum(block.data))
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
