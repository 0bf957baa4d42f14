"""/v1/files: what tenants send in for batches, and what batches give back.

A file that was sent in is in bucketserve.store.files. An output or error file is a view of its batch's results, named
after the batch: there is nothing to write when a batch ends, and nothing that could be there without the other.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bucketserve.core.errors import NotFoundError, OverloadedError
from bucketserve.store.files import FileInfo, FileStore
from bucketserve.store.jobs import LOADING_TTL_S, JobInfo
from bucketserve.store.listing import ID_CHARACTERS, Listing, new_id
from bucketserve_gateway.admission import Admission
from bucketserve_gateway.openai.errors import HttpError, ParameterError
from bucketserve_gateway.openai.exchange import ClientGoneError, Exchange, too_long
from bucketserve_gateway.openai.fields import Fields
from bucketserve_gateway.openai.lines import BATCH_PREFIX, DONE, FAILED
from bucketserve_gateway.openai.uploads import Upload
from bucketserve_gateway.reads import Reads
from bucketserve_gateway.submissions import DEFAULT_TTL_S, MOST_TTL_S, Submissions

__all__ = ["FILES", "Files", "Shelves", "error_file_id", "expiry_of", "limit_of", "output_file_id", "page_of"]

FILES = "/v1/files"
PREFIX = "file-"
PURPOSE, OUTPUT_PURPOSE = "batch", "batch_output"
PIECE_BYTES = 64 << 10
"""Of a file, in one piece in the store."""
HELD_BYTES = 4 * PIECE_BYTES
"""While a file comes in or goes out: a piece, and what the connection has of it."""
FILE_BYTES, PIECE_ROOM_BYTES = 16_384, 128
"""What a file, and a piece of it, takes in the store beside its bytes."""
FORM_BYTES = 64 << 10
"""Of a form, beside its file."""
LEAST_TTL_S = 3600
MOST_LISTED, LISTED_BYTES = 10_000, 1024
"""Files of a page, and what each takes until it is sent."""
LOOKED_UP = 256
"""Files or batches that are looked up in one round trip."""
EXPIRY = ("expires_after[anchor]", "expires_after[seconds]")
MAX_DIGITS = 9
_ID = re.compile(rf"file-([0-9a-f]{{{ID_CHARACTERS}}})(-output|-errors)?")
_KINDS = {"-output": ("done", DONE), "-errors": ("failed", FAILED)}

Json = dict[str, Any]


def output_file_id(batch_id: str) -> str:
    """Returns the id of the file with the answers of a batch."""
    return _results_id(batch_id, "-output")


def error_file_id(batch_id: str) -> str:
    """Returns the id of the file with the errors of a batch."""
    return _results_id(batch_id, "-errors")


def _results_id(batch_id: str, ending: str) -> str:
    return f"{PREFIX}{batch_id.removeprefix(BATCH_PREFIX)}{ending}"


class Shelves(NamedTuple):
    """Where files and lists of them are."""

    files: FileStore
    file_list: Listing
    batch_list: Listing


@dataclass(frozen=True, slots=True)
class _Results:
    """A file that is a view of a batch's results."""

    job: JobInfo
    ending: str

    @property
    def file_id(self) -> str:
        return _results_id(self.job.job_id, self.ending)

    @property
    def num_bytes(self) -> int:
        return self.job.num_bytes if self.ending == "-output" else self.job.num_error_bytes

    @property
    def is_there(self) -> bool:
        is_ended = self.job.state == "completed"
        return is_ended and bool(self.num_bytes) and _KINDS[self.ending][0] not in self.job.gone


