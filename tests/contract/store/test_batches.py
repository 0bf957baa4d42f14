"""What batches have beyond jobs, files, and lists of both, in a real server."""

from __future__ import annotations

import time

import pytest
import redis.asyncio as aioredis

from bucketserve.core.errors import NotFoundError
from bucketserve.store import listing as listing_module
from bucketserve.store.files import FileInfo, FileStore
from bucketserve.store.jobs import JobStore
from bucketserve.store.listing import ID_CHARACTERS, Listing, new_id

pytestmark = pytest.mark.redis


async def begun(store: JobStore, job_id: str = "b") -> None:
    await store.begin(job_id, "t", 60, note=b"note", window_s=3600)


async def started(store: JobStore, number: int = 2) -> None:
    await begun(store)
    await store.put("b", "u", 0, [b"line"] * number)
    await store.start("b", "u", number, "digest")


async def test_a_batch_is_over_with_its_window_or_when_it_is_stopped(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await started(store)
    job = await store.get("b")
    assert (job.note, job.until_unix_us - job.created_unix_us) == (b"note", 3_600_000_000)
    assert abs(job.started_unix_us / 1e6 - time.time()) < 60
    assert not job.is_over
    first = await store.stop("b")
    assert (first.state, first.is_over) == ("running", True)
    # The first time counts.
    assert await store.stop("b") == first
    # Its requests are still to be claimed, by who tells that they did not run.
    for index, _ in await store.claim("b", "a", 2, 30.0):
        assert await store.finish("b", "a", index, b"x" * 10, is_error=index == 1)
    done = await store.get("b")
    assert (done.state, done.num_bytes, done.num_error_bytes) == ("completed", 10, 10)
    assert done.ended_unix_us >= done.stopped_unix_us == first.stopped_unix_us
    assert await store.stop("b") == done
    # What was asked for is forgotten with the last answer.
    assert not await client.exists("bs:{b}:item")


async def test_what_expires_and_what_never_does(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await started(store)
    await client.hset("bs:{b}:meta", "until", str(time.time_ns() // 1000 - 1))
    assert (await store.get("b")).is_over
    await store.begin("j", "t", 60)
    job = await store.get("j")
    assert (job.note, job.until_unix_us, job.is_over) == (b"", 0, False)


async def test_a_batch_that_is_refused_says_why_and_runs_nothing(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await begun(store)
    await store.put("b", "u", 0, [b"line"])
    job = await store.fail("b", b"why")
    await store.drop("b", "u")
    assert (job.state, job.note) == ("failed", b"why")
    assert 0 < await client.ttl("bs:{b}:meta") <= 60
    with pytest.raises(NotFoundError):
        await store.fail("nobody", b"why")
    assert [key async for key in client.scan_iter("bs:{*b}:*")] == [b"bs:{b}:meta"]
    assert await store.open_jobs() == []
    # One that runs is not refused any more, and one that was stopped while it came in never runs.
    await client.flushdb()
    await started(store)
    assert (await store.fail("b", b"why")).state == "running"
    await client.flushdb()
    await begun(store)
    assert (await store.stop("b")).state == "cancelled"
    await store.put("b", "u", 0, [b"line"])
    assert (await store.start("b", "u", 1, "digest")).state == "cancelled"
    assert await store.open_jobs() == []
    await store.forget("b")
    with pytest.raises(NotFoundError):
        await store.get("b")


async def test_results_are_taken_out_by_kind_and_a_job_that_is_gone_stays_gone(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await started(store)
    for index, _ in await store.claim("b", "a", 2, 30.0):
        await store.finish("b", "a", index, b"%d" % index, is_error=index == 1)
    await store.discard("b", "failed", [1])
    assert (await store.get("b")).gone == {"failed"}
    assert await store.results("b", [0, 1]) == [b"0", None]
    await client.flushdb()
    await store.discard("b", "done", [0])
    assert [key async for key in client.scan_iter("*")] == []


async def whole(store: FileStore, info: FileInfo) -> bytes:
    return b"".join([piece async for piece in store.pieces(info)])


async def test_a_file_is_there_when_all_of_it_is_and_goes_with_its_time(client: aioredis.Redis) -> None:
    store = FileStore(client)
    await store.put("f", 0, b"one")
    await store.put("f", 1, b"\0two")
    with pytest.raises(NotFoundError):
        await store.get("f")
    keys = {key async for key in client.scan_iter("bs:*")}
    assert [0 < await client.ttl(key) <= 600 for key in keys] == [True]
    info = await store.end("f", "t", "näme", num_bytes=7, num_pieces=2, ttl_s=60)
    assert await store.get("f") == info
    assert info.expires_unix_us == info.created_unix_us + 60_000_000
    assert await whole(store, info) == b"one\0two"
    for key in ("bs:{f}:file", "bs:{f}:piece"):
        assert 0 < await client.ttl(key) <= 60
    # What was lost on the way makes no file.
    await store.put("g", 1, b"two")
    with pytest.raises(NotFoundError):
        await store.end("g", "t", "", num_bytes=7, num_pieces=2, ttl_s=60)
    assert await store.get_many(["f", "g", "h"]) == [info, None, None]
    await store.delete("f")
    with pytest.raises(NotFoundError):
        await whole(store, info)
    assert [key async for key in client.scan_iter("bs:*")] == []


async def test_ids_are_in_the_order_of_their_time_and_pages_follow_ids_that_are_gone(
    client: aioredis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = Listing(client, "d", "files")
    ids = []
    for _ in range(7):
        ids.append(new_id())
        # A microsecond later at the least.
        start = time.time_ns()
        while time.time_ns() < start + 2000:
            pass
    assert sorted(set(ids)) == ids
    assert {len(each) for each in ids} == {ID_CHARACTERS}
    for each in reversed(ids):
        await listing.add("t", each)
    await listing.add("u", new_id())
    assert await listing.page("t", "", 10) == ids[::-1]
    assert await listing.page("t", "", 3, is_newest_first=False) == ids[:3]
    await listing.remove("t", ids[3])
    assert await listing.page("t", ids[3], 2) == [ids[2], ids[1]]
    assert await listing.page("t", ids[3], 9, is_newest_first=False) == ids[4:]
    assert await listing.page("t", ids[4], 2, is_after=False) == [ids[4], ids[2]]
    assert await listing.page("nobody", "", 2) == []
    # What is too old to mean anything goes as others come.
    monkeypatch.setattr(listing_module, "MOST_S", 0)
    await listing.add("t", "f" * ID_CHARACTERS)
    monkeypatch.undo()
    assert await listing.page("t", "", 9) == []
    await listing.add("t", ids[0])
    assert await client.ttl("bs:{d/jobs}:files:t") > 0
