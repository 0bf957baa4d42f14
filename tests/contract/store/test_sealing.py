"""What jobs and files hold can't be read in the store, nor with another key, nor elsewhere."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
import redis.asyncio as aioredis

from bucketserve.core.errors import SettingsError, UnavailableError
from bucketserve.store.files import FileStore
from bucketserve.store.jobs import JobStore
from bucketserve.store.sealing import PLAIN, Sealer, read_sealing_keys

pytestmark = pytest.mark.redis

OLD, NEW = secrets.token_bytes(32), secrets.token_bytes(32)


async def everything(client: aioredis.Redis) -> bytes:
    """All that the store has, as one."""
    found = []
    async for key in client.scan_iter("*"):
        found.append(key)
        match await client.type(key):
            case b"hash":
                found += [item for pair in (await client.hgetall(key)).items() for item in pair]
            case b"zset":
                found += await client.zrange(key, 0, -1)
            case _:
                found.append(await client.get(key))
    return b"|".join(found)


async def put(store: JobStore, number: int = 2) -> None:
    await store.begin("j", "t", 60, note=b"marker-note", window_s=60)
    await store.put("j", "u", 0, [b"marker-%d" % i for i in range(number)])
    await store.start("j", "u", number, "digest")


async def test_nothing_of_a_job_or_file_can_be_read_in_the_store(client: aioredis.Redis) -> None:
    store, files = JobStore(client, sealer=Sealer([OLD])), FileStore(client, Sealer([OLD]))
    await put(store)
    assert await store.claim("j", "a", 1, 30.0) == [(0, b"marker-0")]
    assert await store.finish("j", "a", 0, b"marker-result", is_error=False)
    await files.put("f", 0, b"marker-piece")
    info = await files.end("f", "t", "marker-name", num_bytes=12, num_pieces=1, ttl_s=60)
    assert b"marker" not in await everything(client)
    assert await store.results("j", [0, 1]) == [b"marker-result", None]
    job = await store.get("j")
    assert (job.note, job.num_bytes) == (b"marker-note", len(b"marker-result"))
    assert (await files.get("f"), [piece async for piece in files.pieces(info)]) == (info, [b"marker-piece"])


async def test_keys_are_replaced_by_a_list_of_them(client: aioredis.Redis) -> None:
    await put(JobStore(client, sealer=Sealer([OLD])))
    store = JobStore(client, sealer=Sealer([NEW, OLD]))
    [(_, item)] = await store.claim("j", "a", 1, 30.0)
    assert await store.finish("j", "a", 0, item, is_error=False)
    assert await store.results("j", [0]) == [b"marker-0"]
    # What the new one has sealed needs it.
    for sealer in (Sealer([OLD]), PLAIN):
        with pytest.raises(UnavailableError, match="does not have"):
            await JobStore(client, sealer=sealer).results("j", [0])


async def test_requests_that_can_not_be_opened_stay_for_who_can(client: aioredis.Redis) -> None:
    store = JobStore(client, sealer=Sealer([OLD]))
    await store.begin("j", "t", 60)
    await store.put("j", "u", 0, [b"a", b"b"])
    await store.start("j", "u", 2, "digest")
    for _ in range(5):
        with pytest.raises(UnavailableError):
            await JobStore(client, sealer=Sealer([NEW])).claim("j", "wrong", 2, 30.0)
    assert await store.claim("j", "right", 2, 30.0) == [(0, b"a"), (1, b"b")]
    assert await store.losses("j", [0, 1]) == [0, 0]


async def test_what_can_not_be_opened_is_no_part_of_a_list_and_does_not_spoil_it(client: aioredis.Redis) -> None:
    for name, sealer in (("old", Sealer([OLD])), ("new", Sealer([NEW]))):
        await JobStore(client, sealer=sealer).begin(name, "t", 60, note=b"a note", window_s=60)
        files = FileStore(client, sealer)
        await files.put(name, 0, b"piece")
        await files.end(name, "t", "a name", num_bytes=5, num_pieces=1, ttl_s=60)
    jobs, files = JobStore(client, sealer=Sealer([NEW])), FileStore(client, Sealer([NEW]))
    assert await jobs.get_many(["old", "new"]) == [None, await jobs.get("new")]
    assert await files.get_many(["old", "new"]) == [None, await files.get("new")]
    # Who asks for it is told why.
    for call in (jobs.get, files.get):
        with pytest.raises(UnavailableError, match="does not have"):
            await call("old")


async def test_what_was_moved_or_changed_is_not_taken(client: aioredis.Redis) -> None:
    store = JobStore(client, sealer=Sealer([OLD]))
    await put(store)
    for index, item in await store.claim("j", "a", 2, 30.0):
        await store.finish("j", "a", index, item, is_error=False)
    first = await client.hget("bs:{j}:result", "0")
    for index, value in (("1", first), ("0", first[:-1] + bytes([first[-1] ^ 1])), ("0", first[:20])):
        await client.hset("bs:{j}:result", index, value)
        with pytest.raises(UnavailableError, match="changed"):
            await store.results("j", [int(index)])


async def test_a_gateway_with_other_keys_is_told_at_its_start(client: aioredis.Redis) -> None:
    await PLAIN.check(client, "d")
    await Sealer([OLD]).check(client, "d")
    for sealer in (PLAIN, Sealer([NEW])):
        with pytest.raises(SettingsError, match="job_keys_file"):
            await sealer.check(client, "d")
    # First every gateway gets the new one beside the old one, then it comes first, then the old one goes.
    await Sealer([OLD, NEW]).check(client, "d")
    await Sealer([NEW, OLD]).check(client, "d")
    await Sealer([OLD, NEW]).check(client, "d")
    await Sealer([NEW, OLD]).check(client, "d")
    await Sealer([NEW]).check(client, "d")
    with pytest.raises(SettingsError):
        await Sealer([OLD]).check(client, "d")


@pytest.mark.parametrize("text", ["", "# none\n", "x" * 64, "0" * 63, "0" * 65, "0" * 64 + "\nsecret", "\udcff"])
def test_a_file_without_proper_keys_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SettingsError) as caught:
        read_sealing_keys(file)
    assert "secret" not in str(caught.value) and "0000" not in str(caught.value)
    with pytest.raises(SettingsError, match="No such file"):
        read_sealing_keys(tmp_path / "nowhere")


def test_keys_are_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# new\n{NEW.hex()}\n\n  {OLD.hex().upper()}\n")
    assert read_sealing_keys(file) == [NEW, OLD]
