"""The durable store, on Redis or Valkey: one Lua script per kind of write, one round trip per apply()."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from importlib import resources
from typing import Any, TypeVar, cast

import redis.asyncio as aioredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from bucketserve.core.errors import StaleEpochError, UnavailableError
from bucketserve.core.types import BatchId, RequestId, WorkerId
from bucketserve.ports import Admit, Claim, Leadership, Remove, SetEdges, StoredRecord, StoreSnapshot, Write
from bucketserve.store.keys import Keys

__all__ = ["RedisStore", "connect"]

T = TypeVar("T")

TIMEOUT_S = 5.0
SCAN_COUNT = 1_000
SCRIPTS = ("lead", "resign", "admit", "claim", "remove", "edges")


def connect(url: str) -> aioredis.Redis:
    """Returns a client for redis://[user:password@]host:port/db; connects when first used."""
    client: aioredis.Redis = aioredis.from_url(
        url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, health_check_interval=15
    )
    return client


class RedisStore:
    """A QueueStore for one model. Several models share a client."""

    def __init__(self, client: aioredis.Redis, model: str) -> None:
        """Does not own the client."""
        self._client = client
        self._keys = Keys(model)
        folder = resources.files("bucketserve.store") / "lua"
        sources = {name: (folder / f"{name}.lua").read_text() for name in SCRIPTS}
        self._scripts = {name: client.register_script(source) for name, source in sources.items()}

    async def lead(self, owner: str, ttl_s: float) -> Leadership | None:
        """See QueueStore."""
        keys = [self._keys.leader, self._keys.epoch]
        epoch = await _guard(self._scripts["lead"](keys=keys, args=[owner, round(ttl_s * 1e3)]))
        return None if epoch < 0 else Leadership(owner=owner, epoch=int(epoch))

    async def resign(self, leadership: Leadership) -> None:
        """See QueueStore."""
        keys = [self._keys.leader, self._keys.epoch]
        await _guard(self._scripts["resign"](keys=keys, args=[leadership.owner, leadership.epoch]))

    async def load(self, leadership: Leadership) -> StoreSnapshot:
        """See QueueStore. Reads in pages, so that a long queue blocks the server for no one."""
        return await _guard(self._load(leadership))

    async def apply(self, leadership: Leadership, writes: Sequence[Write]) -> Sequence[frozenset[RequestId]]:
        """See QueueStore."""
        if not writes:
            return []
        try:
            return await _guard(self._apply(leadership, writes))
        except NoScriptError:
            # The server was restarted or failed over: it has no scripts. Nothing that follows a missing script is
            # harmed by running again, since every write is idempotent.
            await _guard(self._load_scripts())
            return await _guard(self._apply(leadership, writes))

    async def close(self) -> None:
        """See QueueStore. The client belongs to whoever made it."""

    async def _load_scripts(self) -> None:
        for script in self._scripts.values():
            await self._client.script_load(script.script)

    async def _apply(self, leadership: Leadership, writes: Sequence[Write]) -> list[frozenset[RequestId]]:
        async with self._client.pipeline(transaction=False) as pipe:
            for write in writes:
                name, keys, args = self._call(write)
                # EVALSHA, queued in the pipeline; the sha is registered with the pipeline by calling the script on it.
                pipe.evalsha(self._scripts[name].sha, len(keys), *keys, leadership.epoch, *args)
            replies: list[Any] = await pipe.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return [_effect(write, reply) for write, reply in zip(writes, replies, strict=True)]

    def _call(self, write: Write) -> tuple[str, list[str], list[str | int | bytes]]:
        """Returns script name, keys and arguments after the epoch."""
        keys = self._keys
        match write:
            case Admit():
                return (
                    "admit",
                    [keys.epoch, keys.record, keys.waiting, keys.claim],
                    [write.request_id, write.attempt, write.prefill_tokens, write.payload],
                )
            case Claim():
                return (
                    "claim",
                    [keys.epoch, keys.waiting, keys.claim],
                    [write.worker_id, write.batch_id, *write.request_ids],
                )
            case Remove():
                return "remove", [keys.epoch, keys.record, keys.waiting, keys.claim], [*write.request_ids]
            case SetEdges():
                return "edges", [keys.epoch, keys.edges], [",".join(map(str, write.edges))]

    async def _load(self, leadership: Leadership) -> StoreSnapshot:
        epoch = await cast(Awaitable[bytes | None], self._client.hget(self._keys.epoch, "epoch"))
        if epoch is None or int(epoch) != leadership.epoch:
            raise StaleEpochError(f"epoch {leadership.epoch} is over")
        edges = cast(bytes | None, await self._client.get(self._keys.edges))
        claims = {key: value async for key, value in self._client.hscan_iter(self._keys.claim, count=SCAN_COUNT)}
        records: dict[bytes, StoredRecord] = {}
        # HSCAN may return a field twice while the hash grows; the dictionary keeps one.
        async for key, value in self._client.hscan_iter(self._keys.record, count=SCAN_COUNT):
            attempt, _, payload = value.partition(b":")
            worker_id, _, batch_id = claims.get(key, b"").partition(b"\n")
            records[key] = StoredRecord(
                request_id=RequestId(key.decode()),
                attempt=int(attempt),
                payload=payload,
                worker_id=WorkerId(worker_id.decode()) if worker_id else None,
                batch_id=BatchId(batch_id.decode()) if batch_id else None,
            )
        return StoreSnapshot(
            edges=tuple(int(edge) for edge in edges.split(b",")) if edges else (),
            records=tuple(record for _, record in sorted(records.items())),
        )


def _effect(write: Write, reply: Any) -> frozenset[RequestId]:
    """Returns the ids on which a write took effect, from its script's reply."""
    if isinstance(write, Admit):
        return frozenset([write.request_id] if reply == 1 else [])
    if isinstance(write, SetEdges):
        return frozenset()
    return frozenset(RequestId(item.decode()) for item in reply)


async def _guard(call: Awaitable[T]) -> T:
    """Awaits a call and turns the library's errors into ours.

    Raises:
        StaleEpochError: a script refused the epoch.
        UnavailableError: the server can't be reached, is loading, or is a replica.
        NoScriptError: as it is; the caller loads the scripts.
    """
    try:
        return await call
    except NoScriptError:
        raise
    except ResponseError as error:
        if str(error).startswith("STALE"):
            raise StaleEpochError(str(error)) from error
        raise UnavailableError(f"store: {error}", reason="STORE_UNAVAILABLE") from error
    except (RedisConnectionError, RedisTimeoutError, RedisError, OSError) as error:
        raise UnavailableError(f"store: {error}", reason="STORE_UNAVAILABLE") from error
