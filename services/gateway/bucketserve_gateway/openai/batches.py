"""/v1/batches: a batch is a job whose requests are the lines of a file; what runs it is job_runner.py and lines.py."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import re
from collections.abc import AsyncGenerator
from typing import Any

from bucketserve.core.errors import NotFoundError
from bucketserve.store.files import FileInfo
from bucketserve.store.jobs import JobInfo
from bucketserve.store.listing import ID_CHARACTERS, Listing, new_id
from bucketserve_gateway.admission import Room
from bucketserve_gateway.auth import Identity
from bucketserve_gateway.openai.bodies import object_of
from bucketserve_gateway.openai.errors import HttpError, ParameterError
from bucketserve_gateway.openai.exchange import Exchange
from bucketserve_gateway.openai.fields import Fields
from bucketserve_gateway.openai.files import Files, error_file_id, expiry_of, limit_of, output_file_id, page_of
from bucketserve_gateway.openai.lines import BATCH_PREFIX, READERS, BatchLines, LineError, Note
from bucketserve_gateway.submissions import DEFAULT_TTL_S, Item, Submissions

__all__ = ["BATCHES", "Batches"]

BATCHES = "/v1/batches"
WINDOW, WINDOW_S = "24h", 86_400
MOST_LISTED, LISTED, LISTED_BYTES = 100, 20, 4096
"""Batches of a page, and what each takes until it is sent, beside its note."""
JSON_COPIES = 4
"""Of JSON that is read: it, and what it says as objects."""
MAX_ERRORS, MAX_ERROR_CHARACTERS = 50, 256
"""Of a batch that is refused."""
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
UTF8_MARK = b"\xef\xbb\xbf"
_ID = re.compile(rf"{BATCH_PREFIX}[0-9a-f]{{{ID_CHARACTERS}}}")

Json = dict[str, Any]


class _BadFileError(Exception):
    """A file is none of a batch."""

    def __init__(self, errors: list[Json]) -> None:
        super().__init__("the file is none of a batch")
        self.errors = errors


class Batches:
    """The exchanges."""

    def __init__(
        self,
        files: Files,
        listing: Listing | None,
        submissions: Submissions,
        lines: BatchLines,
        *,
        max_lines: int,
        max_line_bytes: int,
    ) -> None:
        """Without a store every exchange is answered 503.

        Args:
            files: where lines come from.
            listing: the tenants' batches.
            submissions: where jobs are.
            lines: what reads them.
            max_lines: most lines of a file, empty ones included.
            max_line_bytes: most bytes of a line.
        """
        self._files = files
        self._maybe_listing = listing
        self._submissions = submissions
        self._lines = lines
        self._max_lines = max_lines
        self._max_line_bytes = max_line_bytes

    async def serve(self, exchange: Exchange, tenant: str, identity: Identity, body: bytes, room: Room) -> None:
        """One exchange. The body is that of a batch to be made; what is held of it counts in a room."""
        room.resize(len(body) * JSON_COPIES)
        name, _, action = exchange.path.removeprefix(BATCHES).removeprefix("/").partition("/")
        if not name and exchange.method == "POST":
            exchange.query()
            await exchange.while_connected(self._create(exchange, tenant, identity, body))
        elif not name:
            exchange.check_method("GET", "POST")
            await self._list(exchange, tenant, room)
        elif not action:
            exchange.check_method("GET")
            exchange.query()
            await exchange.answer(200, _shown(await self._find(name, tenant)))
        elif action == "cancel":
            exchange.check_method("POST")
            exchange.query()
            await exchange.answer(200, _shown(await self._cancel(name, tenant)))
        else:
            raise HttpError(404, f"invalid URL ({exchange.method} {exchange.path})", "unknown_url")

    async def _create(self, exchange: Exchange, tenant: str, identity: Identity, body: bytes) -> None:
        """Makes a batch of a file. It is answered when all lines have been read: a batch that is wrong has failed."""
        note, file, kept_s = await self._terms(Fields(object_of(body)), tenant)
        batch_id, ttl_s = BATCH_PREFIX + new_id(), WINDOW_S + kept_s
        store, listing = self._submissions.store, self._listing
        is_kept = False
        with self._submissions.place():
            try:
                await listing.add(tenant, batch_id.removeprefix(BATCH_PREFIX))
                try:
                    async with contextlib.aclosing(self._items(file, note.endpoint, identity)) as items:
                        job = await self._submissions.submit(
                            batch_id, tenant, ttl_s, items, note=note.to_bytes(), window_s=WINDOW_S
                        )
                except _BadFileError as error:
                    refused = dataclasses.replace(note, errors=error.errors).to_bytes()
                    job = await self._submissions.fail(batch_id, tenant, ttl_s, refused)
                is_kept = True
            finally:
                if not is_kept:
                    await store.forget(batch_id)
                    await listing.remove(tenant, batch_id.removeprefix(BATCH_PREFIX))
        await exchange.answer(200, _shown(job))

    async def _terms(self, fields: Fields, tenant: str) -> tuple[Note, FileInfo, int]:
        """Returns what a batch is to be, its file, and for how many seconds its results are kept.

        Raises:
            ParameterError: there is no such batch.
        """
        file_id, endpoint, window = (fields.text(n) for n in ("input_file_id", "endpoint", "completion_window"))
        for name, value in (("input_file_id", file_id), ("endpoint", endpoint), ("completion_window", window)):
            if value is None:
                raise ParameterError(name, "you must provide one", "missing_required_parameter")
        if endpoint not in READERS:
            raise ParameterError("endpoint", f"one of {', '.join(READERS)}", "invalid_value")
        if window != WINDOW:
            raise ParameterError("completion_window", f"{WINDOW} is needed", "invalid_value")
        metadata = _metadata(fields.take("metadata"))
        expiry = fields.object("output_expires_after")
        kept_s = DEFAULT_TTL_S if expiry is None else expiry_of(expiry)
        fields.end()
        file = await self._files.input_file(file_id or "", tenant)
        note = Note(endpoint=endpoint, input_file_id=file.file_id, window_s=WINDOW_S, metadata=metadata)
        return note, file, kept_s

    async def _items(self, file: FileInfo, endpoint: str, identity: Identity) -> AsyncGenerator[Item, None]:
        """Yields the lines of a file as requests of a job, as long as none is wrong.

        Raises:
            _BadFileError: with what is wrong, when all have been read, or there is too much.
        """
        errors: list[Json] = []
        seen: set[bytes] = set()
        number = 0
        try:
            async for line in self._files.lines(file, self._max_line_bytes):
                number += 1
                data = (line.removeprefix(UTF8_MARK) if number == 1 else line).strip(b" \t\r")
                if number > self._max_lines:
                    errors.append(_error("too_many_lines", f"at most {self._max_lines:,} in a batch", number))
                    break
                if not data:
                    # Others have their turn.
                    await asyncio.sleep(0)
                    continue
                try:
                    custom_id, item = await self._lines.check(data, endpoint, identity)
                    digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
                    if digest in seen:
                        raise LineError("duplicate_custom_id", "a line before this one has it", "custom_id")
                    seen.add(digest)
                except LineError as error:
                    errors.append(_error(error.code, str(error), number, error.param))
                    if len(errors) >= MAX_ERRORS:
                        break
                    continue
                if not errors:
                    yield item
        except ValueError:
            text = f"a line has at most {self._max_line_bytes:,} bytes"
            errors.append(_error("line_too_long", text, number + 1))
        if not seen and not errors:
            errors.append(_error("empty_file", "the file has no lines", None))
        if errors:
            raise _BadFileError(errors)

    async def _cancel(self, batch_id: str, tenant: str) -> JobInfo:
        job = await self._find(batch_id, tenant)
        status = _status(job)
        if status in ("completed", "failed", "expired"):
            message = f"cannot cancel a batch with status {status!r}"
            raise HttpError(409, message, "invalid_status", [(b"x-should-retry", b"false")])
        return await self._submissions.store.stop(job.job_id)

    async def _find(self, batch_id: str, tenant: str) -> JobInfo:
        """Returns a batch of a tenant.

        Raises:
            NotFoundError: there is none, or it is another's: nobody learns which.
        """
        store = self._submissions.store
        if _ID.fullmatch(batch_id):
            with contextlib.suppress(NotFoundError):
                job = await store.get(batch_id)
                if job.tenant == tenant:
                    return job
        raise NotFoundError("batch", batch_id[:64], "there is no such batch, or not any more")

    async def _list(self, exchange: Exchange, tenant: str, room: Room) -> None:
        query = exchange.query("after", "limit")
        limit, after = limit_of(query, MOST_LISTED, LISTED), query.get("after", "")
        if after and _ID.fullmatch(after) is None:
            raise ParameterError("after", "the id of a batch is needed", "invalid_value")
        found, after = list[Json](), after.removeprefix(BATCH_PREFIX)
        while len(found) <= limit and (page := await self._listing.page(tenant, after, limit + 1)):
            jobs = await self._submissions.store.get_many([BATCH_PREFIX + each for each in page])
            room.grow(sum(LISTED_BYTES + len(job.note) * JSON_COPIES for job in jobs if job is not None))
            found += [_shown(job) for job in jobs if job is not None]
            after = page[-1]
        await exchange.answer(200, page_of(found, limit))

    @property
    def _listing(self) -> Listing:
        _ = self._submissions.store
        assert self._maybe_listing is not None, "there is a list where there is a store"
        return self._maybe_listing


def _metadata(value: Any) -> dict[str, str] | None:
    """Returns the pairs that a batch has of its owner's."""
    if value is None:
        return None
    is_right = isinstance(value, dict) and len(value) <= MAX_METADATA
    if not is_right or not all(
        isinstance(text, str) and len(key) <= MAX_METADATA_KEY and len(text) <= MAX_METADATA_VALUE
        for key, text in value.items()
    ):
        most = f"{MAX_METADATA} strings of {MAX_METADATA_VALUE} characters with names of {MAX_METADATA_KEY}"
        raise ParameterError("metadata", f"at most {most}", "invalid_value")
    return dict(value)


