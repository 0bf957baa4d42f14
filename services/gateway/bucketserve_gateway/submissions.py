"""Jobs on their way into the store: how many at once, how large, and that nothing of one is left that breaks off."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple

from bucketserve.core.errors import FieldViolation, InvalidRequestError, UnavailableError
from bucketserve.store.job_room import LATER_S, JobRoom
from bucketserve.store.jobs import LOADING_TTL_S, JobInfo, JobStore
from bucketserve.v1 import inference_pb2
from bucketserve_gateway.admission import Admission
from bucketserve_gateway.models import ModelCatalog
from bucketserve_gateway.settings import GatewaySettings

__all__ = ["DEFAULT_TTL_S", "MOST_TTL_S", "OUTPUT_TOKEN_BYTES", "Item", "Submissions", "most_tokens"]

CHUNK = 256
"""Requests written in one round trip at most."""
CHUNK_BYTES = 256 << 10
"""A chunk is written when it takes this many, however few requests that are."""
MAX_SUBMISSIONS = 8
"""At once, at this gateway."""
JOB_BYTES, REQUEST_BYTES, OUTPUT_TOKEN_BYTES = 16_384, 512, 8
"""What a job, a request of it and a token of output take in the store, beside the requests themselves."""
DEFAULT_TTL_S = 86_400
MOST_TTL_S = 30 * 86_400


class Item(NamedTuple):
    """A request of a job, as it is stored."""

    data: bytes
    most_output_bytes: int
    """What its result may take."""


class Submissions:
    """Writes jobs down."""

    def __init__(
        self, store: JobStore | None, room: JobRoom | None, settings: GatewaySettings, admission: Admission
    ) -> None:
        """Without a store everything raises UnavailableError."""
        self._store = store
        self._room = room
        self._settings = settings
        self._admission = admission
        self._num_open = 0

    @property
    def store(self) -> JobStore:
        """Where jobs are.

        Raises:
            UnavailableError: there is no store.
        """
        if self._store is None:
            raise UnavailableError("this gateway has no redis_url, which jobs need", reason="NO_JOB_STORE")
        return self._store

    @property
    def room(self) -> JobRoom:
        """How much the store may have.

        Raises:
            UnavailableError: there is no store.
        """
        _ = self.store
        assert self._room is not None, "there is a room where there is a store"
        return self._room

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Around a submission.

        Raises:
            OverloadedError: there are too many at once.
        """
        if self._num_open >= MAX_SUBMISSIONS:
            raise self._admission.refusal("MAX_SUBMISSIONS", f"{MAX_SUBMISSIONS} jobs are being submitted here")
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    async def submit(
        self,
        job_id: str,
        tenant: str,
        ttl_s: int,
        items: AsyncIterator[Item],
        *,
        note: bytes = b"",
        window_s: int | None = None,
    ) -> JobInfo:
        """Stores a job and lets it run; returns the one that is there if it was submitted before.

        Raises:
            InvalidRequestError: there is no request, or they are too many or too large.
            OverloadedError: there is no room for them in the store.
            BucketServeError: as `items` raises it.
        """
        # Of its own: two submissions under one key may come at once, and only one of them is the job.
        upload = uuid.uuid4().hex
        submission = f"{job_id}/{upload}"
        job = None
        try:
            await self.room.reserve(submission, tenant, JOB_BYTES + len(note), LOADING_TTL_S)
            await self.store.begin(job_id, tenant, ttl_s, note=note, window_s=window_s)
            number, digest = await self._upload(items, job_id, upload, tenant)
            # A job that runs already was submitted before; start() tells whether with the same requests.
            job = await self.store.start(job_id, upload, number, digest)
        finally:
            if job is not None and job.submission == submission:
                await self.room.keep(submission, job.ttl_s)
            else:
                await self.store.drop(job_id, upload)
                await self.room.give_up(submission)
        return job

    async def fail(self, job_id: str, tenant: str, ttl_s: int, note: bytes) -> JobInfo:
        """Ends a batch whose submission broke off, and keeps why.

        Raises:
            OverloadedError: there is no room for that in the store.
        """
        await self.room.reserve(f"{job_id}/", tenant, JOB_BYTES + len(note), ttl_s + LATER_S)
        return await self.store.fail(job_id, note)

    async def _upload(self, items: AsyncIterator[Item], job_id: str, upload: str, tenant: str) -> tuple[int, str]:
        """Writes the requests down, piece by piece; returns their number and digest."""
        digest, number, num_bytes = hashlib.sha256(), 0, 0
        chunk, takes = list[bytes](), 0

        async def write() -> None:
            await self.room.reserve(f"{job_id}/{upload}", tenant, takes, LOADING_TTL_S)
            await self.store.put(job_id, upload, number - len(chunk), chunk)

        async for data, most_output_bytes in items:
            digest.update(len(data).to_bytes(8, "big") + data)
            chunk.append(data)
            takes += len(data) + REQUEST_BYTES + most_output_bytes
            number, num_bytes = number + 1, num_bytes + len(data)
            self._check_size(number, num_bytes)
            if len(chunk) == CHUNK or takes >= CHUNK_BYTES:
                await write()
                chunk, takes = [], 0
        if not number:
            raise InvalidRequestError([FieldViolation("items", "a job has at least one request")])
        if chunk:
            await write()
        return number, digest.hexdigest()

    def _check_size(self, number: int, num_bytes: int) -> None:
        settings = self._settings
        if number > settings.max_job_requests:
            raise InvalidRequestError([FieldViolation("items", f"at most {settings.max_job_requests:,} in a job")])
        if num_bytes > settings.max_job_bytes:
            raise InvalidRequestError([FieldViolation("items", f"at most {settings.max_job_bytes:,} bytes in a job")])


def most_tokens(request: inference_pb2.GenerateRequest, catalog: ModelCatalog) -> int:
    """Returns the most tokens that the request may generate.

    Raises:
        UnknownModelError: nobody serves its model.
    """
    card = catalog.get(request.model).card
    asked = request.stopping.max_tokens if request.stopping.HasField("max_tokens") else card.default_max_tokens
    return min(asked, card.context_tokens)
