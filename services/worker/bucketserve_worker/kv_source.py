"""Ways by which KV comes here: out of this process, out of shared memory, through a gRPC stream.

Each yields a block of our own whose length and checksum are right, or raises. What comes is never used unverified.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import re
from dataclasses import dataclass

import grpc
import xxhash

from bucketserve.addresses import AddressError
from bucketserve.core.errors import BucketServeError
from bucketserve.engine.kv_staging import MEMFD_NAME, KvStaging, StagedKv, checksum, locality
from bucketserve.rpc.channel import open_channel
from bucketserve.rpc.deployment import Deployment
from bucketserve.v1 import scheduler_pb2, worker_pb2, worker_pb2_grpc
from bucketserve_worker.kv_holder import KvHolder

__all__ = ["PIECE_BYTES", "Fetched", "KvSources", "KvTransferError"]

PIECE_BYTES = 1 << 20
SHARED_PATH = re.compile(r"/proc/[0-9]+/fd/[0-9]+")
MAX_TRAILER_BYTES = 64 << 20
"""Of what comes with the KV: its RunSpec holds the prompt."""
SILENCE_S = 5.0
"""How long a source may be silent, or away: one that was started again is reached within the channel's backoff."""
INLINE_BYTES = 4 << 20
"""Up to here a copy holds the event loop up for less than half a millisecond; a thread would cost as much again."""