def _error(code: str, message: str, line: int | None, param: str | None = None) -> Json:
    return {"code": code, "message": message[:MAX_ERROR_CHARACTERS], "line": line, "param": param}


def _status(job: JobInfo) -> str:
    match job.state:
        case "loading":
            return "validating"
        case "failed" | "cancelled":
            return job.state
        case "running":
            if job.stopped_unix_us:
                return "cancelling"
            return "finalizing" if job.is_over else "in_progress"
    if job.stopped_unix_us:
        return "cancelled"
    return "expired" if job.ended_unix_us >= job.until_unix_us else "completed"


def _shown(job: JobInfo) -> Json:
    note, status = Note.of(job), _status(job)

    def when(unix_us: int, *statuses: str) -> int | None:
        return unix_us // 1_000_000 if unix_us and (not statuses or status in statuses) else None

    has_ended = job.state == "completed"
    return {
        "id": job.job_id,
        "object": "batch",
        "endpoint": note.endpoint,
        "errors": {"object": "list", "data": note.errors} if note.errors else None,
        "input_file_id": note.input_file_id,
        "completion_window": WINDOW,
        "status": status,
        "output_file_id": output_file_id(job.job_id) if has_ended and job.num_bytes else None,
        "error_file_id": error_file_id(job.job_id) if has_ended and job.num_error_bytes else None,
        "created_at": when(job.created_unix_us),
        "in_progress_at": when(job.started_unix_us),
        "expires_at": when(job.created_unix_us + note.window_s * 1_000_000),
        "finalizing_at": when(job.until_unix_us if status in ("finalizing", "expired") else job.ended_unix_us)
        if status in ("finalizing", "expired", "completed")
        else None,
        "completed_at": when(job.ended_unix_us, "completed"),
        "failed_at": when(job.ended_unix_us, "failed"),
        "expired_at": when(job.ended_unix_us, "expired"),
        "cancelling_at": when(job.stopped_unix_us),
        "cancelled_at": when(job.ended_unix_us, "cancelled"),
        "request_counts": {
            "total": job.num_requests,
            "completed": job.num_done - job.num_failed,
            "failed": job.num_failed,
        },
        "metadata": note.metadata,
    }
