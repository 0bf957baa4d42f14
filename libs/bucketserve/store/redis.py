"""The durable store, on Redis or Valkey: one Lua script per kind of write, one round trip per apply()."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence, Set
from importlib import resources
from typing import Any, TypeVar, cast

import redis.asyncio as aioredis
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, OutOfMemoryError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from bucketserve.addresses import redact
from bucketserve.core.errors import SettingsError, StaleEpochError, UnavailableError
from bucketserve.core.types import BatchId, RequestId, WorkerId
from bucketserve.ports import (
    Admit,
    Dispatch,
    Leadership,
    Place,
    Remove,
    SetEdges,
    SetOutputs,
    StoredTicket,
    StoreSnapshot,
    Write,
)
from bucketserve.store.keys import Keys
from bucketserve.store.url import SentinelUrl, check_store_url
from bucketserve.tasks import heeded

__all__ = ["RedisStore", "connect", "guard"]

T = TypeVar("T")

TIMEOUT_S = 5.0
SCAN_COUNT = 1_000
SCRIPTS = ("lead", "resign", "admit", "dispatch", "place", "remove", "edges", "outputs")


def connect(url: str) -> aioredis.Redis:
    """Returns a client; connects when first used.

    Args:
        url: redis:// or rediss://[user:password@]host:port/db, unix://path, or, for the master that Sentinels name, a
            SentinelUrl: sentinel://, or sentinels:// with TLS.

    Raises:
        SettingsError: the URL names no server; the message has no credentials in it.
    """
    options: dict[str, Any] = {
        "socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S, "health_check_interval": 15
    }  # fmt: skip
    try:
        check_store_url(url)
        if url.startswith(("sentinel://", "sentinels://")):
            return _connect_by_sentinel(SentinelUrl.parse(url), options)
        client: aioredis.Redis = aioredis.from_url(url, **options)
    except ValueError as error:
        raise SettingsError([f"redis_url: {redact(str(error))}"]) from None
    return client


def _connect_by_sentinel(url: SentinelUrl, options: dict[str, Any]) -> aioredis.Redis:
    sentinel = Sentinel(
        url.sentinels,
        sentinel_kwargs={
            "socket_timeout": 1.0,
            "socket_connect_timeout": 1.0,
            "username": url.sentinel_username or None,
            "password": url.sentinel_password or None,
            **url.tls,
        },
        min_other_sentinels=0,
    )  # type: ignore[no-untyped-call]
    client: _MasterClient = sentinel.master_for(
        url.service,
        redis_class=_MasterClient,
        db=url.db,
        username=url.username or None,
        password=url.password or None,
        **url.tls,
        **options,
    )
    client.watchers = sentinel
    return client


class _MasterClient(aioredis.Redis):
    """A client of whichever server is master; closes its connections to the Sentinels as well."""

    watchers: Sentinel

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool=True)
        for watcher in self.watchers.sentinels:
            await watcher.aclose()


class RedisStore:
    """A QueueStore for one model. Several models share a client."""

    def __init__(self, client: aioredis.Redis, model: str, deployment: str = "default") -> None:
        """Does not own the client."""
        self._client = client
        self._keys = Keys(deployment, model)
        folder = resources.files("bucketserve.store") / "lua"
        sources = {name: (folder / f"{name}.lua").read_text() for name in SCRIPTS}
        self._scripts = {name: client.register_script(source) for name, source in sources.items()}

    async def lead(self, owner: str, ttl_s: float, epoch: int = 0) -> Leadership | None:
        """See QueueStore."""
        keys = [self._keys.leader, self._keys.epoch]
        found = await guard(self._scripts["lead"](keys=keys, args=[owner, round(ttl_s * 1e3), epoch]))
        return None if found < 0 else Leadership(owner=owner, epoch=int(found))

    async def resign(self, leadership: Leadership) -> None:
        """See QueueStore."""
        keys = [self._keys.leader, self._keys.epoch]
        await guard(self._scripts["resign"](keys=keys, args=[leadership.owner, leadership.epoch]))

    async def load(self, leadership: Leadership) -> StoreSnapshot:
        """See QueueStore. Reads in pages, so that a long queue blocks the server for no one."""
        return await guard(self._load(leadership))

    async def apply(self, leadership: Leadership, writes: Sequence[Write]) -> Sequence[frozenset[RequestId]]:
        """See QueueStore."""
        if not writes:
            return []
        try:
            return await guard(self._apply(leadership, writes))
        except UnavailableError as error:
            if not isinstance(error.__cause__, NoScriptError):
                raise
            # The server was restarted or failed over: it has no scripts. Nothing that follows a missing script is
            # harmed by running again, since every write is idempotent.
            await guard(self._load_scripts())
            return await guard(self._apply(leadership, writes))

    async def risk(self) -> str:
        """See QueueStore."""
        info: dict[str, Any] = await guard(self._client.info("memory"))
        policy = str(info.get("maxmemory_policy", "noeviction"))
        return "" if policy == "noeviction" else f"maxmemory-policy is {policy}: set noeviction, or tickets are evicted"

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
        for write, reply in zip(writes, replies, strict=True):
            if isinstance(reply, Exception) and not (isinstance(write, Admit) and isinstance(reply, OutOfMemoryError)):
                raise reply
        return [_effect(write, reply) for write, reply in zip(writes, replies, strict=True)]

    def _call(self, write: Write) -> tuple[str, list[str], list[str | int | bytes]]:
        """Returns script name, keys and arguments after the epoch."""
        keys = self._keys
        match write:
            case Admit():
                return (
                    "admit",
                    [keys.epoch, keys.ticket, keys.waiting, keys.place],
                    [write.request_id, write.prefill_tokens, write.ticket],
                )
            case Dispatch():
                return (
                    "dispatch",
                    [keys.epoch, keys.ticket, keys.waiting, keys.place],
                    [write.worker_id, write.batch_id, *write.request_ids],
                )
            case Place():
                return (
                    "place",
                    [keys.epoch, keys.ticket, keys.waiting, keys.place],
                    [write.request_id, write.worker_id, write.batch_id],
                )
            case Remove():
                return "remove", [keys.epoch, keys.ticket, keys.waiting, keys.place], [*write.request_ids]
            case SetEdges():
                return "edges", [keys.epoch, keys.edges], [_joined(write.edges)]
            case SetOutputs():
                parts = [part for name, counts in write.counts.items() for part in (name, _joined(counts))]
                return "outputs", [keys.epoch, keys.outputs], [*parts]

    async def _load(self, leadership: Leadership) -> StoreSnapshot:
        epoch = await cast(Awaitable[bytes | None], self._client.hget(self._keys.epoch, "epoch"))
        if epoch is None or int(epoch) != leadership.epoch:
            raise StaleEpochError(f"epoch {leadership.epoch} is over")
        edges = cast(bytes | None, await self._client.get(self._keys.edges))
        outputs = await cast(Awaitable[dict[bytes, bytes]], self._client.hgetall(self._keys.outputs))
        places = {key: value async for key, value in self._client.hscan_iter(self._keys.place, count=SCAN_COUNT)}
        tickets: dict[bytes, StoredTicket] = {}
        # HSCAN may return a field twice while the hash grows; the dictionary keeps one.
        async for key, value in self._client.hscan_iter(self._keys.ticket, count=SCAN_COUNT):
            worker_id, _, batch_id = places.get(key, b"").partition(b"\n")
            tickets[key] = StoredTicket(
                request_id=RequestId(key.decode()),
                ticket=value,
                worker_id=WorkerId(worker_id.decode()) if worker_id else None,
                batch_id=BatchId(batch_id.decode()) if batch_id else None,
            )
        await self._forget_orphans(leadership, places.keys(), tickets.keys())
        return StoreSnapshot(
            edges=_split(edges),
            outputs={name.decode(): _split(counts) for name, counts in outputs.items()},
            tickets=tuple(ticket for _, ticket in sorted(tickets.items())),
        )

    async def _forget_orphans(self, leadership: Leadership, places: Set[bytes], tickets: Set[bytes]) -> None:
        """Removes what is left of tickets that are gone, evicted: nobody else ever would."""
        orphans = set(places - tickets)
        # Each ticket waits or is at a worker; only where the numbers tell otherwise is the queue read as well.
        if await self._client.zcard(self._keys.waiting) + len(places) != len(tickets):
            waiting = {key async for key, _ in self._client.zscan_iter(self._keys.waiting, count=SCAN_COUNT)}
            orphans |= waiting - tickets
        ids = [RequestId(key.decode()) for key in sorted(orphans)]
        for first in range(0, len(ids), SCAN_COUNT):
            await self.apply(leadership, [Remove(request_ids=tuple(ids[first : first + SCAN_COUNT]))])


def _effect(write: Write, reply: Any) -> frozenset[RequestId]:
    """Returns the ids on which a write took effect, from its script's reply."""
    if isinstance(write, Admit):
        return frozenset([write.request_id] if reply == 1 else [])
    if isinstance(write, SetEdges | SetOutputs):
        return frozenset()
    return frozenset(RequestId(item.decode()) for item in reply)


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _split(numbers: bytes | None) -> tuple[int, ...]:
    return tuple(int(number) for number in numbers.split(b",")) if numbers else ()


async def guard(call: Awaitable[T]) -> T:
    """Awaits a call, heeds its caller's cancellation, and turns the library's errors into ours.

    Raises:
        StaleEpochError: a script refused the epoch.
        UnavailableError: the server can't be reached, is loading, is a replica, or does not have a script.
    """
    try:
        return await heeded(call)
    except ResponseError as error:
        if str(error).startswith("STALE"):
            raise StaleEpochError(str(error)) from error
        raise UnavailableError(f"store: {error}", reason="STORE_UNAVAILABLE") from error
    except (RedisConnectionError, RedisTimeoutError, RedisError, OSError) as error:
        raise UnavailableError(f"store: {error}", reason="STORE_UNAVAILABLE") from error