class Files:
    """The exchanges."""

    def __init__(
        self, stores: Shelves | None, submissions: Submissions, admission: Admission, max_file_bytes: int
    ) -> None:
        """Without a store every exchange is answered 503.

        Args:
            stores: where files are, and lists of them and of batches.
            submissions: where jobs are, and the room for all of it.
            admission: what is held.
            max_file_bytes: most bytes of a file.
        """
        self._shelves = stores
        self._submissions = submissions
        self._admission = admission
        self._max_file_bytes = max_file_bytes
        self._reads = Reads.of(PIECE_BYTES, admission.refusal)

    async def serve(self, exchange: Exchange, tenant: str) -> None:
        """One exchange."""
        name, _, action = exchange.path.removeprefix(FILES).removeprefix("/").partition("/")
        if not name:
            exchange.check_method("GET", "POST")
            await (self._list if exchange.method == "GET" else self._upload)(exchange, tenant)
        elif not action:
            exchange.check_method("GET", "DELETE")
            exchange.query()
            file = await self._find(name, tenant)
            if exchange.method == "DELETE":
                await self._delete(file)
                await exchange.answer(200, {"id": name, "object": "file", "deleted": True})
            else:
                await exchange.answer(200, _shown(file))
        elif action == "content":
            exchange.check_method("GET")
            await self._send(exchange, await self._find(name, tenant))
        else:
            raise HttpError(404, f"invalid URL ({exchange.method} {exchange.path})", "unknown_url")

    async def input_file(self, file_id: str, tenant: str) -> FileInfo:
        """Returns a file that was sent in for a batch.

        Raises:
            ParameterError: it is no such one.
        """
        try:
            file = await self._find(file_id, tenant)
        except NotFoundError as error:
            raise ParameterError("input_file_id", str(error), "file_not_found") from None
        if isinstance(file, _Results):
            raise ParameterError("input_file_id", "a file with purpose batch is needed", "invalid_purpose")
        return file

    async def lines(self, file: FileInfo, most: int) -> AsyncIterator[bytes]:
        """Yields the lines of a file, without their ends.

        Raises:
            ValueError: one has more than so many bytes.
            NotFoundError: the file was deleted meanwhile.
        """
        begun, num_bytes = list[bytes](), 0
        async for piece in self._there.files.pieces(file):
            *ends, rest = piece.split(b"\n")
            for end in ends:
                yield b"".join([*begun, end])
                begun, num_bytes = [], 0
            begun.append(rest)
            num_bytes += len(rest)
            if num_bytes > most:
                raise ValueError("too long")
        if num_bytes:
            yield b"".join(begun)

    async def _find(self, file_id: str, tenant: str) -> FileInfo | _Results:
        """Returns a file of a tenant.

        Raises:
            NotFoundError: there is none, or it is another's: nobody learns which.
        """
        store, match = self._there.files, _ID.fullmatch(file_id)
        no_file = NotFoundError("file", file_id[:64], "there is no such file, or not any more")
        if match is None:
            raise no_file
        body, ending = match.groups()
        try:
            if ending is None:
                file = await store.get(file_id)
                if file.tenant == tenant:
                    return file
            else:
                results = _Results(await self._submissions.store.get(BATCH_PREFIX + body), ending)
                if results.job.tenant == tenant and results.is_there:
                    return results
        except NotFoundError:
            pass
        raise no_file

    # --- coming in -----------------------------------------------------------------------------------------------

    async def _upload(self, exchange: Exchange, tenant: str) -> None:
        """Stores a file while it arrives."""
        exchange.query()
        store, room, most = self._there.files, self._submissions.room, self._max_file_bytes + FORM_BYTES
        length = exchange.header("content-length")
        if exchange.header("content-encoding"):
            raise HttpError(415, "send the file as content-type multipart/form-data, without content-encoding")
        if length.isdigit() and int(length) > most:
            raise too_long(most)
        upload = Upload(exchange.header("content-type"), "purpose", *EXPIRY)
        file, file_id = None, PREFIX + new_id()
        try:
            with self._admission.room() as held:
                held.resize(HELD_BYTES)
                await room.reserve(file_id, tenant, FILE_BYTES, LOADING_TTL_S)
                num_bytes, num_pieces = await self._take_in(exchange, upload, file_id, tenant)
            ttl_s = _checked(upload, num_bytes)
            # Listed first: should this process end between the two, the list has an id that names nothing.
            await self._there.file_list.add(tenant, file_id.removeprefix(PREFIX))
            name = upload.file_name or ""
            file = await store.end(file_id, tenant, name, num_bytes=num_bytes, num_pieces=num_pieces, ttl_s=ttl_s)
            await room.keep(file_id, ttl_s)
        finally:
            if file is None:
                await store.delete(file_id)
                await room.give_up(file_id)
        await exchange.answer(200, _shown(file))

    async def _take_in(self, exchange: Exchange, upload: Upload, file_id: str, tenant: str) -> tuple[int, int]:
        """Stores the pieces of a file; returns their bytes and their number."""
        num_bytes, num_pieces, is_whole = 0, 0, False
        pieces = exchange.pieces(self._max_file_bytes + FORM_BYTES)

        async def arrive() -> bool:
            """Reads until there is a piece; returns whether the form is whole."""
            async for data in pieces:
                upload.write(data)
                if upload.num_bytes >= PIECE_BYTES:
                    return False
            return True

        while not is_whole:
            try:
                is_whole = await self._reads.read(exchange.peer, arrive)
            except OverloadedError as error:
                # The connection stays for what still comes: closed now, the client might never see why.
                raise HttpError(408, str(error), error.reason.lower()) from None
            while upload.num_bytes >= (1 if is_whole else PIECE_BYTES):
                piece = upload.take(PIECE_BYTES)
                num_bytes += len(piece)
                if num_bytes > self._max_file_bytes:
                    raise too_long(self._max_file_bytes)
                await self._submissions.room.reserve(file_id, tenant, len(piece) + PIECE_ROOM_BYTES, LOADING_TTL_S)
                await self._there.files.put(file_id, num_pieces, piece)
                num_pieces += 1
        upload.end()
        return num_bytes, num_pieces

    # --- going out -----------------------------------------------------------------------------------------------

    async def _send(self, exchange: Exchange, file: FileInfo | _Results) -> None:
        """Sends a file as it is read, no faster than its reader takes it."""
        exchange.query()
        headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % file.num_bytes)]
        with self._admission.room() as held:
            held.resize(HELD_BYTES)
            await exchange.begin(200, headers)
            num_left = file.num_bytes
            try:
                async for piece in self._pieces(file):
                    held.resize(HELD_BYTES + len(piece))
                    num_left -= len(piece)
                    if num_left < 0:
                        break
                    await exchange.write(piece, is_last=False)
            except NotFoundError:
                num_left = -1
            if num_left:
                # Deleted, or expired, meanwhile: who reads it must not take it for whole.
                raise ClientGoneError
            await exchange.write(b"", is_last=True)

    def _pieces(self, file: FileInfo | _Results) -> AsyncIterator[bytes]:
        return self._there.files.pieces(file) if isinstance(file, FileInfo) else self._results(file)

    async def _results(self, file: _Results) -> AsyncIterator[bytes]:
        """Yields the lines of one kind, several at once."""
        job, mark = file.job, _KINDS[file.ending][1]
        index = 0
        while index < job.num_requests:
            some = range(index, min(index + LOOKED_UP, job.num_requests))
            found = await self._submissions.store.results(job.job_id, some, PIECE_BYTES)
            index += len(found)
            yield b"".join([line[1:] + b"\n" for line in found if line and line[:1] == mark])

    # --- there and gone ------------------------------------------------------------------------------------------

    async def _delete(self, file: FileInfo | _Results) -> None:
        if isinstance(file, FileInfo):
            await self._there.file_list.remove(file.tenant, file.file_id.removeprefix(PREFIX))
            await self._there.files.delete(file.file_id)
            await self._submissions.room.give_up(file.file_id)
            return
        job, (kind, mark) = file.job, _KINDS[file.ending]
        store, index = self._submissions.store, 0
        while index < job.num_requests:
            some = range(index, min(index + LOOKED_UP, job.num_requests))
            found = await store.results(job.job_id, some, PIECE_BYTES)
            ours = [index + i for i, line in enumerate(found) if line and line[:1] == mark]
            await store.discard(job.job_id, kind, ours)
            index += len(found)

    async def _list(self, exchange: Exchange, tenant: str) -> None:
        query = exchange.query("after", "limit", "order", "purpose")
        limit = limit_of(query, MOST_LISTED, MOST_LISTED)
        after, order, purpose = query.get("after", ""), query.get("order", "desc"), query.get("purpose")
        if after and _ID.fullmatch(after) is None:
            raise ParameterError("after", "the id of a file is needed", "invalid_value")
        if order not in ("asc", "desc"):
            raise ParameterError("order", "asc or desc", "invalid_value")
        is_newest_first = order == "desc"
        kinds = {PURPOSE: self._uploaded, OUTPUT_PURPOSE: self._of_batches}
        found: list[Json] = []
        streams = [
            kind(tenant, after.removeprefix(PREFIX), is_newest_first)
            for name, kind in kinds.items()
            if purpose in (None, name)
        ]
        heads = [await anext(stream, None) for stream in streams]
        with self._admission.room() as held:
            while len(found) <= limit and any(heads):
                held.grow(LISTED_BYTES)
                ids = [(head["id"], i) for i, head in enumerate(heads) if head is not None]
                _, i = max(ids) if is_newest_first else min(ids)
                head = heads[i]
                assert head is not None, "it has an id"
                found.append(head)
                heads[i] = await anext(streams[i], None)
            await exchange.answer(200, page_of(found, limit))

    async def _uploaded(self, tenant: str, after: str, is_newest_first: bool) -> AsyncIterator[Json]:
        while page := await self._there.file_list.page(tenant, after, LOOKED_UP, is_newest_first=is_newest_first):
            files = await self._there.files.get_many([PREFIX + each for each in page])
            for file in files:
                if file is not None:
                    yield _shown(file)
            after = page[-1]

    async def _of_batches(self, tenant: str, after: str, is_newest_first: bool) -> AsyncIterator[Json]:
        start, is_after = after[:ID_CHARACTERS], False
        endings = sorted(_KINDS, reverse=is_newest_first)
        while page := await self._there.batch_list.page(
            tenant, start, LOOKED_UP, is_after=is_after, is_newest_first=is_newest_first
        ):
            for job in await self._submissions.store.get_many([BATCH_PREFIX + each for each in page]):
                for ending in endings:
                    file = None if job is None else _Results(job, ending)
                    if file is None or not file.is_there:
                        continue
                    place = file.file_id.removeprefix(PREFIX)
                    if not after or (place < after if is_newest_first else place > after):
                        yield _shown(file)
            start, is_after = page[-1], True

    @property
    def _there(self) -> Shelves:
        _ = self._submissions.store
        assert self._shelves is not None, "there are files where there are jobs"
        return self._shelves


