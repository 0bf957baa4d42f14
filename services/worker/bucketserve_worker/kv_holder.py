"""KV of prefilled requests that waits here for a decode worker: who owns it, and for how long."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from bucketserve.core.types import RequestId
from bucketserve.engine.kv_staging import locality
from bucketserve.v1 import scheduler_pb2
from bucketserve_worker.engine_thread import HandedOver
from bucketserve_worker.running import Running

__all__ = ["Held", "KvHolder"]


@dataclass(frozen=True, slots=True)
class Held:
    """One request's KV."""

    key: RequestId
    running: Running
    handed_over: HandedOver
    since_s: float = 0.0
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    """What whoever asks for it has to show."""

    def describe(self, layout: str, shared_path: str | None) -> scheduler_pb2.HeldKv:
        """Returns what a reader must know of it.

        Args:
            layout: of the engine that it comes from.
            shared_path: the file by which processes of our locality reach it; None if there is none.
        """
        running, handed_over = self.running, self.handed_over
        prefilled_s = running.prefilled_s if running.prefilled_s is not None else running.received_s
        kv = scheduler_pb2.HeldKv(
            run_id=running.run_id,
            layout=layout,
            kv_bytes=handed_over.kv_bytes,
            num_bytes=len(handed_over.block.data),
            checksum=handed_over.checksum,
            prefill_us=round((prefilled_s - running.received_s) * 1e6),
            secret=self.secret,
        )
        if shared_path is not None and handed_over.block.shared_offset is not None:
            kv.shared_memory.locality, kv.shared_memory.path = locality(), shared_path
            kv.shared_memory.offset = handed_over.block.shared_offset
        return kv


@dataclass(slots=True)
class KvHolder:
    """Owns each block from the engine's turn that brought it until it is released, cancelled or its lease ends.

    The lease is the scheduler's: it runs from the last word of it, since a scheduler that is connected knows of every
    held block and ends those that nobody wants.
    """

    lease_s: float
    clock: Callable[[], float]
    _held: dict[RequestId, Held] = field(default_factory=dict)
    _contact_s: float = 0.0

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._held)

    def __iter__(self) -> Iterator[Held]:
        """Yields them."""
        return iter(self._held.values())

    def __contains__(self, key: object) -> bool:
        """Whether the run of that name is held."""
        return key in self._held

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV is held: they count as used until it is gone, so that a full decode side holds us back."""
        # A copy: it is read in the thread of the metrics as well.
        return sum(held.handed_over.num_tokens for held in list(self._held.values()))

    def hold(self, running: Running, handed_over: HandedOver) -> None:
        """Takes a block."""
        now_s = self.clock()
        self._contact_s = max(self._contact_s, now_s)
        self._held[handed_over.key] = Held(handed_over.key, running, handed_over, now_s)

    def get(self, key: RequestId) -> Held | None:
        """Returns the block of a run, if it is held."""
        return self._held.get(key)

    def find(self, run_id: str) -> Held | None:
        """Returns a run's KV, if it is held."""
        return next((held for held in self._held.values() if held.running.run_id == run_id), None)

    def take(self, key: RequestId) -> Held | None:
        """Gives a block up without releasing it: it is the caller's now."""
        return self._held.pop(key, None)

    def release(self, key: RequestId) -> bool:
        """Frees a block; False if it is not here."""
        held = self._held.pop(key, None)
        if held is not None:
            held.handed_over.block.release()
        return held is not None

    def heard(self) -> None:
        """Renews all leases: the scheduler is there."""
        self._contact_s = self.clock()

    def expired(self, kv_kept_s: float = 0.0) -> list[RequestId]:
        """Returns the keys whose lease is over: the scheduler's, or that of an engine which keeps KV for kv_kept_s."""
        now_s = self.clock()
        if now_s - self._contact_s > self.lease_s:
            return list(self._held)
        by_handle = [key for key, held in self._held.items() if not held.handed_over.num_tokens]
        return [key for key in by_handle if kv_kept_s and now_s - self._held[key].since_s > kv_kept_s]
