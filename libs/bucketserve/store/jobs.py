"""Batch jobs on Redis or Valkey: requests, who runs which, results.

| key                       | type   | content                                                                      |
|---------------------------|--------|------------------------------------------------------------------------------|
| bs:{job id}:meta          | hash   | state, total, done, failed, ttl (s), created (us), tenant, digest of requests,|
|                           |        | name of the upload that they came by; started, ended (us); bytes of results  |
|                           |        | and of those that are errors; of a batch: note, until, stopped (us), gone    |
| bs:{job id}:upload:{name} | hash   | the same while they come in: each submission has its own until one is whole  |
| bs:{job id}:item          | hash   | index -> serialised request                                                  |
| bs:{job id}:pending       | zset   | indices that nobody runs                                                     |
| bs:{job id}:lease         | zset   | index -> end of its runner's lease (ms)                                      |
| bs:{job id}:owner         | hash   | index -> its runner                                                          |
| bs:{job id}:lost          | hash   | index -> how many runners ended while they ran it                            |
| bs:{job id}:result        | hash   | index -> serialised result                                                   |
| bs:{d/jobs}:open | zset   | job id -> created (us); jobs that may have something to run                  |

All keys of a job expire together, ttl seconds after its last progress: a request taken up, still running, or ended.
Requests are forgotten when all have results.

A job with a note is a batch of OpenAI's API: what the note says, and what requests and results are, is the gateway's
matter (bucketserve_gateway/openai). It may be over before all have results: then the runners give those that are left
an error each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar, cast

import redis.asyncio as aioredis

from bucketserve.core.errors import DuplicateRequestError, NotFoundError
from bucketserve.store.redis import guard
from bucketserve.store.sealing import PLAIN, SealedError, Sealer

__all__ = ["LOADING_TTL_S", "JobInfo", "JobStore"]

T = TypeVar("T")

MOST_AT_ONCE = 8
"""Commands at once, and so connections."""
JOBS_AT_ONCE = 256
"""Jobs looked at in one round trip."""
MAX_ANSWER_BYTES = 4 << 20
"""Of requests or results in one answer, if there are several."""
LOADING_TTL_S = 600
"""A submission that stops half-way is forgotten after this."""
SCRIPTS = (
    "job_begin",
    "job_put",
    "job_start",
    "job_cancel",
    "job_stop",
    "job_fail",
    "job_discard",
    "job_claim",
    "job_renew",
    "job_release",
    "job_finish",
    "job_results",
)
PARTS = ("meta", "item", "pending", "lease", "owner", "result", "lost")
UNENDED = ("loading", "running")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """A job as it stands."""

    job_id: str
    state: str
    """loading, running, completed or cancelled; of a batch also failed: it was refused as a whole."""
    tenant: str
    num_requests: int
    num_done: int
    num_failed: int
    ttl_s: int
    created_unix_us: int
    upload: str = ""
    """Name of the submission that its requests came by; empty before it runs."""
    note: bytes = b""
    """What a batch is; empty for the jobs of JobService."""
    started_unix_us: int = 0
    ended_unix_us: int = 0
    until_unix_us: int = 0
    """When it is over, whatever has a result by then; 0 for never."""
    stopped_unix_us: int = 0
    """When somebody wanted it to be over, if it was running."""
    num_bytes: int = 0
    """Of results that are no errors."""
    num_error_bytes: int = 0
    gone: frozenset[str] = frozenset()
    """Kinds of results that were taken out: done, failed."""

    @property
    def is_over(self) -> bool:
        """Whether its requests are not to run any more."""
        return self.stopped_unix_us > 0 or 0 < self.until_unix_us <= time.time_ns() // 1000

    @property
    def submission(self) -> str:
        """What its room is taken under (job_room.py)."""
        return f"{self.job_id}/{self.upload}"


class JobStore:
    """Every method is atomic and safe to repeat.

    Raises, all of them:
        UnavailableError: the server can't be reached.
    """

    def __init__(self, client: aioredis.Redis, deployment: str = "default", sealer: Sealer = PLAIN) -> None:
        """Does not own the client; notes, requests and results are sealed."""
        self._client = client
        self._sealer = sealer
        self._open = f"bs:{{{deployment}/jobs}}:open"
        self._limit = asyncio.Semaphore(MOST_AT_ONCE)
        folder = resources.files("bucketserve.store") / "lua"
        self._scripts = {name: client.register_script((folder / f"{name}.lua").read_text()) for name in SCRIPTS}

    async def begin(
        self, job_id: str, tenant: str, ttl_s: int, *, note: bytes = b"", window_s: int | None = None
    ) -> JobInfo:
        """Makes room for a job's requests; returns the job if there is one of that id.

        A batch has a note, and a window after which it is over.
        """
        created_us = time.time_ns() // 1000
        fields: dict[str, str | int | bytes] = {"tenant": tenant, "ttl": ttl_s, "created": created_us}
        fields |= {"total": 0, "done": 0, "failed": 0}
        if window_s is not None:
            fields |= {"note": self._sealer.seal(note, f"{job_id}/note"), "until": created_us + window_s * 1_000_000}
        pairs = [item for field in fields.items() for item in field]
        await self._run("job_begin", [_key(job_id, "meta")], LOADING_TTL_S, *pairs)
        return await self.get(job_id)

    async def put(self, job_id: str, upload: str, first_index: int, requests: Sequence[bytes]) -> None:
        """Stores requests of a job that is loading, apart from those of other submissions under the same id.

        Raises:
            NotFoundError: its submission took too long.
        """
        keys = [_key(job_id, "meta"), _key(job_id, f"upload:{upload}")]
        sealed = [self._sealer.seal(item, f"{job_id}/item/{i}") for i, item in enumerate(requests, first_index)]
        if await self._run("job_put", keys, LOADING_TTL_S, first_index, *sealed) < 0:
            raise NotFoundError("job", job_id)

    async def start(self, job_id: str, upload: str, total: int, digest: str) -> JobInfo:
        """Lets a job run with the requests of this submission, unless it does already.

        Raises:
            DuplicateRequestError: it was submitted with other requests.
            NotFoundError: its submission took too long.
        """
        created_us = (await self.get(job_id)).created_unix_us
        # Listed first: should this process end between the two, runners find a job that has not started, and wait.
        await self._ask(self._client.zadd(self._open, {job_id: created_us}))
        names = ("meta", f"upload:{upload}", "item", "pending")
        found = await self._run("job_start", [_key(job_id, name) for name in names], total, digest, upload)
        if found < 0:
            raise NotFoundError("job", job_id)
        if not found:
            raise DuplicateRequestError("a job with this idempotency key has other requests")
        return await self.get(job_id)

    async def get(self, job_id: str) -> JobInfo:
        """Returns a job.

        Raises:
            NotFoundError: there is none, or not any more.
        """
        info = self._info(job_id, await self._meta(job_id))
        if info is None:
            raise NotFoundError("job", job_id)
        return info

    async def cancel(self, job_id: str) -> JobInfo:
        """Ends a job.

        Raises:
            NotFoundError: there is none.
        """
        await self._run("job_cancel", _parts(job_id))
        return await self.get(job_id)

    async def stop(self, job_id: str) -> JobInfo:
        """Lets a batch be over now; one that is still being submitted is cancelled.

        Raises:
            NotFoundError: there is none.
        """
        await self._run("job_stop", [_key(job_id, "meta")])
        return await self.get(job_id)

    async def fail(self, job_id: str, note: bytes) -> JobInfo:
        """Ends a batch that was being submitted: nothing of it runs. The note says why.

        Raises:
            NotFoundError: there is none.
        """
        await self._run("job_fail", [_key(job_id, "meta")], self._sealer.seal(note, f"{job_id}/note"))
        return await self.get(job_id)

    async def drop(self, job_id: str, upload: str) -> None:
        """Removes what has come in of a submission that broke off."""
        await self._ask(self._client.unlink(_key(job_id, f"upload:{upload}")))

    async def forget(self, job_id: str) -> None:
        """Removes a batch of which nothing has started."""
        await self._ask(self._client.unlink(_key(job_id, "meta")))

    async def discard(self, job_id: str, kind: str, indices: Sequence[int]) -> None:
        """Takes results of a kind, done or failed, out of a job that has ended."""
        await self._run("job_discard", [_key(job_id, "meta"), _key(job_id, "result")], kind, *indices)

    async def get_many(self, job_ids: Sequence[str]) -> list[JobInfo | None]:
        """Returns jobs; None for each that there is not, or not any more, or that can't be opened here."""
        found: list[JobInfo | None] = []
        for job_id, meta in zip(job_ids, await self._metas(job_ids), strict=True):
            try:
                found.append(self._info(job_id, meta))
            except SealedError:
                found.append(None)
        return found

    async def results(
        self, job_id: str, indices: Sequence[int], max_bytes: int = MAX_ANSWER_BYTES
    ) -> list[bytes | None]:
        """Returns results, None where there is none yet: the first, and more while they are within max_bytes."""
        if not indices:
            return []
        found: list[bytes] = await self._run("job_results", [_key(job_id, "result")], max_bytes, *indices)
        return [
            self._sealer.open(result, f"{job_id}/result/{index}") if result else None
            for index, result in zip(indices, found, strict=False)
        ]

    # --- for runners ---------------------------------------------------------------------------------------------

    async def open_jobs(self, on_sealed: Callable[[SealedError], None] = lambda error: None) -> list[JobInfo]:
        """Returns the jobs that run, oldest first; those that are over are dropped from the list.

        Those that can't be opened here are left out, and on_sealed is told of one of them: others may have the key.
        """
        names = [name.decode() for name in cast(list[bytes], await self._ask(self._client.zrange(self._open, 0, -1)))]
        jobs, sealed = [], None
        for start in range(0, len(names), JOBS_AT_ONCE):
            some = names[start : start + JOBS_AT_ONCE]
            for name, meta in zip(some, await self._metas(some), strict=True):
                try:
                    found = self._info(name, meta)
                    is_open = found is not None and found.state in UNENDED
                    info = found if is_open else await self._unlist(name)
                except SealedError as error:
                    sealed = error
                    continue
                if info is not None and info.state == "running":
                    jobs.append(info)
        if sealed is not None:
            on_sealed(sealed)
        return jobs

    async def _unlist(self, job_id: str) -> JobInfo | None:
        """Takes a job that is over off the list; returns it if it was submitted anew meanwhile."""
        await self._ask(self._client.zrem(self._open, job_id))
        info = self._info(job_id, await self._meta(job_id))
        if info is None or info.state not in UNENDED:
            return None
        # A job that is in no list never runs.
        await self._ask(self._client.zadd(self._open, {job_id: info.created_unix_us}))
        return info

    async def claim(
        self, job_id: str, owner: str, most: int, lease_s: float, max_bytes: int = MAX_ANSWER_BYTES
    ) -> list[tuple[int, bytes]]:
        """Gives a runner at most that many requests to run; they are its own until its lease is over.

        However large it is there is one, if any waits; more of them while they are within max_bytes. One that the
        server has lost, evicted, is empty: without a result it would be given again and again.

        Raises:
            SealedError: one can't be opened here.
        """
        indices = await self._run("job_claim", _parts(job_id), owner, most, round(lease_s * 1e3), max_bytes)
        if not indices:
            return []
        call = self._client.hmget(_key(job_id, "item"), [str(index) for index in indices])
        items = await self._ask(cast(Awaitable[list[bytes | None]], call))
        try:
            return [
                (index, b"" if item is None else self._sealer.open(item, f"{job_id}/item/{index}"))
                for index, item in zip(indices, items, strict=True)
            ]
        except SealedError:
            # Others may have the key: it is no fault of the requests.
            await self.release(job_id, owner, indices)
            raise

    async def losses(self, job_id: str, indices: Sequence[int]) -> list[int]:
        """Returns how many runners ended while they ran each request."""
        if not indices:
            return []
        call = self._client.hmget(_key(job_id, "lost"), [str(index) for index in indices])
        found = await self._ask(cast(Awaitable[list[bytes | None]], call))
        return [max(int(number or 0), 0) for number in found]

    async def renew(self, job_id: str, owner: str, indices: Sequence[int], lease_s: float) -> set[int]:
        """Renews leases; returns the requests that are still the runner's to run."""
        return set(await self._run("job_renew", _parts(job_id), owner, round(lease_s * 1e3), *indices))

    async def release(self, job_id: str, owner: str, indices: Sequence[int]) -> None:
        """Gives requests back."""
        await self._run("job_release", _parts(job_id), owner, *indices)

    async def finish(self, job_id: str, owner: str, index: int, result: bytes, *, is_error: bool) -> bool:
        """Stores a result; False if the request is not the runner's any more or has one."""
        sealed = self._sealer.seal(result, f"{job_id}/result/{index}")
        return bool(await self._run("job_finish", _parts(job_id), owner, index, sealed, int(is_error), len(result)))

    def _info(self, job_id: str, meta: dict[bytes, bytes]) -> JobInfo | None:
        """Returns a job as its meta describes it; None if that is gone, or a part of it."""
        if b"state" not in meta or b"created" not in meta:
            return None
        return JobInfo(
            job_id=job_id,
            state=meta[b"state"].decode(),
            tenant=meta[b"tenant"].decode(),
            num_requests=int(meta[b"total"]),
            num_done=int(meta[b"done"]),
            num_failed=int(meta[b"failed"]),
            ttl_s=int(meta[b"ttl"]),
            created_unix_us=int(meta[b"created"]),
            upload=meta.get(b"upload", b"").decode(),
            note=self._sealer.open(meta.get(b"note", b""), f"{job_id}/note"),
            started_unix_us=int(meta.get(b"started", 0)),
            ended_unix_us=int(meta.get(b"ended", 0)),
            until_unix_us=int(meta.get(b"until", 0)),
            stopped_unix_us=int(meta.get(b"stopped", 0)),
            num_bytes=int(meta.get(b"bytes:done", 0)),
            num_error_bytes=int(meta.get(b"bytes:failed", 0)),
            gone=frozenset(kind for kind in ("done", "failed") if f"gone:{kind}".encode() in meta),
        )

    async def _meta(self, job_id: str) -> dict[bytes, bytes]:
        return await self._ask(cast(Awaitable[dict[bytes, bytes]], self._client.hgetall(_key(job_id, "meta"))))

    async def _metas(self, job_ids: Sequence[str]) -> list[dict[bytes, bytes]]:
        async with self._client.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hgetall(_key(job_id, "meta"))
            return await self._ask(cast(Awaitable[list[dict[bytes, bytes]]], pipeline.execute()))

    async def _ask(self, call: Awaitable[T]) -> T:
        # As many connections as commands at once: a thousand results that come together must not open a thousand.
        async with self._limit:
            return await guard(call)

    async def _run(self, script: str, keys: Sequence[str], *args: str | int | bytes) -> Any:
        # register_script loads the script again where the server does not know it.
        return await self._ask(self._scripts[script](keys=list(keys), args=list(args)))


def _key(job_id: str, name: str) -> str:
    return f"bs:{{{job_id}}}:{name}"


def _parts(job_id: str) -> list[str]:
    """Returns the keys of a job that has started."""
    return [_key(job_id, name) for name in PARTS]
