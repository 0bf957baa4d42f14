"""Ways by which KV comes here: out of this process, out of shared memory, through a gRPC stream.

The trailer comes first: it says whose KV it is, and so which pages are here already and need not come. Each way yields
a block of our own whose length and checksums are right, or raises. What comes is never used unverified.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
import numpy as np

from bucketserve.addresses import AddressError
from bucketserve.core.errors import BucketServeError
from bucketserve.engine.kv_staging import MEMFD_NAME, KvStaging, StagedKv, checksum, locality, page_checksums
from bucketserve.rpc.channel import open_channel
from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.listening import messages_of
from bucketserve.v1 import scheduler_pb2, worker_pb2, worker_pb2_grpc
from bucketserve_worker.kv_holder import KvHolder

T = TypeVar("T")

__all__ = ["PIECE_BYTES", "Fetched", "KvSources", "KvTransferError"]

PIECE_BYTES = 1 << 20
SHARED_PATH = re.compile(r"/proc/[0-9]+/fd/[0-9]+")
MAX_TRAILER_BYTES = 64 << 20
"""Of what comes with the KV: its RunSpec holds the prompt."""
SILENCE_S = 5.0
"""How long a source may be silent, or away: one that was started again is reached within the channel's backoff."""
PEER_IDLE_S = 300.0
"""After which a channel that nobody used is closed."""
INLINE_BYTES = 4 << 20
"""Up to here a copy holds the event loop up for less than half a millisecond; a thread would cost as much again."""


