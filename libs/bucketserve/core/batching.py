"""Batches: which lane and bucket, which worker, how many requests, and what stopped it from being more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from bucketserve.core.affinity import MAX_LOOKED_AT, Affinity
from bucketserve.core.cells import Key
from bucketserve.core.edges import EdgeChooser
from bucketserve.core.fleet import Fleet
from bucketserve.core.lanes import Lane, Lanes
from bucketserve.core.lifecycle import Lifecycle
from bucketserve.core.messages import DispatchBatch, PreemptAtWorker
from bucketserve.core.order import latest_start_s
from bucketserve.core.placement import place
from bucketserve.core.reclaim import Reclaimer, has_more_than_its_part, leaves_enough
from bucketserve.core.settings import CoreSettings, QueueOrder
from bucketserve.core.types import Bucket, LimitedBy, Request, RequestClass, RequestId, WorkerRole
from bucketserve.core.workers import SHARED_S, WorkerState

__all__ = ["BatchFormer", "Formed", "Former"]

INFINITY = float("inf")
RECLAIM_S = 0.2
"""Batch-class requests go so long before one in time would be too late: until then others may end by themselves. For
one that is late already they are looked at once in that time."""
BESIDE_S = 0.1
"""A request goes beside a long prompt so long before it would be too late."""


@dataclass(frozen=True, slots=True)
class Formed:
    """A batch, its requests and the lane they came from."""

    command: DispatchBatch
    requests: Sequence[Request]
    lane: Lane


class Former(Protocol):
    """Forms one batch at a time out of the waiting requests; removes nothing itself."""

    preemptions: list[PreemptAtWorker]
    """Of this step."""
    wake_s: float | None
    """When to look again without an event."""

    def form(self, now_s: float) -> Formed | None:
        """Returns the next batch; None if nothing may go now."""
        ...


class _Head(NamedTuple):
    """Whoever goes first out of a bucket of a lane; in order of when they are due."""

    due_s: float
    key: Key
    request: Request
    bucket: Bucket
    lane: Lane


@dataclass(slots=True)
class _Cut:
    """A batch in the making: what it holds and how much more it may."""

    chosen: list[Request] = field(default_factory=list)
    prefill_tokens: int = 0
    attention: int = 0
    kv_tokens: int = 0
    due_s: float = INFINITY
    tpot_s: float = INFINITY


class BatchFormer:
    """Sends requests when a worker has room for them, several together (Placement.LATE)."""

    def __init__(
        self,
        settings: CoreSettings,
        lanes: Lanes,
        fleet: Fleet,
        edges: EdgeChooser,
        lives: Lifecycle,
        affinity: Affinity,
    ) -> None:
        """Reads what its owner changes between calls."""
        self._affinity = affinity
        self._settings = settings
        self._lanes = lanes
        self._fleet = fleet
        self._edges = edges
        self._lives = lives
        self._saved: WorkerState | None = None
        """Takes nothing while this batch is formed (_save_for)."""
        self._reclaimer = Reclaimer(lives)
        self._late_s = 0.0
        """When batch-class requests may be let go for a late one."""
        self.preemptions: list[PreemptAtWorker] = []
        """Of this step."""
        self.wake_s: float | None = None
        """When to look again without an event: one is late then unless it goes beside a long prompt, or others go."""

    def form(self, now_s: float) -> Formed | None:
        """Returns the next batch; None if no worker can take anything that may go now.

        Lanes are tried in turn, buckets in the order of their first requests. A first request that fits nowhere is
        passed over, with two exceptions as long as some worker here could take it: if the order is first come, first
        served, nothing goes before it; and a deferred one whose turn it is has a worker saved for it, or small requests
        would take each bit of memory as it becomes free.
        """
        formed = self._form(now_s)
        if self._saved is not None:
            self._saved.is_saved, self._saved = False, None
        return formed

    def _form(self, now_s: float) -> Formed | None:
        candidates = self._fleet.candidates()
        if not candidates:
            for lane in (Lane.IN_TIME, Lane.LATE):
                for head in self._heads([lane])[:1]:
                    self._reclaim(head.request, lane, now_s)
            return None
        groups = self._lanes.in_turn()
        for lanes in groups:
            if formed := self._form_from(lanes, candidates, now_s, is_its_turn=lanes is groups[0]):
                return formed
        return None

    def _heads(self, lanes: Iterable[Lane]) -> list[_Head]:
        """Returns the first request of each bucket of these lanes, the first to be due before others."""
        heads: list[_Head] = []
        for lane in lanes:
            cells = self._lanes.of(lane)
            for bucket in self._edges.buckets:
                if (key := cells.head(bucket)) is None:
                    continue
                request, due_s = cells.get(RequestId(key[2])), key[0]
                assert request is not None  # a head waits
                if request.is_resumed and lane is Lane.BATCH:
                    # It is at the head of its lane, which is no reason yet to keep a worker for it.
                    due_s = request.arrival_s + self._settings.batch_patience_s
                heads.append(_Head(due_s, key, request, bucket, lane))
        return sorted(heads)

    def _form_from(
        self, lanes: Iterable[Lane], candidates: Sequence[WorkerState], now_s: float, *, is_its_turn: bool
    ) -> Formed | None:
        for head in self._heads(lanes):
            first, bucket, lane = head.request, head.bucket, head.lane
            # What is behind it could go before it for ever, each time that one of them fits.
            is_overdue = lane is not Lane.IN_TIME and head.due_s + self._settings.batch_patience_s <= now_s
            is_due = lane is not Lane.IN_TIME and head.due_s <= now_s
            may_save = is_due and is_its_turn
            # Once it is due it goes wherever it fits, or under lasting load it never would.
            yields = first.request_class is RequestClass.BATCH and not is_due
            able = [worker for worker in candidates if leaves_enough(first, worker)] if yields else candidates
            placed = self._placed(lane, bucket, first, able, now_s, may_save=may_save, yields=yields) if able else None
            if placed is None:
                continue
            first, worker = placed
            if worker is None:
                if self._settings.queue_order is QueueOrder.FCFS and self._is_served(first):
                    return None
                self._reclaim(first, lane, now_s)
                if may_save:
                    self._save_for(first, candidates)
                if is_overdue and self._is_served(first):
                    return None
                continue
            if lane is Lane.LATE and not worker.may_take_late(first, self._settings.late_kv_share):
                continue
            has_place = worker.has_place(self._settings, small=False)
            if not (self._may_share(first, worker, now_s) if has_place else self._would_be_late(first, now_s)):
                if self._settings.queue_order is QueueOrder.FCFS:
                    return None
                if may_save and has_place:
                    # Or others would join each step that is too short for it.
                    self._save(worker)
                continue
            cut, limited_by = self._cut(lane, bucket, first, worker, now_s)
            if lane is Lane.LATE:
                worker.late.update((request.request_id, worker.kv_tokens(request)) for request in cut.chosen)
            return Formed(self._fleet.give(worker, cut.chosen, bucket, limited_by), cut.chosen, lane)
        return None

    def _placed(
        self,
        lane: Lane,
        bucket: Bucket,
        first: Request,
        candidates: Sequence[WorkerState],
        now_s: float,
        *,
        may_save: bool,
        yields: bool,
    ) -> tuple[Request, WorkerState | None] | None:
        """Returns who goes next out of a bucket that begins with `first`, and where; None if all should wait.

        may_save: `first` may have a worker saved for it; yields: they leave to interactive ones what is theirs.
        """
        if self._affinity.knows(first):

            def may_join(request: Request, worker: WorkerState) -> bool:
                return (not yields or leaves_enough(request, worker)) and self._may_share(request, worker, now_s)

            cells = self._lanes.of(lane)
            with closing(cells.in_order(bucket)) as ordered:
                keyed = ((key[0], request) for request in ordered if (key := cells.key(request.request_id)))
                picked, wake_s = self._affinity.pick(keyed, candidates, now_s, may_join)
            if wake_s is not None:
                self._wake_at(wake_s)
            if picked is None:
                return None
            first, worker = picked.request, picked.worker
        else:
            worker = self._place(first, candidates, now_s)
        if worker is None and _is_bound(first, candidates):
            # Those that may serve it are not among the least loaded.
            able = [w for w in self._fleet if w.could_serve(first) and (not yields or leaves_enough(first, w))]
            worker = self._place(first, able, now_s)
        if worker is None and _is_bound(first, candidates):
            if may_save:
                self._save_for(first, list(self._fleet))
            return self._behind_bound(lane, bucket, candidates, first, now_s)
        return first, worker

    def _place(self, request: Request, candidates: Sequence[WorkerState], now_s: float) -> WorkerState | None:
        """Returns a worker for the request: one without prompts to compute where it may not join those of the best."""
        cold = self._affinity.cold(request)
        best = place(cold, candidates, self._settings)
        if best is None or not best.batch_of or self._may_share(cold, best, now_s):
            return best
        return place(cold, [worker for worker in candidates if not worker.batch_of], self._settings) or best

    def _behind_bound(
        self, lane: Lane, bucket: Bucket, candidates: Sequence[WorkerState], head: Request, now_s: float
    ) -> tuple[Request, WorkerState | None]:
        """Returns the first request behind those that only some may serve, and its worker if one can take it."""
        takes_new = any(worker.takes_new for worker in candidates)
        with closing(self._lanes.of(lane).in_order(bucket)) as ordered:
            for request in ordered:
                if not (takes_new or request.fingerprint):
                    # Those that are bound come first.
                    break
                worker = self._place(request, candidates, now_s)
                if worker is not None or not _is_bound(request, candidates):
                    return (head if worker is None else request), worker
        return head, None

    def _reclaim(self, request: Request, lane: Lane, now_s: float) -> None:
        """Lets batch-class requests go for an interactive one that fits nowhere and can't wait; for one in a step.

        For one that is late only now and then, and only where batch class has more than its part.
        """
        if self.preemptions or request.request_class is not RequestClass.INTERACTIVE:
            return
        if not any(worker.batch_class for worker in self._fleet):
            return
        prefill_s = self._fleet.times.prefill_s(request.prefill_tokens)
        until_s = latest_start_s(request, self._settings, prefill_s) - RECLAIM_S
        if now_s < until_s:
            self._wake_at(until_s)
            return
        able = [worker for worker in self._fleet if worker.role is WorkerRole.BOTH]
        if lane is Lane.LATE:
            if now_s < self._late_s:
                return
            self._late_s = now_s + RECLAIM_S
            able = [worker for worker in able if has_more_than_its_part(worker)]
        self.preemptions = self._reclaimer.room_for(request, able, self._settings.memory_reserve)

    def _is_served(self, request: Request) -> bool:
        """Whether some worker here could be given the request: one that may only come, or leaves, holds nobody up."""
        return any(_could_take(worker, request) for worker in self._fleet)

    def _save_for(self, request: Request, candidates: Sequence[WorkerState]) -> None:
        """Lets the roomiest worker that could hold the request take nothing else.

        Each time anew, until it has room: since it takes nothing it only becomes roomier, and stays the one.
        """
        able = [worker for worker in candidates if _could_take(worker, request)]
        if any(worker.kv_tokens(request) <= worker.room for worker in able):
            # It waits for a place, and that comes without saving.
            return
        worker = max(able, key=lambda worker: (worker.free_tokens(), worker.worker_id), default=None)
        if worker is not None:
            self._save(worker)

    def _save(self, worker: WorkerState) -> None:
        if self._saved is None:
            self._saved, worker.is_saved = worker, True

    def _may_share(self, request: Request, worker: WorkerState, now_s: float) -> bool:
        """Whether what a worker has still to compute, less than a step, meets its targets if a request joins it."""
        if not self._settings.is_time_aware:
            return True
        cut = _Cut(due_s=self._due_there(worker, now_s))
        return cut.due_s == INFINITY or self._is_in_time(cut, request, worker, now_s, INFINITY)

    def _would_be_late(self, request: Request, now_s: float) -> bool:
        """Whether a request would miss its TTFT if it waited until some worker has computed what it has.

        Only then it goes beside a long prompt: it makes both slower, and elsewhere it would be alone in its steps.
        """
        if request.request_class is RequestClass.BATCH:
            return False
        tokens, most = request.prefill_tokens, self._settings.max_chunk_tokens
        able = [worker for worker in self._fleet if _could_take(worker, request)]
        # It comes after the step under way.
        takes_s = min(
            (
                w.prefill_in_s(tokens, tokens * request.prompt_tokens, most)
                + w.times.prefill_token_s() * min(w.backlog_tokens(), w.step_tokens)
                for w in able
            ),
            default=0.0,
        )
        due_s = request.arrival_s + (request.ttft_slo_s or self._settings.default_ttft_s)
        beside_s = due_s - takes_s - BESIDE_S
        if beside_s <= now_s:
            return True
        self._wake_at(beside_s)
        return False

    def _wake_at(self, at_s: float) -> None:
        self.wake_s = at_s if self.wake_s is None else min(self.wake_s, at_s)

    def _due_there(self, worker: WorkerState, now_s: float) -> float:
        """Returns when a worker must be done if more is to share a step with what it has still to compute.

        By the earliest target among that, and soon in any case: until then it is open to nobody else.
        """
        if not worker.left_tokens():
            return INFINITY
        lives = (self._lives.get(request_id) for request_id in worker.batch_of)
        return min([now_s + SHARED_S, *(_due_s(life.request, now_s) for life in lives if life is not None)])

    def _cut(
        self, lane: Lane, bucket: Bucket, first: Request, worker: WorkerState, now_s: float
    ) -> tuple[_Cut, LimitedBy]:
        """Takes requests from the bucket in order, from `first` on, until something stops it; that one fits."""
        cut, most_tokens = _Cut(tpot_s=self._lives.tpot_s(worker)), worker.most_small_tokens(self._settings)
        if worker.has_place(self._settings, small=False):
            cut.due_s, most_tokens = self._due_there(worker, now_s), worker.most_batch_tokens(self._settings)
            most_tokens -= worker.left_tokens()
        alone_s = worker.times.decode_s(worker.num_sequences() + 1, worker.context_tokens_held())
        safe_tokens = worker.safe_tokens(self._settings.memory_reserve)
        sequences = worker.free_sequences()
        fair_tokens, num_passed = self._fair_tokens(lane, bucket), 0
        with closing(self._lanes.of(lane).in_order(bucket)) as ordered:
            for waiting in ordered:
                if waiting is not first and (not cut.chosen or not worker.suits(waiting)):
                    continue
                if waiting is not first and self._affinity.belongs_elsewhere(waiting, worker):
                    num_passed += 1
                    if num_passed == MAX_LOOKED_AT:
                        break
                    continue
                request = self._affinity.at(waiting, worker.worker_id)
                kv_tokens = cut.kv_tokens + worker.kv_tokens(request)
                if cut.chosen:
                    if cut.prefill_tokens + request.prefill_tokens > fair_tokens:
                        return cut, LimitedBy.SUPPLY
                    if len(cut.chosen) >= sequences:
                        return cut, LimitedBy.COUNT
                    if kv_tokens > safe_tokens or not leaves_enough(request, worker, cut.kv_tokens, len(cut.chosen)):
                        return cut, LimitedBy.MEMORY
                    if cut.prefill_tokens + request.prefill_tokens > most_tokens:
                        return cut, LimitedBy.TIME
                    tpot_s = min(cut.tpot_s, _tpot_s(request, alone_s))
                    if self._settings.is_time_aware and not self._is_in_time(cut, request, worker, now_s, tpot_s):
                        return cut, LimitedBy.TIME
                cut.chosen.append(request)
                cut.kv_tokens = kv_tokens
                cut.prefill_tokens += request.prefill_tokens
                cut.attention += request.prefill_tokens * request.prompt_tokens
                cut.due_s = min(cut.due_s, _due_s(request, now_s))
                cut.tpot_s = min(cut.tpot_s, _tpot_s(request, alone_s))
        return cut, LimitedBy.SUPPLY

    def _fair_tokens(self, lane: Lane, bucket: Bucket) -> float:
        """Returns this batch's part of what waits in the bucket, so that idle workers share it.

        At least min_batch_tokens: below that a smaller batch is hardly faster.
        """
        if self._fleet.num_open <= 1:
            return INFINITY
        _, tokens = self._lanes.of(lane).count(bucket)
        return max(tokens / self._fleet.num_open, self._settings.min_batch_tokens)

    def _is_in_time(self, cut: _Cut, request: Request, worker: WorkerState, now_s: float, tpot_s: float) -> bool:
        """Whether the batch with one more request still meets its tightest TTFT, and that TPOT once it decodes."""
        due_s = min(cut.due_s, _due_s(request, now_s))
        if due_s < INFINITY:
            took_s = worker.prefill_in_s(
                cut.prefill_tokens + request.prefill_tokens,
                cut.attention + request.prefill_tokens * request.prompt_tokens,
                self._settings.max_chunk_tokens,
                shares_steps=True,
            )
            if now_s + took_s > due_s:
                return False
        if tpot_s == INFINITY:
            return True
        number = worker.num_sequences() + len(cut.chosen) + 1
        held = worker.context_tokens_held() + cut.kv_tokens + request.prompt_tokens
        return worker.times.decode_s(number, held) <= tpot_s


def _is_bound(request: Request, candidates: Sequence[WorkerState]) -> bool:
    """Whether only some workers could serve a request, so that the others need not wait for it."""
    is_bound = bool(request.fingerprint or request.adapter)
    return is_bound or not any(worker.could_serve(request) for worker in candidates)


def _could_take(worker: WorkerState, request: Request) -> bool:
    """Whether a worker may be given the request, now or when it has room."""
    return worker.role is not WorkerRole.DECODE and worker.could_serve(request)


def _tpot_s(request: Request, alone_s: float) -> float:
    """Returns its TPOT target, in seconds; one that it would miss alone beside what decodes now counts for nothing."""
    target_s = request.tpot_slo_s
    return INFINITY if target_s is None or target_s < alone_s else target_s


def _due_s(request: Request, now_s: float) -> float:
    """When its prefill must be over; a request that is late already asks for nothing of the others."""
    if request.ttft_slo_s is None or request.request_class is RequestClass.BATCH:
        return INFINITY
    due_s = request.arrival_s + request.ttft_slo_s
    return due_s if due_s > now_s else INFINITY
