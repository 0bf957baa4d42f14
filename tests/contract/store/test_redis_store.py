"""What only a real server can show."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from bucketserve.core.errors import SettingsError, StaleEpochError, UnavailableError
from bucketserve.ports import SetOutputs
from bucketserve.store.embedded import EmbeddedServer
from bucketserve.store.keys import Keys
from bucketserve.store.redis import RedisStore, connect, guard
from tests.contract.store.test_queue_store import admit, dispatch, held, led, remove

pytestmark = pytest.mark.redis
QUEUE = ("ticket", "waiting", "place")


async def test_all_keys_of_a_model_share_a_cluster_slot(valkey: EmbeddedServer) -> None:
    client = connect(valkey.url)
    await client.flushdb()
    store = RedisStore(client, "org/mo{d}el")
    lead = await led(store)
    await store.apply(lead, [admit("r1"), admit("r2"), dispatch("r1"), SetOutputs(counts={"a": (1,)})])
    keys = await client.keys("*")
    assert len(keys) == 6
    tags = {key.decode().split("{", 1)[1].split("}", 1)[0] for key in keys}
    assert tags == {"default/org%2Fmo%7Bd%7Del"}
    await client.aclose()


async def test_scripts_are_loaded_again_after_the_server_forgot_them(valkey: EmbeddedServer) -> None:
    client = connect(valkey.url)
    store = RedisStore(client, "forgetful")
    lead = await led(store)
    await store.apply(lead, [admit("r1")])
    await client.script_flush()
    await store.apply(lead, [admit("r2"), dispatch("r1")])
    assert await held(store, lead) == {"r1": (b"t", "w", "b"), "r2": (b"t", None, None)}
    await client.aclose()


async def test_a_server_that_forgets_scripts_at_once_is_unavailable(
    valkey: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(valkey.url)
    store = RedisStore(client, "very forgetful")
    lead = await led(store)
    load = client.script_load

    async def load_in_vain(script: str) -> str:
        # As where another server answers by now, or somebody empties it all the time.
        sha = await load(script)
        await client.script_flush()
        return sha

    with monkeypatch.context() as patched:
        patched.setattr(client, "script_load", load_in_vain)
        await client.script_flush()
        with pytest.raises(UnavailableError):
            await store.apply(lead, [admit("r1")])
        with pytest.raises(UnavailableError):
            await store.lead("a", 30.0)
    assert await store.lead("a", 30.0, lead.epoch) == lead
    await store.apply(lead, [admit("r1")])
    assert await held(store, lead) == {"r1": (b"t", None, None)}
    await client.aclose()


async def test_a_lease_given_before_the_server_s_clock_was_set_back_ends_as_any_other(valkey: EmbeddedServer) -> None:
    # The server keeps the time at which a key ends, on its wall clock: set back by an hour, that is an hour later.
    client = connect(valkey.url)
    store, other = RedisStore(client, "clocks"), RedisStore(client, "clocks")
    first = await store.lead("a", 0.3)
    assert first is not None
    leader = store._keys.leader
    await client.pexpire(leader, 3_600_000)
    assert await other.lead("b", 0.3) is None
    # Who lives renews it, and nobody else has it.
    assert await store.lead("a", 0.3, first.epoch) == first
    assert await other.lead("b", 0.3) is None
    await client.pexpire(leader, 3_600_000)
    for _ in range(10):
        second = await other.lead("b", 0.3)
        if second is not None:
            break
        await asyncio.sleep(0.1)
    assert second is not None and second.epoch > first.epoch
    # A lease that is only longer than ours, of a scheduler with another setting, is left alone.
    await client.pexpire(leader, 500)
    assert await store.lead("a", 0.3) is None
    assert await client.pttl(leader) > 400
    await client.aclose()


async def test_a_cancellation_that_comes_as_a_call_is_done_is_not_lost() -> None:
    async def call() -> None:
        running.cancel()

    async def for_long() -> None:
        for _ in range(100):
            # As the client of the server sends; on Python 3.11 wait_for returns as if nothing had happened.
            await guard(asyncio.wait_for(call(), 5))

    running = asyncio.create_task(for_long())
    await asyncio.wait([running], timeout=5)
    assert running.cancelled()


async def test_what_is_done_on_cancellation_is_done_to_its_end() -> None:
    async def call() -> int:
        await asyncio.sleep(0)
        return 1

    done = []

    async def clean_up() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            done.extend([await guard(call()), await guard(call())])

    running = asyncio.create_task(clean_up())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running], timeout=5)
    assert running.cancelled()
    assert done == [1, 1]


def test_a_bad_sentinel_url_is_refused_without_its_password() -> None:
    for url in ("sentinel://user:hunter2@host:26379", "sentinel://user:hunter2@host:26379/main/x", "sentinel://"):
        with pytest.raises(SettingsError, match="sentinel://host:port") as caught:
            connect(url)
        assert "hunter2" not in str(caught.value)


async def test_a_full_server_refuses_admission_alone(valkey: EmbeddedServer) -> None:
    client = connect(valkey.url)
    await client.flushdb()
    store = RedisStore(client, "full")
    lead = await led(store)
    await store.apply(lead, [admit("r1"), admit("r2")])
    used = (await client.info("memory"))["used_memory"]
    await client.config_set("maxmemory-policy", "noeviction")
    await client.config_set("maxmemory", used // 2)
    try:
        writes = [admit("r3"), dispatch("r1", "r3"), admit("r4"), remove("r2"), dispatch("r4")]
        effects = await store.apply(lead, writes)
        assert effects == [frozenset(), {"r1"}, frozenset(), {"r2"}, frozenset()]
        # Its leader goes on leading.
        assert await led(store, epoch=lead.epoch) == lead
    finally:
        await client.config_set("maxmemory", 0)
    assert await held(store, lead) == {"r1": (b"t", "w", "b")}
    assert await store.apply(lead, [admit("r3")]) == [{"r3"}]
    await client.aclose()


async def test_a_server_that_may_evict_is_a_risk(valkey: EmbeddedServer) -> None:
    client = connect(valkey.url)
    store = RedisStore(client, "m")
    assert await store.risk() == ""
    await client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        assert "allkeys-lru" in await store.risk()
    finally:
        await client.config_set("maxmemory-policy", "noeviction")
    await client.aclose()


QUEUE = ("ticket", "waiting", "place")


@pytest.mark.parametrize("is_replaced", [False, True], ids=["same leader", "next leader"])
@pytest.mark.parametrize(
    "names", [names for n in (1, 2, 3) for names in itertools.combinations(QUEUE, n)], ids="+".join
)
async def test_what_was_evicted_is_stored_and_dispatched_again_and_nothing_stays(
    valkey: EmbeddedServer, names: tuple[str, ...], is_replaced: bool
) -> None:
    model = f"evicted-{'-'.join(names)}-{is_replaced}"
    client, keys = connect(valkey.url), Keys("default", model)
    store = RedisStore(client, model)
    lead = await led(store)
    await store.apply(lead, [admit("waits"), admit("runs"), dispatch("runs", batch="b1")])
    await client.delete(*(getattr(keys, name) for name in names))
    open_ones = {"waits"}
    if is_replaced:
        await store.resign(lead)
        lead = await led(store, "next")
        # As after a failover.
        await client.script_flush()
        known = await held(store, lead)
        if "ticket" in names:
            assert not await client.exists(*(getattr(keys, name) for name in QUEUE))
        # A gateway says both again: what the store doesn't know to be at a worker waits anew.
        open_ones = {name for name in ("waits", "runs") if known.get(name, (b"", None))[1] is None}
        await store.apply(lead, [admit(name) for name in sorted(open_ones)])
    for name in sorted(open_ones):
        first = await store.apply(lead, [dispatch(name, batch="b2")])
        # The loop's answer to what the store did not have.
        again = await store.apply(lead, [admit(name), dispatch(name, batch="b3")])
        assert first == [{name}] or again[1] == {name}, names
        assert not (first == [{name}] and again[1] == {name}), "in two batches"
    await store.apply(lead, [remove("waits", "runs")])
    assert not await client.exists(*(getattr(keys, name) for name in QUEUE))
    await client.aclose()


async def test_deployments_on_one_server_share_nothing(valkey: EmbeddedServer) -> None:
    client = connect(valkey.url)
    blue, green = RedisStore(client, "m", "blue"), RedisStore(client, "m", "green")
    leads = [await led(store, owner) for store, owner in ((blue, "a"), (green, "b"))]
    await blue.apply(leads[0], [admit("r1")])
    assert await held(green, leads[1]) == {}
    await client.aclose()


async def test_apply_is_one_round_trip(valkey: EmbeddedServer) -> None:
    client = connect(valkey.url)
    store = RedisStore(client, "trips")
    lead = await led(store)
    await store.apply(lead, [admit("r0")])
    sent = 0
    connection = await client.connection_pool.get_connection()
    send = connection.send_packed_command

    async def counting(*args, **kwargs):
        nonlocal sent
        sent += 1
        return await send(*args, **kwargs)

    connection.send_packed_command = counting
    await client.connection_pool.release(connection)
    await store.apply(lead, [admit(f"r{i}") for i in range(500)])
    assert sent == 1
    await client.aclose()


async def test_a_dead_server_is_unavailable_and_an_emptied_one_starts_a_new_epoch() -> None:
    with EmbeddedServer() as server:
        client = connect(server.url)
        store = RedisStore(client, "m")
        lead = await led(store)
        await store.apply(lead, [admit("r1")])
        server.stop()
        with pytest.raises(UnavailableError):
            await store.apply(lead, [admit("r2")])
        with pytest.raises(UnavailableError):
            await store.lead("a", 1.0)
        server.start()
        with pytest.raises(StaleEpochError):
            await store.apply(lead, [admit("r2")])
        # The old value is lost; the new one is greater all the same, once a second has passed.
        await asyncio.sleep(1.1)
        assert (await led(store)).epoch > lead.epoch
        await client.aclose()