class KvTransferError(BucketServeError):
    """The KV could not be had, or is not what its sender says; it has to be computed again."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """KV that has come, and what came with it."""

    block: StagedKv
    kv_bytes: int
    """With which the block begins: the KV, from its first page that was not here."""
    trailer: worker_pb2.KvTrailer
    transport: str
    num_known_pages: int = 0
    """Leading pages that did not come, since they were here."""


@dataclass(slots=True, eq=False)
class _Peer:
    """The way to another worker."""

    channel: grpc.aio.Channel
    num_calls: int = 0
    """That use it now: it is closed under none of them."""
    used_s: float = field(default_factory=time.monotonic)
    """When the last call ended."""


class KvSources:
    """Fetches KV by the nearest way; keeps channels and mappings."""

    def __init__(
        self,
        worker_id: str,
        deployment: Deployment,
        holder: KvHolder,
        staging: KvStaging,
        layout: str,
        page_bytes: int,
        known_pages: Callable[[scheduler_pb2.RunSpec], int],
    ) -> None:
        """Takes what it needs to know of this worker.

        Args:
            worker_id: ours.
            deployment: for channels to others.
            holder: our own: a worker whose role was switched may go on with what it prefilled itself.
            staging: where blocks come from.
            layout: of our engine's KV.
            page_bytes: of a whole page.
            known_pages: returns how many leading pages of a prompt's KV need not come.
        """
        self._worker_id = worker_id
        self._deployment = deployment
        self._holder = holder
        self._staging = staging
        self._layout = layout
        self._page_bytes = page_bytes
        self._known_pages = known_pages
        self._peers: dict[str, _Peer] = {}
        self._files = _SharedFiles()

    async def fetch(self, pull: scheduler_pb2.PullKv, *, is_whole: bool = False) -> Fetched:
        """Returns the KV of a run; it stays held at its source until the scheduler ends that.

        Args:
            pull: the order.
            is_whole: whether pages that are here shall come as well.

        Raises:
            KvTransferError: it could not be had, or did not come as it was sent.
            grpc.aio.AioRpcError: the source does not hold it, or the connection broke.
        """
        if pull.kv.layout != self._layout:
            raise KvTransferError(f"its layout is {pull.kv.layout!r}, ours {self._layout!r}: other weights or version")
        kv_bytes, trailer_bytes = pull.kv.kv_bytes, pull.kv.num_bytes - pull.kv.kv_bytes
        if kv_bytes > self._staging.num_bytes or not 0 <= trailer_bytes <= MAX_TRAILER_BYTES:
            raise KvTransferError(f"{pull.kv.num_bytes:,} bytes are more than this worker has for all its KV")
        if pull.source_worker_id == self._worker_id:
            return self._from_own(pull)
        source = self._files.view(pull.kv)
        transport = "grpc" if source is None else "shared_memory"
        mismatch = KvTransferError(f"checksum mismatch by {transport}: corrupt, or its source has let it go")
        said = memoryview(bytearray(trailer_bytes))
        await self._read(pull, source, kv_bytes, said)
        if checksum(said) != pull.kv.checksum:
            raise mismatch
        trailer = worker_pb2.KvTrailer.FromString(bytes(said))
        if trailer.run_id != pull.run_id:
            raise KvTransferError("what came is another run's")
        spec = scheduler_pb2.RunSpec.FromString(trailer.spec)
        num_known = 0 if is_whole else min(self._known_pages(spec), kv_bytes // self._page_bytes)
        block = self._staging.take(kv_bytes - num_known * self._page_bytes)
        try:
            await self._read(pull, source, num_known * self._page_bytes, block.data)
            found = await _computed(lambda: page_checksums(block.data, self._page_bytes), len(block.data))
            if found != trailer.page_checksums[num_known:]:
                raise mismatch
        except BaseException:
            block.release()
            raise
        return Fetched(block, len(block.data), trailer, transport, num_known)

    async def sweep(self) -> None:
        """Lets go of what belonged to workers that have ended, and of channels that nobody has used for long."""
        self._files.forget_dead()
        long_ago_s = time.monotonic() - PEER_IDLE_S
        idle = [address for address, one in self._peers.items() if not one.num_calls and one.used_s < long_ago_s]
        await asyncio.gather(*(self._peers.pop(address).channel.close() for address in idle))

    async def close(self) -> None:
        """Closes channels and mappings."""
        await asyncio.gather(*(peer.channel.close() for peer in self._peers.values()))
        self._files.close()

    def _from_own(self, pull: scheduler_pb2.PullKv) -> Fetched:
        """Returns a block of our own, which changes hands as it is."""
        held = self._holder.find(pull.run_id)
        if held is None or self._holder.take(held.key) is None:
            raise KvTransferError("it is not held here any more")
        block, kv_bytes = held.handed_over.block, held.handed_over.kv_bytes
        return Fetched(block, kv_bytes, worker_pb2.KvTrailer.FromString(bytes(block.data[kv_bytes:])), "in_process")

    async def _read(self, pull: scheduler_pb2.PullKv, source: memoryview | None, begin: int, into: memoryview) -> None:
        """Fills `into` with what lies at its source from that byte on: in memory, or where it has to be asked for."""
        if not into:
            return
        if source is None:
            await self._by_stream(pull, begin, into)
            return

        def copy() -> None:
            # A memoryview's own assignment would hold the interpreter's lock all the time.
            np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(source, np.uint8, len(into), begin))

        await _computed(copy, len(into))

    async def _by_stream(self, pull: scheduler_pb2.PullKv, begin: int, into: memoryview) -> None:
        """Fills `into` from its source.

        A channel whose peer was away for a moment refuses calls until it has connected anew: this one waits for that,
        or each request that is to move in that time would lose an attempt.
        """
        peer = self._peer(pull.source_address)
        request = worker_pb2.FetchKvRequest(
            run_id=pull.run_id, secret=pull.kv.secret, begin=begin, end=begin + len(into)
        )
        num_bytes = 0
        clock = asyncio.get_running_loop()
        stub = worker_pb2_grpc.WorkerServiceStub(peer.channel)
        peer.num_calls += 1
        call = stub.FetchKv(request, metadata=self._deployment.metadata, wait_for_ready=True)
        try:
            async with asyncio.timeout(SILENCE_S) as silence:
                async for response in messages_of(call):
                    silence.reschedule(clock.time() + SILENCE_S)
                    start, num_bytes = num_bytes, num_bytes + len(response.piece)
                    if num_bytes > len(into):
                        break
                    into[start:num_bytes] = response.piece
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
            peer.used_s = time.monotonic()
            if not peer.num_calls and self._peers.get(pull.source_address) is not peer:
                await peer.channel.close()
        if num_bytes != len(into):
            raise KvTransferError(f"{num_bytes} bytes came, {len(into)} were asked for")

    def _peer(self, address: str) -> _Peer:
        if address not in self._peers:
            try:
                self._peers[address] = _Peer(open_channel(address, self._deployment.tls))
            except AddressError as error:
                raise KvTransferError(str(error)) from error
        return self._peers[address]


async def _computed(compute: Callable[[], T], num_bytes: int) -> T:
    """Returns what `compute` returns, which passes over so many bytes; it has ended when this is left, however."""
    if num_bytes <= INLINE_BYTES:
        return compute()
    thread = asyncio.ensure_future(asyncio.to_thread(compute))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        # The memory may be another's as soon as this is left.
        while not thread.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([thread])
        raise


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
            file = os.open(path, os.O_RDONLY)
            try:
                self._maps[key] = mmap.mmap(file, 0, prot=mmap.PROT_READ)
            finally:
                os.close(file)
        return self._maps[key]

    def forget_dead(self) -> None:
        """Lets go of what belonged to workers that have ended: the mapping would keep their memory."""
        for path, inode in list(self._maps):
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    continue
            del self._maps[path, inode]

    def close(self) -> None:
        self._maps.clear()