class KvTransferError(BucketServeError):
    """The KV could not be had, or is not what its sender says; it has to be computed again."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """KV that has come, and what came with it."""

    block: StagedKv
    trailer: worker_pb2.KvTrailer
    transport: str


@dataclass(slots=True, eq=False)
class _Peer:
    """The way to another worker."""

    channel: grpc.aio.Channel
    num_calls: int = 0
    """That use it now: it is closed under none of them."""


class KvSources:
    """Fetches KV by the nearest way; keeps channels and mappings."""

    def __init__(
        self, worker_id: str, deployment: Deployment, holder: KvHolder, staging: KvStaging, layout: str
    ) -> None:
        """Holder is our own: a worker whose role was switched may go on with what it prefilled itself."""
        self._worker_id = worker_id
        self._deployment = deployment
        self._holder = holder
        self._staging = staging
        self._layout = layout
        self._peers: dict[str, _Peer] = {}
        self._files = _SharedFiles()

    async def fetch(self, pull: scheduler_pb2.PullKv) -> Fetched:
        """Returns the KV of a run; it stays held at its source until the scheduler ends that.

        Raises:
            KvTransferError: it could not be had, or did not come as it was sent.
            grpc.aio.AioRpcError: the source does not hold it, or the connection broke.
        """
        if pull.kv.layout != self._layout:
            raise KvTransferError(f"its layout is {pull.kv.layout!r}, ours {self._layout!r}: other model or dtype")
        if pull.kv.kv_bytes > pull.kv.num_bytes or pull.kv.num_bytes > self._staging.num_bytes + MAX_TRAILER_BYTES:
            raise KvTransferError(f"{pull.kv.num_bytes:,} bytes are more than this worker has for all its KV")
        if pull.source_worker_id == self._worker_id:
            block, transport = self._from_own(pull), "in_process"
        else:
            source = self._files.view(pull.kv)
            block, transport = self._staging.take(pull.kv.num_bytes), "grpc" if source is None else "shared_memory"
            try:
                found = await (self._by_stream(pull, block) if source is None else _copy(source, block))
                if found != pull.kv.checksum:
                    raise KvTransferError(f"checksum mismatch by {transport}: corrupt, or its source has let it go")
            except BaseException:
                block.release()
                raise
        try:
            trailer = worker_pb2.KvTrailer.FromString(bytes(block.data[pull.kv.kv_bytes :]))
            # Workers of earlier versions, which have no handles, don't say.
            if trailer.run_id not in ("", pull.run_id):
                raise KvTransferError("what came is another run's")
        except BaseException:
            block.release()
            raise
        return Fetched(block, trailer, transport)

    async def close(self) -> None:
        """Closes channels and mappings."""
        await asyncio.gather(*(peer.channel.close() for peer in self._peers.values()))
        self._files.close()

    def _from_own(self, pull: scheduler_pb2.PullKv) -> StagedKv:
        held = self._holder.find(pull.run_id)
        if held is None or self._holder.take(held.key) is None:
            raise KvTransferError("it is not held here any more")
        return held.handed_over.block

    async def _by_stream(self, pull: scheduler_pb2.PullKv, block: StagedKv) -> int:
        """Fills the block from its source; returns the checksum of what came.

        A channel whose peer was away for a moment refuses calls until it has connected anew: this one waits for that,
        or each request that is to move in that time would lose an attempt.
        """
        peer = self._peer(pull.source_address)
        request = worker_pb2.FetchKvRequest(run_id=pull.run_id, secret=pull.kv.secret)
        digest, end = xxhash.xxh3_64(), 0
        clock = asyncio.get_running_loop()
        stub = worker_pb2_grpc.WorkerServiceStub(peer.channel)
        peer.num_calls += 1
        call = stub.FetchKv(request, metadata=self._deployment.metadata, wait_for_ready=True)
        try:
            async with asyncio.timeout(SILENCE_S) as silence:
                async for response in call:
                    silence.reschedule(clock.time() + SILENCE_S)
                    begin, end = end, end + len(response.piece)
                    if end > len(block.data):
                        break
                    block.data[begin:end] = response.piece
                    digest.update(response.piece)
        except (TimeoutError, grpc.aio.AioRpcError) as error:
            is_away = isinstance(error, TimeoutError) or error.code() is grpc.StatusCode.UNAVAILABLE
            if is_away and self._peers.get(pull.source_address) is peer:
                # The next channel is made with the certificates that there are then; others still use this one.
                del self._peers[pull.source_address]
            if isinstance(error, TimeoutError):
                raise KvTransferError(f"nothing was heard of its source for {SILENCE_S:g} s") from None
            raise
        finally:
            call.cancel()
            peer.num_calls -= 1
            if not peer.num_calls and self._peers.get(pull.source_address) is not peer:
                await peer.channel.close()
        if end != len(block.data):
            raise KvTransferError(f"{end} bytes came, {len(block.data)} were announced")
        return digest.intdigest()

    def _peer(self, address: str) -> _Peer:
        if address not in self._peers:
            try:
                self._peers[address] = _Peer(open_channel(address, self._deployment.tls))
            except AddressError as error:
                raise KvTransferError(str(error)) from error
        return self._peers[address]


async def _copy(source: memoryview, block: StagedKv) -> int:
    """Fills the block from memory; returns the checksum of the copy, so that what changes meanwhile shows."""

    def copy() -> int:
        block.data[:] = source
        return checksum(block.data)

    return copy() if len(source) <= INLINE_BYTES else await asyncio.to_thread(copy)


class _SharedFiles:
    """Files of other workers, mapped once: to map anew costs a page fault for every page."""

    def __init__(self) -> None:
        self._maps: dict[tuple[str, int], mmap.mmap] = {}

    def view(self, kv: scheduler_pb2.HeldKv) -> memoryview | None:
        """Returns where the KV lies; None if it can't be reached from here."""
        where = kv.shared_memory
        if not where.locality or where.locality != locality() or not SHARED_PATH.fullmatch(where.path):
            return None
        try:
            found = self._open(where.path)
        except OSError:
            return None
        view = memoryview(found)[where.offset : where.offset + kv.num_bytes]
        return view if len(view) == kv.num_bytes else None

    def _open(self, path: str) -> mmap.mmap:
        # What a peer names is opened only if it is a memory file of a worker's, and not anything else of a process's.
        if not os.readlink(path).startswith(f"/memfd:{MEMFD_NAME}"):
            raise FileNotFoundError(path)
        # The inode tells a worker from one that later has the same process id.
        key = (path, os.stat(path).st_ino)
        if key not in self._maps:
            self._forget_dead()
            file = os.open(path, os.O_RDONLY)
            try:
                self._maps[key] = mmap.mmap(file, 0, prot=mmap.PROT_READ)
            finally:
                os.close(file)
        return self._maps[key]

    def _forget_dead(self) -> None:
        """Lets go of what belonged to workers that have ended: the mapping would keep their memory."""
        for path, inode in list(self._maps):
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    continue
            del self._maps[path, inode]

    def close(self) -> None:
        self._maps.clear()
