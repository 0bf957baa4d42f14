"""Quotas on a real server: what is taken, what is in the way, what comes back."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import redis.asyncio as aioredis

from bucketserve.store.embedded import EmbeddedServer
from bucketserve.store.quotas import QuotaStore
from bucketserve.store.redis import connect

pytestmark = pytest.mark.redis
NONE = {"requests": 0, "tokens": 0, "at_once": 0, "tokens_at_once": 0}
_numbers = itertools.count()
RUNNING = "bs:{default/quota/a}:running"


def named(num_tokens: int) -> str:
    return f"{num_tokens}:{next(_numbers)}"


async def taken(store: QuotaStore, number: int, *, num_tokens: int = 1, tenant: str = "a", **limits: int) -> int:
    """How many of so many requests get through at once."""
    asked = [store.take(tenant, named(num_tokens), num_tokens, **{**NONE, **limits}) for _ in range(number)]
    return sum(refusal is None for refusal in await asyncio.gather(*asked))


async def test_a_minute_s_worth_at_once_shared_by_all_gateways_and_each_tenant_for_itself(
    client: aioredis.Redis, valkey: EmbeddedServer
) -> None:
    one, other = QuotaStore(client), QuotaStore(connect(valkey.url))
    # A limit so low that none comes back while the test runs.
    found = await asyncio.gather(*(taken(store, 6, requests=5) for store in (one, other)))
    assert sum(found) == 5
    refusal = await one.take("a", "r", 1, **{**NONE, "requests": 5})
    assert refusal is not None and refusal.limit == "requests a minute"
    # One in twelve seconds.
    assert 5 < refusal.retry_delay_s <= 12
    assert await taken(one, 6, tenant="a/b {x}\n", requests=5) == 5
    assert await taken(QuotaStore(client, "elsewhere"), 6, requests=5) == 5
    await other._client.aclose()


async def test_tokens_are_taken_with_requests_or_not_at_all(client: aioredis.Redis) -> None:
    store = QuotaStore(client)
    assert await taken(store, 10, num_tokens=300, tokens=1000, requests=7) == 3
    refusal = await store.take("a", "r", 300, **{**NONE, "tokens": 1000, "requests": 7})
    assert refusal is not None and refusal.limit == "tokens a minute"
    # What was refused has taken no request either.
    assert await taken(store, 200, num_tokens=0, tokens=1000, requests=7) == 4


async def test_what_is_more_than_a_minute_s_worth_takes_all_of_it(client: aioredis.Redis) -> None:
    store = QuotaStore(client)
    assert await taken(store, 2, num_tokens=10**12, tokens=1000) == 1
    assert await taken(store, 1, tokens=1000) == 0


async def test_what_was_not_used_comes_back_at_once(client: aioredis.Redis) -> None:
    store, limits = QuotaStore(client), {**NONE, "tokens": 1000, "at_once": 2}
    assert await store.take("a", "x", 1000, **limits) is None
    assert await taken(store, 1, num_tokens=100, **limits) == 0
    await store.settle("a", "x", unused=900, tokens=1000)
    assert await taken(store, 20, num_tokens=450, **limits) == 2
    # Nobody gets more than a minute's worth by giving back.
    await store.settle("a", "y", unused=10**9, tokens=1000)
    assert await taken(store, 3, num_tokens=400, tokens=1000) == 2


async def test_what_runs_is_counted_until_it_ends_or_its_gateway_does(client: aioredis.Redis) -> None:
    store, limits = QuotaStore(client, lease_s=60.0), {**NONE, "at_once": 2}
    assert [await store.take("a", name, 1, **limits) for name in ("x", "y")] == [None, None]
    refusal = await store.take("a", "z", 1, **limits)
    assert refusal is not None and (refusal.limit, refusal.retry_delay_s) == ("requests at once", 1.0)
    await store.settle("a", "x", unused=0, tokens=0)
    assert await store.take("a", "z", 1, **limits) is None
    key = "bs:{default/quota/a}:running"
    assert await client.zcard(key) == 2
    before = await client.zscore(key, "y")
    await asyncio.sleep(0.01)
    # What is not there any more is not brought back.
    await store.renew("a", ["y", "x"])
    assert await client.zrange(key, 0, -1) == [b"z", b"y"]
    assert await client.zscore(key, "y") > before
    assert await store.take("a", "w", 1, **limits) is not None
    # Nobody renews them any more.
    await QuotaStore(client, lease_s=0.1).renew("a", ["y", "z"])
    while await store.take("a", "w", 1, **limits):
        await asyncio.sleep(0.05)
    assert await client.zrange(key, 0, -1) == [b"w"]


async def test_what_was_taken_before_the_server_s_clock_was_set_back_comes_back_as_soon(client: aioredis.Redis) -> None:
    # As it looks after the clock was set back by an hour: an hour ahead.
    store, limits = QuotaStore(client, lease_s=0.5), {**NONE, "requests": 5, "tokens": 1000, "at_once": 1}
    assert await store.take("a", "x", 1000, **limits) is None
    seconds, _ = await client.time()
    await client.set("bs:{default/quota/a}:tokens", f"{seconds + 3_660}.0", px=3_660_000)
    refusal = await store.take("a", "y", 100, **{**limits, "at_once": 0})
    assert refusal is not None and refusal.limit == "tokens a minute" and refusal.retry_delay_s < 7
    await client.zadd("bs:{default/quota/a}:running", {"x": (seconds + 3_600) * 1e3})
    assert await store.take("a", "y", 0, **{**NONE, "at_once": 1}) is not None
    for _ in range(20):
        # Its gateway does not renew it any more.
        if await store.take("a", "y", 0, **{**NONE, "at_once": 1}) is None:
            break
        await asyncio.sleep(0.1)
    assert await client.zrange("bs:{default/quota/a}:running", 0, -1) == [b"y"]


@pytest.mark.parametrize("at_once", [0, 100])
async def test_tokens_at_once_are_those_of_all_that_have_not_ended(client: aioredis.Redis, at_once: int) -> None:
    store, limits = QuotaStore(client, lease_s=60.0), {**NONE, "at_once": at_once, "tokens_at_once": 1000}
    names = [named(300) for _ in range(5)]
    found = [await store.take("a", name, 300, **limits) for name in names]
    assert [refusal and refusal.limit for refusal in found] == [None] * 3 + ["tokens at once"] * 2
    assert found[4] is not None and found[4].retry_delay_s == 1.0
    assert await taken(store, 5, num_tokens=50, **limits) == 2
    # However often it ends, it makes room once; so does what was never let in, or not counted.
    for name in (names[0], names[0], names[3], "unknown", named(10**6)):
        await store.settle("a", name, unused=0, tokens=0)
    await store.renew("a", names[:2])
    assert await taken(store, 6, num_tokens=100, **limits) == 3
    assert await taken(store, 2, num_tokens=1, **limits) == 0
    await store.settle("a", names[1], unused=0, tokens=0)
    # What its gateway does not renew any more has ended.
    await QuotaStore(client, lease_s=0.1).renew("a", await client.zrangebyscore(RUNNING, "(0", "+inf"))
    while await store.take("a", name := named(900), 900, **limits):
        await asyncio.sleep(0.05)
    assert await client.zrange(RUNNING, 0, -1) == [b"", name.encode()]
    assert await client.zscore(RUNNING, "") == -900


async def test_a_sum_that_was_lost_before_its_requests_ended_is_nobody_s_credit(client: aioredis.Redis) -> None:
    store, limits = QuotaStore(client), {**NONE, "tokens_at_once": 1000}
    names = [named(300) for _ in range(3)]
    assert [await store.take("a", name, 300, **limits) for name in names] == [None] * 3
    # As a gateway does that does not know of sums.
    await client.zremrangebyscore(RUNNING, "-inf", 0)
    last = named(100)
    assert await store.take("a", last, 100, **limits) is None
    for name in names:
        await store.settle("a", name, unused=0, tokens=0)
    assert await taken(store, 20, num_tokens=100, **limits) in (10, 11)
    assert await client.zscore(RUNNING, "") == -1000


async def test_one_that_needs_more_tokens_than_may_be_at_once_runs_alone(client: aioredis.Redis) -> None:
    store, limits = QuotaStore(client), {**NONE, "tokens_at_once": 1000}
    large = named(5000)
    assert await store.take("a", large, 5000, **limits) is None
    assert await taken(store, 1, **limits) == 0
    await store.settle("a", large, unused=0, tokens=0)
    assert await taken(store, 1, **limits) == 1
    assert await store.take("a", named(5000), 5000, **limits) is not None


async def test_a_limit_that_is_set_while_others_run_counts_those_that_were_counted(client: aioredis.Redis) -> None:
    store = QuotaStore(client)
    assert await taken(store, 3, num_tokens=300, at_once=5) == 3
    assert await taken(store, 3, num_tokens=100, tokens_at_once=1000) == 1


async def test_keys_of_quotas_go_by_themselves(client: aioredis.Redis) -> None:
    store = QuotaStore(client)
    assert await taken(store, 3, num_tokens=50, requests=10, tokens=100, at_once=5) == 2
    for _ in range(2):
        keys = await client.keys("bs:*")
        assert len(keys) == 3
        assert all([0 < await client.pttl(key) <= 61_001 for key in keys])
        await store.settle("a", "request-unknown", unused=50, tokens=100)
    await client.flushdb()
    await store.settle("a", "x", unused=50, tokens=100)
    await store.renew("a", ["x"])
    assert await client.keys("bs:*") == []


async def test_who_fills_the_server_gets_no_more(client: aioredis.Redis) -> None:
    store, limits = QuotaStore(client), {**NONE, "requests": 10, "tokens": 1000, "at_once": 3}
    await client.config_set("maxmemory-policy", "noeviction")
    await client.config_set("maxmemory", (await client.info("memory"))["used_memory"] // 2)
    try:
        assert await store.take("a", "x", 900, **limits) is None
        assert await taken(store, 3, num_tokens=200, **limits) == 0
        await store.renew("a", ["x"])
        await store.settle("a", "x", unused=900, tokens=1000)
        assert await taken(store, 5, num_tokens=200, **limits) == 3
    finally:
        await client.config_set("maxmemory", 0)
