"""Files that tenants send in, on Redis or Valkey, in pieces.

| key                | type | content                                                        |
|--------------------|------|----------------------------------------------------------------|
| bs:{file id}:file  | hash | tenant, name, bytes, pieces, created, expires (us)             |
| bs:{file id}:piece | hash | number of the piece -> its bytes                               |

The first is there when all of the second is. What takes too long to come in is forgotten.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import redis.asyncio as aioredis

from bucketserve.core.errors import NotFoundError
from bucketserve.store.jobs import LOADING_TTL_S, MOST_AT_ONCE
from bucketserve.store.redis import guard
from bucketserve.store.sealing import PLAIN, SealedError, Sealer

__all__ = ["FileInfo", "FileStore"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """A file."""

    file_id: str
    tenant: str
    name: str
    """As its sender called it: no path of anybody's."""
    num_bytes: int
    num_pieces: int
    created_unix_us: int
    expires_unix_us: int


class FileStore:
    """Raises, every method.

    UnavailableError: the server can't be reached, or is full.
    """

    def __init__(self, client: aioredis.Redis, sealer: Sealer = PLAIN) -> None:
        """Does not own the client; names and pieces are sealed."""
        self._client = client
        self._sealer = sealer
        self._limit = asyncio.Semaphore(MOST_AT_ONCE)

    async def put(self, file_id: str, number: int, piece: bytes) -> None:
        """Stores a piece of a file that is coming in."""
        key = _key(file_id, "piece")
        async with self._client.pipeline() as pipeline:
            pipeline.hset(key, str(number), self._sealer.seal(piece, f"{file_id}/{number}"))
            pipeline.expire(key, LOADING_TTL_S)
            await self._ask(cast(Awaitable[object], pipeline.execute()))

    async def end(
        self, file_id: str, tenant: str, name: str, *, num_bytes: int, num_pieces: int, ttl_s: int
    ) -> FileInfo:
        """Makes a file of the pieces that have come in; it is kept for ttl_s seconds.

        Raises:
            NotFoundError: they took too long, and some are gone.
        """
        created_us = time.time_ns() // 1000
        info = FileInfo(
            file_id=file_id,
            tenant=tenant,
            name=name,
            num_bytes=num_bytes,
            num_pieces=num_pieces,
            created_unix_us=created_us,
            expires_unix_us=created_us + ttl_s * 1_000_000,
        )
        fields = {
            "tenant": tenant,
            "name": self._sealer.seal(name.encode(), f"{file_id}/name"),
            "bytes": num_bytes,
            "pieces": num_pieces,
            "created": created_us,
            "expires": info.expires_unix_us,
        }
        async with self._client.pipeline() as pipeline:
            pipeline.hset(_key(file_id, "file"), mapping=cast(Any, fields))
            for kind in ("file", "piece"):
                pipeline.expire(_key(file_id, kind), ttl_s)
            pipeline.hlen(_key(file_id, "piece"))
            found = await self._ask(cast(Awaitable[list[int]], pipeline.execute()))
        if found[-1] != num_pieces:
            await self.delete(file_id)
            raise NotFoundError("file", file_id)
        return info

    async def get(self, file_id: str) -> FileInfo:
        """Returns a file.

        Raises:
            NotFoundError: there is none, or not any more.
            SealedError: it can't be opened here.
        """
        [fields] = await self._fields([file_id])
        info = self._info(file_id, fields)
        if info is None:
            raise NotFoundError("file", file_id)
        return info

    async def get_many(self, file_ids: list[str]) -> list[FileInfo | None]:
        """Returns files; None for each that there is not, or not any more, or that can't be opened here."""
        found: list[FileInfo | None] = []
        for file_id, fields in zip(file_ids, await self._fields(file_ids), strict=True):
            try:
                found.append(self._info(file_id, fields))
            except SealedError:
                found.append(None)
        return found

    async def pieces(self, info: FileInfo) -> AsyncIterator[bytes]:
        """Yields the pieces of a file in order.

        Raises:
            NotFoundError: it was deleted, or has expired, meanwhile.
        """
        for number in range(info.num_pieces):
            call = self._client.hget(_key(info.file_id, "piece"), str(number))
            piece = await self._ask(cast(Awaitable[bytes | None], call))
            if piece is None:
                raise NotFoundError("file", info.file_id)
            yield self._sealer.open(piece, f"{info.file_id}/{number}")

    async def delete(self, file_id: str) -> None:
        """Removes a file, or what has come in of one."""
        keys = [_key(file_id, kind) for kind in ("file", "piece")]
        await self._ask(cast(Awaitable[object], self._client.unlink(*keys)))

    async def _fields(self, file_ids: list[str]) -> list[dict[bytes, bytes]]:
        async with self._client.pipeline(transaction=False) as pipeline:
            for file_id in file_ids:
                pipeline.hgetall(_key(file_id, "file"))
            return await self._ask(cast(Awaitable[list[dict[bytes, bytes]]], pipeline.execute()))

    def _info(self, file_id: str, fields: dict[bytes, bytes]) -> FileInfo | None:
        if b"expires" not in fields:
            return None
        return FileInfo(
            file_id=file_id,
            tenant=fields[b"tenant"].decode(),
            name=self._sealer.open(fields[b"name"], f"{file_id}/name").decode(),
            num_bytes=int(fields[b"bytes"]),
            num_pieces=int(fields[b"pieces"]),
            created_unix_us=int(fields[b"created"]),
            expires_unix_us=int(fields[b"expires"]),
        )

    async def _ask(self, call: Awaitable[T]) -> T:
        async with self._limit:
            return await guard(call)


def _key(file_id: str, kind: str) -> str:
    return f"bs:{{{file_id}}}:{kind}"
