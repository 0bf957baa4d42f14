"""The open requests of this gateway, each with its one owner of state: OpenRequest.

new --accepted--> queued --dispatched--> running --delivered--> ... --> finished or failed, exactly once
^                       |
+---- next attempt <----+  (worker lost or failed, gap in its output, preempted)

Each attempt has a run id of its own, drawn here, by which everybody else knows it: what arrives late for an older one
names something that is not open any more. The client's request_id is a label; two requests may have the same.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from bucketserve.core.errors import (
    BucketServeError,
    DeadlineError,
    EngineError,
    OverloadedError,
    UnavailableError,
)
from bucketserve.v1 import common_pb2, delivery_pb2, inference_pb2, scheduler_pb2
from bucketserve_gateway.detokenizer import Detokenizer, StopMatcher
from bucketserve_gateway.prefixes import block_hashes
from bucketserve_gateway.quotas import Charge
from bucketserve_gateway.validation import ValidRequest

__all__ = ["OpenRequest", "OpenRequests", "too_late"]


class OpenRequest:
    """One request between its first and its last message to the client."""

    def __init__(
        self,
        valid: ValidRequest,
        prompt_ids: Sequence[int],
        max_tokens: int,
        ticket: scheduler_pb2.Ticket,
        spec: scheduler_pb2.RunSpec,
        *,
        max_attempts: int,
        max_pending_tokens: int,
        resume: Callable[[OpenRequest, str], None],
    ) -> None:
        """Takes what is the same in all attempts.

        Args:
            valid: what the client asked for.
            prompt_ids: the prompt.
            max_tokens: most tokens to generate.
            ticket: the scheduler's part; its run id, lengths and workers to avoid are filled in here.
            spec: the workers' part; its tokens are filled in here.
            max_attempts: how often it may be started.
            max_pending_tokens: tokens that may wait for the client to read them.
            resume: called with self and the former run id when the next attempt has begun.
        """
        self.valid = valid
        self.prompt_ids = tuple(prompt_ids)
        self.max_tokens = max_tokens
        self.deadline_s: float | None = None
        """When its client stops waiting, on the monotonic clock; None for never."""
        self.tokens: list[int] = []
        """Everything generated so far, over all attempts."""
        self.attempt = 0
        """The attempt whose output counts."""
        self.worker_id = ""
        """The worker that has the attempt, by the last word of it; empty while it waits."""
        self._waited_us: int | None = None
        """Until the attempt was dispatched, as the scheduler said; its word may come after the output."""
        self._batch: common_pb2.BatchInfo | None = None
        self._fingerprint = ""
        """Of the engine that the attempt's tokens come from."""
        self.first_token_s: float | None = None
        self.arrival_s = time.monotonic()
        self.heard_s = self.arrival_s
        """When something was last heard of it while it ran."""
        self.charge: Charge | None = None
        """What it has taken of its tenant's quotas."""
        self.finished: inference_pb2.GenerateFinished | None = None
        self.error: BucketServeError | None = None
        self._max_attempts = max_attempts
        self._num_faults = 0
        """Attempts that ended by a fault."""
        self.num_preemptions = 0
        """Attempts that a worker let go to make room for others."""
        self.was_preempted = False
        """Whether the attempt before this one was such."""
        self._max_pending_tokens = max_pending_tokens
        self._resume = resume
        self._name = secrets.token_hex(16)
        self._ticket = ticket
        self._spec = spec
        self._began_s = self.arrival_s
        """When the attempt began."""
        self._attempt_start = 0
        """How many tokens earlier attempts had generated."""
        self._detokenizer = Detokenizer(valid.model.token_bytes, prompt_ids)
        self._stops = StopMatcher(valid.stop_strings)
        self._pending = inference_pb2.GenerateChunk()
        self._is_accepted = False
        """Whether it was queued, or is over."""
        self._changed = asyncio.Event()
        self._begin()

    @property
    def label(self) -> str:
        """What its client calls it."""
        return self.valid.request_id

    @property
    def run_id(self) -> str:
        """The id of the attempt whose output counts."""
        return self._ticket.run_id

    @property
    def model(self) -> str:
        """The model whose workers serve it."""
        return self._ticket.model

    @property
    def is_admitted(self) -> bool:
        """Whether its client was told that it is queued: then only a failure can end it, and no refusal."""
        return self._is_accepted and not self.is_over

    @property
    def is_over(self) -> bool:
        """Whether it has its one terminal state."""
        return self.finished is not None or self.error is not None

    # --- for the servicer ---------------------------------------------------------------------------------------

    async def accepted(self, timeout_s: float, problem: Callable[[], str]) -> None:
        """Returns when the scheduler has queued it.

        Raises:
            BucketServeError: it was refused, or was not queued within timeout_s seconds; problem() says why.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not self._is_accepted:
                    await self._change()
        except TimeoutError:
            message = problem() or f"not queued within {timeout_s:g} s"
            raise UnavailableError(message, reason="NO_SCHEDULER", retry_delay_s=1.0) from None
        if self.error is not None:
            raise self.error

    async def chunks(self) -> AsyncIterator[inference_pb2.GenerateChunk]:
        """Yields what has arrived since the last chunk, until the end.

        Raises:
            BucketServeError: it failed.
        """
        while True:
            if self._pending.token_ids or self._pending.text:
                chunk, self._pending = self._pending, inference_pb2.GenerateChunk()
                # While the client takes this one more may come, the end included: look again before ending.
                yield chunk
                continue
            if self.error is not None:
                raise self.error
            if self.finished is not None:
                return
            await self._change()

    async def _change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def submission(self) -> scheduler_pb2.SubmitRun:
        """Returns the present attempt for the scheduler, with its age as of now."""
        now_s = time.monotonic()
        self._keep_to_weights()
        run = scheduler_pb2.SubmitRun(
            ticket=self._ticket,
            spec=self._spec_bytes,
            age_us=round((now_s - self.arrival_s) * 1e6),
            attempt_age_us=round((now_s - self._began_s) * 1e6),
            is_admitted=self._is_accepted,
            block_hashes=self._block_hashes,
        )
        if self.deadline_s is not None:
            run.remaining_us = max(round((self.deadline_s - now_s) * 1e6), 0)
        return run

    # --- from the scheduler -------------------------------------------------------------------------------------

    def on_accepted(self) -> None:
        """The scheduler has queued it."""
        self._is_accepted = True
        self._changed.set()
        self.heard_s = time.monotonic()

    def on_dispatched(self, dispatched: scheduler_pb2.RunDispatched) -> None:
        """It is at a worker."""
        self.worker_id, self._waited_us = dispatched.worker_id, dispatched.waited_us or self._waited_us
        self.heard_s = time.monotonic()

    def fail(self, error: BucketServeError) -> None:
        """Ends it, unless it is over already."""
        if self.is_over:
            return
        self.error = error
        self._is_accepted = True
        self._changed.set()

    def expire(self) -> None:
        """Ends it since its deadline has passed, unless it is over already."""
        self.fail(too_late())

    def restart(self, cause: str, *, is_fault: bool = True, is_preempted: bool = False) -> None:
        """Starts the next attempt: the prompt and all tokens so far, on whatever worker comes.

        A fault counts, and its worker is avoided from now on.
        """
        if self.is_over:
            return
        self._num_faults += is_fault
        self.num_preemptions += is_preempted
        self.was_preempted = is_preempted
        if self._num_faults >= self._max_attempts:
            self.fail(UnavailableError(f"gave up after {self.attempt} attempts: {cause}", reason="ATTEMPTS_EXHAUSTED"))
            return
        former = self.run_id
        if is_fault and self.worker_id and self.worker_id not in self._ticket.avoid_worker_ids:
            self._ticket.avoid_worker_ids.append(self.worker_id)
        self._keep_to_weights()
        self._begin()
        self._resume(self, former)

    def _keep_to_weights(self) -> None:
        """Lets only workers with the weights of the tokens that are here go on with them."""
        if self._fingerprint:
            self._ticket.fingerprint = self._fingerprint

    def _begin(self) -> None:
        """Makes ticket and spec those of the next attempt."""
        self.attempt += 1
        self.worker_id, self._waited_us, self._batch, self._fingerprint = "", None, None, ""
        self.heard_s = self._began_s = time.monotonic()
        self._attempt_start = len(self.tokens)
        # A copy: the one before may still be on its way.
        ticket, spec = scheduler_pb2.Ticket(), self._spec
        ticket.CopyFrom(self._ticket)
        ticket.run_id = f"{self._name}.{self.attempt}"
        ticket.is_resumed = self.attempt > 1
        ticket.num_preemptions = spec.num_preemptions = self.num_preemptions
        ticket.prompt_tokens = len(self.prompt_ids) + len(self.tokens)
        ticket.max_new_tokens = spec.max_new_tokens = self.max_tokens - len(self.tokens)
        spec.ClearField("token_ids")
        token_ids = (*self.prompt_ids, *self.tokens)
        spec.token_ids.extend(token_ids)
        self._block_hashes = block_hashes(token_ids, spec.prefix_salt)
        spec.num_resumed_tokens = len(self.tokens)
        self._ticket, self._spec_bytes = ticket, spec.SerializeToString()
        spec.ClearField("token_ids")

    # --- from workers -------------------------------------------------------------------------------------------

    def deliver(self, delivery: delivery_pb2.TokenDelivery, worker_id: str, fingerprint: str) -> bool:
        """Takes output of a worker with an engine of that fingerprint; returns whether more of the attempt is wanted.

        Whose output it is says its worker itself: the scheduler's word of it may come later, or never, and an attempt
        that a scheduler has lost may run at a second worker.
        """
        if self.is_over or delivery.run_id != self.run_id:
            return False
        self.heard_s = time.monotonic()
        # Whoever runs it was given it by a scheduler, whose word of having queued it may be lost.
        self._is_accepted = True
        self._changed.set()
        expected = len(self.tokens) - self._attempt_start
        if self._fingerprint and fingerprint != self._fingerprint:
            self.restart("a worker with other weights went on with it", is_fault=False)
            return False
        self.worker_id = worker_id
        if delivery.first_index > expected:
            self.restart("a gap in the worker's output")
            return False
        if delivery.HasField("batch") and self._batch is None:
            self._batch = delivery.batch
        repeated = expected - delivery.first_index
        if len(delivery.token_ids) > repeated:
            self._fingerprint = fingerprint
        self._take(delivery, repeated)
        if not self.is_over and delivery.HasField("finished"):
            self._end_attempt(delivery.finished)
        return not self.is_over

    def _take(self, delivery: delivery_pb2.TokenDelivery, start: int) -> None:
        """Adds tokens from index `start` of the delivery on; stops at a stop string."""
        token_ids = list(delivery.token_ids[start:])
        if not token_ids:
            return
        if self.first_token_s is None:
            self.first_token_s = time.monotonic()
        # With stop strings one by one, since a match ends the output at the token that completes it.
        groups = [[token_id] for token_id in token_ids] if self.valid.stop_strings else [token_ids]
        for group in groups:
            piece = self._stops.put(self._detokenizer.put(group))
            self.tokens += group
            self._pending.text += piece.text
            self._pending.token_ids.extend(group)
            self._pending.logprobs.extend(delivery.logprobs[start : start + len(group)])
            start += len(group)
            if piece.matched_stop:
                self._finish(common_pb2.FINISH_REASON_STOP, matched_stop=piece.matched_stop)
                return
        if len(self._pending.token_ids) > self._max_pending_tokens:
            self.fail(OverloadedError("the client does not read its stream", reason="SLOW_CLIENT", retry_delay_s=1.0))
        self._changed.set()

    def _end_attempt(self, end: delivery_pb2.DeliveryFinished) -> None:
        if end.reason == common_pb2.FINISH_REASON_ERROR:
            if end.is_retryable:
                self.restart(end.error_message)
            else:
                self.fail(EngineError(end.error_message))
            return
        if end.reason == common_pb2.FINISH_REASON_PREEMPTED:
            self.restart("its worker made room for others", is_fault=False, is_preempted=True)
            return
        if end.reason not in (common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH):
            self.restart("the worker gave it up")
            return
        piece = self._stops.put(self._detokenizer.put((), is_last=True), is_last=True)
        self._pending.text += piece.text
        if piece.matched_stop:
            self._finish(common_pb2.FINISH_REASON_STOP, end, matched_stop=piece.matched_stop)
        else:
            self._finish(end.reason, end, matched_stop=self._special_stop(end))

    def _special_stop(self, end: delivery_pb2.DeliveryFinished) -> str:
        """Returns the stop string that is the special token at which the worker stopped, if it is one."""
        if not end.HasField("matched_stop_token_id"):
            return ""
        special_ids = self.valid.model.token_bytes.special_ids
        stops = (stop for stop in self.valid.stop_strings if special_ids.get(stop) == end.matched_stop_token_id)
        return next(stops, "")

    def _finish(
        self,
        reason: common_pb2.FinishReason,
        end: delivery_pb2.DeliveryFinished | None = None,
        matched_stop: str = "",
    ) -> None:
        now_s = time.monotonic()
        total_ms = (now_s - self.arrival_s) * 1e3
        ttft_ms = total_ms if self.first_token_s is None else (self.first_token_s - self.arrival_s) * 1e3
        waited_ms = max(ttft_ms - (end.prefill_us / 1e3 if end is not None else 0.0), 0.0)
        queue_ms = waited_ms if self._waited_us is None else self._waited_us / 1e3
        timings = common_pb2.RequestTimings(queue_ms=queue_ms, ttft_ms=ttft_ms, total_ms=total_ms)
        timings.prefill_ms = end.prefill_us / 1e3 if end is not None else max(ttft_ms - queue_ms, 0.0)
        timings.decode_ms = end.decode_us / 1e3 if end is not None else total_ms - ttft_ms
        self.finished = inference_pb2.GenerateFinished(
            reason=reason,
            matched_stop=matched_stop,
            usage=inference_pb2.Usage(
                prompt_tokens=len(self.prompt_ids),
                output_tokens=len(self.tokens),
                cached_prompt_tokens=end.cached_prompt_tokens if end is not None else 0,
            ),
            timings=timings,
            attempts=self.attempt,
        )
        if end is not None and end.HasField("matched_stop_token_id"):
            self.finished.matched_stop_token_id = end.matched_stop_token_id
        if self._batch is not None:
            self.finished.batch.CopyFrom(self._batch)
        self._changed.set()


def too_late() -> DeadlineError:
    """Returns the error of a request whose deadline has passed."""
    return DeadlineError("the deadline passed before the request was served")


class OpenRequests:
    """Open requests by the run id of their present attempt."""

    def __init__(self) -> None:
        """Starts empty."""
        self._open: dict[str, OpenRequest] = {}
        self._nothing_open = asyncio.Event()
        self._nothing_open.set()

    def __len__(self) -> int:
        """Number of open requests."""
        return len(self._open)

    def __iter__(self) -> Iterator[OpenRequest]:
        """Yields them; the caller may close some meanwhile."""
        return iter(list(self._open.values()))

    def add(self, opened: OpenRequest) -> None:
        """Takes a request."""
        self._open[opened.run_id] = opened
        self._nothing_open.clear()

    def get(self, run_id: str) -> OpenRequest | None:
        """Returns the open request whose present attempt has that id."""
        return self._open.get(run_id)

    def resumed(self, opened: OpenRequest, former: str) -> None:
        """Knows an open request by its new run id from now on."""
        if self._open.pop(former, None) is not None:
            self._open[opened.run_id] = opened

    def remove(self, opened: OpenRequest) -> None:
        """Forgets a request."""
        self._open.pop(opened.run_id, None)
        if not self._open:
            self._nothing_open.set()

    async def drained(self, timeout_s: float) -> bool:
        """Waits until none is open; False if that took longer than timeout_s seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._nothing_open.wait()
        except TimeoutError:
            return False
        return True