def limit_of(query: Mapping[str, str], most: int, default: int) -> int:
    """Returns how many things a page has.

    Raises:
        ParameterError: the query says something else than a number.
    """
    text = query.get("limit", str(default))
    if not text.isascii() or not text.isdigit() or len(text) > MAX_DIGITS or not 1 <= int(text) <= most:
        raise ParameterError("limit", f"a number from 1 to {most} is needed", "invalid_value")
    return int(text)


def page_of(found: Sequence[Json], limit: int) -> Json:
    """Returns a page: at most so many of what was found, and whether there is more."""
    data = found[:limit]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": len(found) > limit}


def _checked(upload: Upload, num_bytes: int) -> int:
    """Returns for how many seconds a file is kept that has come.

    Raises:
        ParameterError: it is none for batches.
    """
    purpose = upload.text("purpose")
    if purpose is None:
        raise ParameterError("purpose", "you must provide one", "missing_required_parameter")
    if purpose != PURPOSE:
        raise ParameterError("purpose", f"only {PURPOSE} is served", "invalid_value")
    if not num_bytes:
        raise ParameterError("file", "it is empty", "invalid_value")
    anchor, seconds = (upload.text(name) for name in EXPIRY)
    if anchor is None and seconds is None:
        return DEFAULT_TTL_S
    is_number = seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) <= MAX_DIGITS
    expiry = {"anchor": anchor, "seconds": int(seconds) if is_number and seconds else None}
    return expiry_of(Fields(expiry, "expires_after"))


def expiry_of(expiry: Fields) -> int:
    """Returns the seconds of a policy of expiry.

    Raises:
        ParameterError: it is another one than there is.
    """
    if expiry.text("anchor") != "created_at":
        raise ParameterError(expiry.name("anchor"), "created_at is needed", "invalid_value")
    seconds = expiry.integer("seconds", LEAST_TTL_S, MOST_TTL_S)
    if seconds is None:
        raise ParameterError(expiry.name("seconds"), "you must provide them", "missing_required_parameter")
    expiry.end()
    return seconds


def _shown(file: FileInfo | _Results) -> Json:
    if isinstance(file, FileInfo):
        created_us, expires_us, name, purpose = file.created_unix_us, file.expires_unix_us, file.name, PURPOSE
    else:
        created_us = file.job.ended_unix_us
        expires_us = created_us + file.job.ttl_s * 1_000_000
        name, purpose = f"{file.job.job_id}{file.ending.replace('-', '_')}.jsonl", OUTPUT_PURPOSE
    return {
        "id": file.file_id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": created_us // 1_000_000,
        "expires_at": expires_us // 1_000_000,
        "filename": name,
        "purpose": purpose,
        "status": "processed",
        "status_details": None,
    }
