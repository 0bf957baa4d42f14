"""What jobs may take of a real server: bounded by tenant and for all, freed with the jobs; ids that nobody guesses."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
import redis.asyncio as aioredis

from bucketserve.core.errors import OverloadedError
from bucketserve.store import job_room
from bucketserve.store.job_room import JobRoom

pytestmark = pytest.mark.redis


@pytest.fixture
def room(client: aioredis.Redis) -> JobRoom:
    return JobRoom(client, max_tenant_bytes=100, max_bytes=150)


async def held(client: aioredis.Redis) -> dict[bytes, bytes]:
    return await client.hgetall("bs:{default/jobs}:held")


async def refusal(room: JobRoom, submission: str, tenant: str, num_bytes: int) -> str:
    with pytest.raises(OverloadedError) as caught:
        await room.reserve(submission, tenant, num_bytes, 60)
    assert caught.value.retry_delay_s > 0
    return caught.value.reason


async def test_tenants_and_all_together_are_bounded(client: aioredis.Redis, room: JobRoom) -> None:
    await room.reserve("a/1", "a", 60, 60)
    await room.reserve("a/1", "a", 40, 60)
    assert await refusal(room, "a/1", "a", 1) == "JOBS_OF_TENANT"
    assert await refusal(room, "a/2", "a", 1) == "JOBS_OF_TENANT"
    # Another has its own share, and there is an end for all.
    await room.reserve("b c/1", "b c", 50, 60)
    assert await refusal(room, "d/1", "d", 1) == "JOBS_OF_STORE"
    assert await held(client) == {b"a": b"100", b"b c": b"50", b"": b"150"}
    await room.give_up("a/1")
    await room.give_up("a/1")
    assert await held(client) == {b"b c": b"50", b"": b"50"}
    await room.reserve("d/1", "d", 100, 60)


async def test_room_is_free_again_when_its_time_is_over(
    client: aioredis.Redis, room: JobRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_room, "LATER_S", 0)
    await room.reserve("a/1", "a", 100, 1)
    await room.reserve("b/1", "b", 50, 1)
    await room.keep("b/1", 60)
    # What is unknown is not made by keeping it.
    await room.keep("c/1", 60)
    await asyncio.sleep(1.1)
    await room.reserve("a/2", "a", 100, 1)
    assert await held(client) == {b"a": b"100", b"b": b"50", b"": b"150"}
    await room.give_up("b/1")
    await asyncio.sleep(1.1)
    await room.reserve("c/1", "c", 100, 1)
    await room.give_up("c/1")
    # Nothing is left, neither of what ended nor of tenants that came once.
    assert [key async for key in client.scan_iter("bs:*")] == []


async def test_ids_are_the_same_everywhere_and_nobody_can_guess_them(client: aioredis.Redis, room: JobRoom) -> None:
    other = JobRoom(client, max_tenant_bytes=1, max_bytes=1)
    first = await room.job_id("t", "key")
    assert first == await other.job_id("t", "key")
    names = [("t", "key2"), ("u", "key"), ("t\0", "key"), ("", "t\0key"), ("t", ""), ("t", "")]
    others = [await room.job_id(*name) for name in names]
    assert len({first, *others}) == len(names) + 1
    # Whoever knows tenant and key does not know the id.
    for text in ("t\0key", "tkey", "t/key", "t:key"):
        assert hashlib.sha256(text.encode()).hexdigest()[:24] not in first
    await client.flushdb()
    assert await room.job_id("t", "key") != first


@pytest.mark.parametrize("what", ["room", "until", "held"])
async def test_no_room_is_taken_for_ever_after_the_server_lost_a_part(
    client: aioredis.Redis, room: JobRoom, what: str
) -> None:
    await room.reserve("a/1", "a", 60, 60)
    await client.delete(f"bs:{{default/jobs}}:{what}")
    await room.reserve("b/1", "b", 50, 60)
    known = {} if what == "room" else {b"a": b"60"}
    assert await held(client) == {**known, b"b": b"50", b"": b"50" if what == "room" else b"110"}
    submissions = await client.hkeys("bs:{default/jobs}:room")
    assert sorted(await client.zrange("bs:{default/jobs}:until", 0, -1)) == sorted(submissions)
    await room.give_up("a/1")
    await room.reserve("a/2", "a", 100, 60)
