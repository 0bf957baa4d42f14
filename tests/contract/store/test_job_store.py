"""Batch jobs in a real server: who owns what, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import redis.asyncio as aioredis

from bucketserve.core.errors import DuplicateRequestError, NotFoundError
from bucketserve.store.jobs import JobStore

OPEN = "bs:{default/jobs}:open"
pytestmark = pytest.mark.redis

LEASE_S = 30.0


async def submitted(store: JobStore, number: int = 3, ttl_s: int = 60, job_id: str = "j") -> None:
    await store.begin(job_id, "t", ttl_s)
    await store.put(job_id, "u", 0, [f"r{i}".encode() for i in range(number)])
    await store.start(job_id, "u", number, "digest")


async def keys_of(client: aioredis.Redis) -> dict[str, int]:
    """Every key of jobs and the milliseconds that it has; -1: for ever."""
    keys = [key async for key in client.scan_iter("bs:*") if key.decode() != OPEN]
    return {key.decode(): await client.pttl(key) for key in keys}


async def test_keys_of_a_job_share_a_slot_and_none_outlives_it(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await submitted(store, number=4, ttl_s=2)
    assert [item for _, item in await store.claim("j", "a", 3, LEASE_S)] == [b"r0", b"r1", b"r2"]
    # Its runner dies with one, gives one back, and finishes one.
    await store.release("j", "a", [1])
    assert await store.finish("j", "a", 2, b"result", is_error=False)
    keys = await keys_of(client)
    assert set(keys) == {f"bs:{{j}}:{part}" for part in ("meta", "item", "pending", "lease", "owner", "result")}
    assert all(0 < left_ms <= 2000 for left_ms in keys.values()), keys
    await asyncio.sleep(2.1)
    assert await keys_of(client) == {}
    with pytest.raises(NotFoundError):
        await store.get("j")
    assert await store.open_jobs() == []
    assert await client.exists(OPEN) == 0


@pytest.mark.parametrize("step", ["begun", "put", "started", "claimed", "released", "cancelled"])
async def test_whatever_a_job_is_left_at_it_expires(client: aioredis.Redis, step: str) -> None:
    store = JobStore(client)
    if step in ("begun", "put"):
        await store.begin("j", "t", 60)
        if step == "put":
            await store.put("j", "u", 0, [b"r"])
    else:
        await submitted(store)
        claimed = await store.claim("j", "a", 10, LEASE_S) if step != "started" else []
        if step == "released":
            await store.release("j", "a", [index for index, _ in claimed])
        if step == "cancelled":
            await store.cancel("j")
    keys = await keys_of(client)
    assert keys and all(left_ms > 0 for left_ms in keys.values()), keys


async def test_a_job_does_not_expire_while_its_requests_run(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await submitted(store, ttl_s=1)
    await store.claim("j", "a", 1, LEASE_S)
    for _ in range(4):
        await asyncio.sleep(0.5)
        assert await store.renew("j", "a", [0], LEASE_S) == {0}
    assert await store.finish("j", "a", 0, b"late", is_error=False)
    assert [item for _, item in await store.claim("j", "b", 10, LEASE_S)] == [b"r1", b"r2"]


async def test_two_submissions_under_one_name_do_not_mix(client: aioredis.Redis) -> None:
    store, other = JobStore(client), JobStore(client)
    for each in (store, other):
        await each.begin("j", "t", 60)
    await store.put("j", "mine", 0, [b"mine 0", b"mine 1"])
    await other.put("j", "theirs", 0, [b"theirs 0"])
    await store.start("j", "mine", 2, "mine")
    # Late, and of no effect.
    await other.put("j", "theirs", 1, [b"theirs 1"])
    with pytest.raises(DuplicateRequestError):
        await other.start("j", "theirs", 2, "theirs")
    assert await store.claim("j", "a", 10, LEASE_S) == [(0, b"mine 0"), (1, b"mine 1")]
    assert not [key for key in await keys_of(client) if "upload" in key]
    # The same requests again are the same job, and start nothing.
    await other.begin("j", "t", 60)
    assert (await other.start("j", "again", 2, "mine")).num_requests == 2
    assert await store.claim("j", "a", 10, LEASE_S) == []


async def test_an_upload_that_was_forgotten_in_part_does_not_run(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await store.begin("j", "t", 60)
    await store.put("j", "u", 1, [b"the second"])
    with pytest.raises(NotFoundError):
        await store.start("j", "u", 2, "d")
    assert (await store.get("j")).state == "loading"


async def test_a_job_cancelled_while_it_loads_says_so(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await store.begin("j", "t", 60)
    await store.put("j", "u", 0, [b"r"])
    await store.cancel("j")
    await store.put("j", "u", 1, [b"s"])
    assert (await store.start("j", "u", 2, "d")).state == "cancelled"
    assert await store.claim("j", "a", 10, LEASE_S) == []
    assert await store.open_jobs() == []


async def test_a_cancelled_job_is_nobodys_and_keeps_its_results(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await submitted(store)
    await store.claim("j", "a", 2, LEASE_S)
    assert await store.finish("j", "a", 0, b"there", is_error=False)
    assert (await store.cancel("j")).state == "cancelled"
    assert await store.renew("j", "a", [1], LEASE_S) == set()
    assert not await store.finish("j", "a", 1, b"too late", is_error=False)
    await store.release("j", "a", [1])
    assert set(await keys_of(client)) == {"bs:{j}:meta", "bs:{j}:item", "bs:{j}:result"}
    assert await store.results("j", range(3)) == [b"there", None, None]
    # Once more: nothing new; and a job that has completed is not cancelled any more.
    assert (await store.cancel("j")).num_done == 1
    await submitted(store, number=1, job_id="k")
    await store.claim("k", "a", 1, LEASE_S)
    await store.finish("k", "a", 0, b"x", is_error=True)
    done = await store.cancel("k")
    assert (done.state, done.num_done, done.num_failed) == ("completed", 1, 1)


async def test_a_request_whose_runner_is_gone_runs_elsewhere_and_has_one_result(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await submitted(store, number=1)
    assert len(await store.claim("j", "a", 1, 0.05)) == 1
    assert await store.claim("j", "b", 1, LEASE_S) == []
    await asyncio.sleep(0.1)
    assert len(await store.claim("j", "b", 1, LEASE_S)) == 1
    assert await store.renew("j", "a", [0], LEASE_S) == set()
    assert not await store.finish("j", "a", 0, b"of the former", is_error=False)
    await store.release("j", "a", [0])
    assert await store.finish("j", "b", 0, b"of the latter", is_error=False)
    assert not await store.finish("j", "b", 0, b"again", is_error=False)
    assert await store.results("j", [0]) == [b"of the latter"]
    assert (await store.get("j")).num_done == 1


async def test_a_job_whose_submitter_ends_between_two_writes_runs_all_the_same(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await store.begin("j", "t", 60)
    await store.put("j", "u", 0, [b"r"])
    scripts = dict(store._scripts)

    class EndedError(Exception):
        pass

    def ended(**call: object) -> None:
        raise EndedError

    # Listed, but not started: runners look at it, and leave it in the list.
    store._scripts["job_start"] = ended  # type: ignore[assignment]
    with pytest.raises(EndedError):
        await store.start("j", "u", 1, "d")
    assert await store.open_jobs() == []
    assert await client.zscore(OPEN, "j") is not None
    # Started, and not another word.
    await scripts["job_start"](
        keys=[f"bs:{{j}}:{name}" for name in ("meta", "upload:u", "item", "pending")], args=[1, "d"]
    )
    assert [job.job_id for job in await store.open_jobs()] == ["j"]


async def test_requests_and_results_come_in_pieces_of_bounded_size(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await store.begin("j", "t", 60)
    await store.put("j", "u", 0, [b"x" * 1000] * 5)
    await store.start("j", "u", 5, "d")
    # One at least, however large, so that none waits for ever.
    assert [index for index, _ in await store.claim("j", "a", 10, LEASE_S, max_bytes=10)] == [0]
    assert [index for index, _ in await store.claim("j", "a", 10, LEASE_S, max_bytes=2000)] == [1, 2]
    for index in (0, 2):
        await store.finish("j", "a", index, b"y" * 1000, is_error=False)
    found = [len(result) if result else result for result in await store.results("j", range(5), max_bytes=1500)]
    assert found == [1000, None]
    assert len(await store.results("j", range(2, 5), max_bytes=10)) == 1


async def test_it_is_counted_how_many_runners_ended_with_a_request(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await submitted(store, number=2)
    for number in range(3):
        assert [index for index, _ in await store.claim("j", f"r{number}", 1, 0.05)] == [0]
        assert await store.losses("j", [0, 1]) == [number, 0]
        await asyncio.sleep(0.1)
    # Given back by one that leaves in order is not lost.
    await store.claim("j", "b", 2, LEASE_S)
    await store.release("j", "b", [0, 1])
    await store.claim("j", "c", 2, LEASE_S)
    assert await store.losses("j", [0, 1]) == [3, 0]


async def test_a_runner_that_was_only_silent_has_not_ended(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await submitted(store, number=1)
    await store.claim("j", "a", 1, 0.05)
    await asyncio.sleep(0.1)
    await store.claim("j", "b", 1, LEASE_S)
    assert await store.losses("j", [0]) == [1]
    # The store was away, not the runner: it comes back, and learns that the request is another's.
    assert await store.renew("j", "a", [0], LEASE_S) == set()
    assert await store.losses("j", [0]) == [0]
    assert await store.renew("j", "a", [0], LEASE_S) == set()
    assert await store.losses("j", [0]) == [0]


async def test_leases_given_before_the_server_s_clock_was_set_back_end_as_any_other(client: aioredis.Redis) -> None:
    store = JobStore(client)
    await submitted(store, number=2)
    await store.claim("j", "a", 2, 0.2)
    # As they are after the clock was set back by an hour: an hour ahead. The one of a runner that lives is renewed.
    for index in (0, 1):
        await client.zincrby("bs:{j}:lease", 3_600_000, str(index))
    assert await store.claim("j", "b", 2, 0.2) == []
    for _ in range(6):
        await asyncio.sleep(0.05)
        assert await store.renew("j", "a", [0], 0.2) == {0}
    assert [index for index, _ in await store.claim("j", "b", 2, 0.2)] == [1]


@pytest.mark.parametrize(
    "names",
    [names for n in (1, 2, 3) for names in itertools.combinations(("pending", "lease", "owner"), n)],
    ids="+".join,
)
async def test_requests_are_taken_up_though_the_server_has_lost_who_had_them(
    client: aioredis.Redis, names: tuple[str, ...]
) -> None:
    store = JobStore(client)
    await submitted(store, number=4)
    # One is done, one at a runner that ends, two wait.
    assert [index for index, _ in await store.claim("j", "a", 2, 0.1)] == [0, 1]
    assert await store.finish("j", "a", 0, b"result", is_error=False)
    await client.delete(*(f"bs:{{j}}:{name}" for name in names))
    done: list[int] = []
    for _ in range(40):
        for index, _ in await store.claim("j", "b", 1, LEASE_S):
            assert await store.finish("j", "b", index, b"result", is_error=False)
            done.append(index)
        await asyncio.sleep(0.01)
    assert sorted(done) == [1, 2, 3]
    assert (await store.get("j")).state == "completed"
