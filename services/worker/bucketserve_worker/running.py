"""The requests at this worker: whose they are, how far they are, and their output on its way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bucketserve.core.types import FinishReason, RequestId
from bucketserve.ports import SequenceFailure, StepOutput, TokenOutput
from bucketserve.rpc.convert import finish_reason_to_pb, logprobs_to_pb
from bucketserve.v1 import common_pb2, delivery_pb2, scheduler_pb2, worker_pb2
from bucketserve_worker.delivery import DeliveryPool

__all__ = ["Finished", "Running", "RunningTable", "run_of"]


def run_of(key: RequestId) -> str:
    """Returns the run that the engine knows by that name."""
    return key.rpartition("#")[0]


@dataclass(slots=True)
class Running:
    """A run at this worker."""

    run_id: str
    spec: scheduler_pb2.RunSpec
    batch: common_pb2.BatchInfo
    assignment: int
    """Number of the order that brought it, a batch or a pull."""
    received_s: float
    prefilled_s: float | None = None
    num_output_tokens: int = 0
    cached_prompt_tokens: int = 0
    was_pulled: bool = False
    """Its prompt was computed by another worker, or by this one in another role."""
    is_replaced: bool = False
    """It came again, and the engine was told to let this run go."""
    is_handed_over: bool = False
    """Its KV has left the engine, to be pulled."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that has left, for the scheduler and the traces."""

    running: Running
    reason: FinishReason
    finished_s: float
    is_retryable: bool = True
    """For an error: whether another worker may do better."""


@dataclass(slots=True)
class RunningTable:
    """Runs, by the engine's name for each. Owned by the event loop.

    A run may arrive again while the engine still lets it go: the scheduler lost what it knew, cancelled the run and was
    told of it again. Tokens of the two must never be mixed up, so that the engine knows each by a name of its own.
    """

    delivery: DeliveryPool
    clock: Callable[[], float]
    _running: dict[RequestId, Running] = field(default_factory=dict)
    _num_added: int = 0

    def __len__(self) -> int:
        """Number of requests here."""
        return len(self._running)

    def get(self, key: RequestId) -> Running | None:
        """Returns an attempt, if it is here."""
        return self._running.get(key)

    def keys_of(self, run_id: str) -> list[RequestId]:
        """Returns the engine's names for a run; all but at most one are on their way out."""
        return [key for key, running in self._running.items() if running.run_id == run_id]

    def replace(self, run_id: str, except_key: RequestId | None = None) -> list[RequestId]:
        """Returns the names of a run that comes again; nobody is told when they end."""
        keys = [key for key in self.keys_of(run_id) if key != except_key]
        for key in keys:
            self._running[key].is_replaced = True
        return keys

    def __iter__(self) -> Iterator[tuple[RequestId, Running]]:
        """Yields what is here, except what nobody waits for any more."""
        return ((key, running) for key, running in self._running.items() if not running.is_replaced)

    def add(self, assignment: scheduler_pb2.BatchAssignment) -> list[tuple[RequestId, Running]]:
        """Takes a batch; returns its runs with their names, in order."""
        now_s = self.clock()
        added = []
        for run in assignment.runs:
            spec = scheduler_pb2.RunSpec.FromString(run.spec)
            running = Running(run.run_id, spec, assignment.batch, assignment.assignment, now_s)
            added.append((self._name(running), running))
        return added

    def resume(self, pull: scheduler_pb2.PullKv, trailer: worker_pb2.KvTrailer) -> tuple[RequestId, Running]:
        """Takes a run whose KV has come, and sends the tokens that came with it: order is the gateway's."""
        now_s = self.clock()
        running = Running(
            pull.run_id,
            scheduler_pb2.RunSpec.FromString(trailer.spec),
            pull.batch,
            pull.assignment,
            received_s=now_s - pull.kv.prefill_us / 1e6,
            prefilled_s=now_s,
            num_output_tokens=len(trailer.token_ids),
            cached_prompt_tokens=trailer.cached_prompt_tokens,
            was_pulled=True,
        )
        delivery = delivery_pb2.TokenDelivery(
            run_id=pull.run_id, token_ids=trailer.token_ids, logprobs=trailer.logprobs, batch=pull.batch
        )
        self.delivery.send(running.spec.delivery_address, delivery)
        return self._name(running), running

    def _name(self, running: Running) -> RequestId:
        self._num_added += 1
        key = RequestId(f"{running.run_id}#{self._num_added}")
        self._running[key] = running
        return key

    def of_gateway(self, delivery_address: str, run_ids: set[str]) -> list[RequestId]:
        """Returns the names of those runs whose output goes to that address."""
        return [
            key
            for key, running in self._running.items()
            if running.run_id in run_ids and running.spec.delivery_address == delivery_address
        ]

    def take_output(self, output: StepOutput) -> list[Finished]:
        """Sends a step's tokens to their gateways; returns the requests that it ended."""
        now_s = self.clock()
        for key in output.prefilled:
            if running := self._running.get(key):
                running.prefilled_s = now_s
        finished = [done for token in output.tokens if (done := self._take_token(token, now_s))]
        finished += [done for failure in output.failures if (done := self._take_failure(failure, now_s))]
        return finished

    def take_preempted(self, keys: Sequence[RequestId]) -> list[Finished]:
        """Ends attempts that the engine has let go, at once to be gone on with; what was handed over before stays."""
        now_s = self.clock()
        here = [key for key in keys if (running := self._running.get(key)) and not running.is_handed_over]
        return [done for key in here if (done := self._end(key, FinishReason.PREEMPTED, now_s))]

    def take_cancelled(self, keys: Sequence[RequestId]) -> list[Finished]:
        """Forgets requests that the engine has let go; nobody waits for their output."""
        return self.give_up(keys, FinishReason.CANCELLED)

    def give_up(self, keys: Sequence[RequestId], reason: FinishReason) -> list[Finished]:
        """Forgets attempts without a word to their gateways; those not here are passed over."""
        now_s = self.clock()
        ended = [running for key in keys if (running := self._running.pop(key, None))]
        return [Finished(running, reason, now_s) for running in ended if not running.is_replaced]

    def drop(self, key: RequestId) -> None:
        """Forgets an attempt; nobody is told."""
        self._running.pop(key, None)

    def fail(self, keys: Sequence[RequestId], message: str) -> list[Finished]:
        """Ends attempts; their gateways start them elsewhere."""
        failures = [SequenceFailure(request_id=key, message=message, is_retryable=True) for key in keys]
        now_s = self.clock()
        return [done for failure in failures if (done := self._take_failure(failure, now_s))]

    def fail_all(self, message: str) -> list[Finished]:
        """Ends everything: the engine is gone. Gateways start the requests elsewhere."""
        return self.fail(list(self._running), message)

    def _take_token(self, token: TokenOutput, now_s: float) -> Finished | None:
        running = self._running.get(token.request_id)
        if running is None or running.is_replaced:
            return None
        delivery = delivery_pb2.TokenDelivery(run_id=running.run_id, first_index=running.num_output_tokens)
        if not running.num_output_tokens:
            delivery.batch.CopyFrom(running.batch)
        running.cached_prompt_tokens = max(running.cached_prompt_tokens, token.cached_prompt_tokens)
        if token.token_id is not None:
            delivery.token_ids.append(token.token_id)
            running.num_output_tokens += 1
            if token.logprobs is not None:
                delivery.logprobs.append(logprobs_to_pb(token.logprobs))
        if token.finish_reason is not None:
            delivery.finished.CopyFrom(self._finished(running, token.finish_reason, now_s))
            if token.matched_stop_token_id is not None:
                delivery.finished.matched_stop_token_id = token.matched_stop_token_id
            del self._running[token.request_id]
        self.delivery.send(running.spec.delivery_address, delivery)
        return None if token.finish_reason is None else Finished(running, token.finish_reason, now_s)

    def _take_failure(self, failure: SequenceFailure, now_s: float) -> Finished | None:
        return self._end(
            failure.request_id, FinishReason.ERROR, now_s, message=failure.message, is_retryable=failure.is_retryable
        )

    def _end(
        self, key: RequestId, reason: FinishReason, now_s: float, *, message: str = "", is_retryable: bool = True
    ) -> Finished | None:
        """Ends an attempt whose output is not complete, and tells its gateway."""
        running = self._running.pop(key, None)
        if running is None or running.is_replaced:
            return None
        finished = self._finished(running, reason, now_s)
        finished.error_message, finished.is_retryable = message, is_retryable
        self.delivery.send(
            running.spec.delivery_address,
            delivery_pb2.TokenDelivery(run_id=running.run_id, first_index=running.num_output_tokens, finished=finished),
        )
        return Finished(running, reason, now_s, is_retryable)

    def _finished(self, running: Running, reason: FinishReason, now_s: float) -> delivery_pb2.DeliveryFinished:
        prefilled_s = running.prefilled_s if running.prefilled_s is not None else now_s
        return delivery_pb2.DeliveryFinished(
            reason=finish_reason_to_pb(reason),
            cached_prompt_tokens=running.cached_prompt_tokens,
            prefill_us=round((prefilled_s - running.received_s) * 1e6),
            decode_us=round((now_s - prefilled_s) * 1e6),
        )
