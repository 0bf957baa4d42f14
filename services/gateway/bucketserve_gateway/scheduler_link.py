"""The gateway's streams to the schedulers: runs and cancellations out; admissions, refusals and dispatches in.

Each model has a stream of its own, since another scheduler may lead each.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator

from bucketserve.core.errors import (
    BucketServeError,
    EngineError,
    FieldViolation,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from bucketserve.core.types import NO_WORKER_RETRY_S
from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.leader import LeaderSearch
from bucketserve.rpc.listening import hang_up, messages_while_alive
from bucketserve.rpc.outbox import Outbox
from bucketserve.v1 import scheduler_pb2, scheduler_pb2_grpc
from bucketserve_gateway.requests import OpenRequest, OpenRequests

__all__ = ["SchedulerLink", "SchedulerLinks"]

OUTBOX_LIMIT = 65_536
SILENCE_S = 8.0
"""A request of which nothing was heard for so long is submitted again."""
LOOK_S = 0.5
SPREAD_S = 4.0
"""Many that became silent together are submitted again over so long, and so from then on: prompts are large."""
FEW = 100
"""So many at once are no burden."""
FULL_S = 1.0
"""One that was admitted is submitted again so long after a full store did not take its next attempt."""

Submit = scheduler_pb2.SubmitRequest


class SchedulerLink:
    """Keeps a model's Submit stream open, reconnecting for ever.

    After every connection all open requests of the model are submitted again under their run ids: the scheduler
    answers with what it knows of them, and takes those that it does not know.
    """

    def __init__(
        self,
        model: str,
        addresses: list[str],
        deployment: Deployment,
        gateway_id: str,
        requests: OpenRequests,
        on_state: Callable[[bool, str], None],
        on_adapters: Callable[[str, scheduler_pb2.ServedAdapters], None],
    ) -> None:
        """on_state(connected, detail), on_adapters(model, all that it has) on every change."""
        self._model = model
        self._deployment = deployment
        self._gateway_id = gateway_id
        self._instance = uuid.uuid4().hex
        self._requests = requests
        self._on_adapters = on_adapters
        self._search = LeaderSearch(model, addresses, deployment.tls, on_state)
        self._problem = ""
        self._outbox: Outbox[Submit] | None = None
        self._waiting_for_room: set[str] = set()
        """Runs that a full store refused, and that are submitted again."""

    @property
    def is_connected(self) -> bool:
        """Whether a scheduler has welcomed us."""
        return self._outbox is not None

    def is_present(self, grace_s: float) -> bool:
        """Whether a scheduler is there, or was not long ago."""
        return self._search.is_present(grace_s)

    @property
    def problem(self) -> str:
        """Why a request is not queued at once; empty if it is not known."""
        return self._problem if self.is_connected else f"no scheduler answers; {self._search.detail}"

    def submit(self, opened: OpenRequest) -> None:
        """Sends a request's present attempt, now or as soon as there is a stream."""
        if self._outbox is not None:
            self._outbox.send(Submit(run=opened.submission()))

    def cancel(self, run_id: str) -> None:
        """Tells the scheduler to forget an attempt."""
        if self._outbox is not None:
            self._outbox.send(Submit(cancel=scheduler_pb2.CancelRun(run_id=run_id)))

    def ask_again(self, now_s: float) -> int:
        """Submits silent requests again, as they are; returns how many.

        Whatever was lost on the way, word of a dispatch or of an end, is found out so. The scheduler takes what it does
        not know, and answers for what it knows; a request that waits in its queue is silent as well.
        """
        if not self.is_connected:
            return 0
        most = max(math.ceil(len(self._requests) * LOOK_S / SPREAD_S), FEW)
        silent = [opened for opened in self._open() if now_s - opened.heard_s >= SILENCE_S]
        del silent[most:]
        for opened in silent:
            opened.heard_s = now_s
            self.submit(opened)
        return len(silent)

    async def watch(self) -> None:
        """Asks again for what is silent; ends only by cancellation."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.ask_again(time.monotonic())

    async def run(self) -> None:
        """Stays connected; ends only by cancellation."""
        await self._search.run(self._converse)

    def _open(self) -> Iterator[OpenRequest]:
        return (opened for opened in self._requests if opened.model == self._model and not opened.is_over)

    async def _converse(self, stub: scheduler_pb2_grpc.SchedulerServiceStub, address: str) -> None:
        outbox: Outbox[Submit] = Outbox(OUTBOX_LIMIT)
        hello = scheduler_pb2.GatewayHello(gateway_id=self._gateway_id, instance=self._instance, model=self._model)
        outbox.send(Submit(hello=hello))
        call = stub.Submit(outbox.messages(), metadata=self._deployment.metadata)
        try:
            async for response in messages_while_alive(call):
                kind = response.WhichOneof("message")
                if kind == "heartbeat":
                    self._problem = response.heartbeat.problem
                elif kind == "adapters":
                    self._on_adapters(self._model, response.adapters)
                elif kind == "hello":
                    self._search.welcomed(response.hello, address)
                    self._outbox, self._problem = outbox, ""
                    for opened in self._open():
                        self.submit(opened)
                else:
                    self._take(response)
        finally:
            self._outbox = None
            outbox.close()
            hang_up(call)

    def _wait_for_room(self, opened: OpenRequest) -> None:
        """Submits an admitted request again after a while, however often it was refused meanwhile."""
        opened.heard_s = time.monotonic()
        if opened.run_id not in self._waiting_for_room:
            self._waiting_for_room.add(opened.run_id)
            asyncio.get_running_loop().call_later(FULL_S, self._submit_again, opened.run_id)

    def _submit_again(self, run_id: str) -> None:
        self._waiting_for_room.discard(run_id)
        opened = self._requests.get(run_id)
        if opened is not None and not opened.is_over:
            self.submit(opened)

    def _take(self, response: scheduler_pb2.SubmitResponse) -> None:
        kind = response.WhichOneof("message")
        if kind is None:
            return
        message = getattr(response, kind)
        opened = self._requests.get(message.run_id)
        if opened is None:
            return
        match kind:
            case "accepted":
                opened.on_accepted()
            case "dispatched":
                opened.on_dispatched(message)
            case "refused" if opened.is_admitted and message.reason == scheduler_pb2.REFUSE_REASON_STORE_FULL:
                self._wait_for_room(opened)
            case "refused":
                opened.fail(_refusal(opened.model, message))
            case "dropped":
                _drop(opened, message.reason)


class SchedulerLinks:
    """A link for each model."""

    def __init__(self, models: Iterable[str], new_link: Callable[[str], SchedulerLink]) -> None:
        """new_link(model) makes one."""
        self._links = {model: new_link(model) for model in models}

    def of(self, model: str) -> SchedulerLink:
        """Returns a served model's link."""
        return self._links[model]

    def is_present(self, grace_s: float) -> bool:
        """Whether the scheduler of some model is there, or was not long ago."""
        return any(link.is_present(grace_s) for link in self._links.values())

    async def run(self) -> None:
        """Keeps every model's stream open and asks again for what is silent; ends only by cancellation."""
        async with asyncio.TaskGroup() as tasks:
            for model, link in self._links.items():
                tasks.create_task(link.run(), name=f"scheduler-link-{model}")
                tasks.create_task(link.watch(), name=f"silent-requests-{model}")


def _drop(opened: OpenRequest, reason: scheduler_pb2.DropReason) -> None:
    match reason:
        case scheduler_pb2.DROP_REASON_WORKER_LOST:
            opened.restart("its worker was lost")
        case scheduler_pb2.DROP_REASON_WORKER_FAILED:
            opened.restart("its worker failed")
        case scheduler_pb2.DROP_REASON_DEADLINE:
            opened.expire()
        case scheduler_pb2.DROP_REASON_CANCELLED:
            # Not by us, or it would not be open: this gateway was away, and its runs were stopped.
            opened.restart("it was stopped while its gateway was away", is_fault=False)
        case scheduler_pb2.DROP_REASON_NO_LIKE_WORKER:
            message = "no worker is left that could go on: none has its weights, tokenizer, adapter or grammars"
            opened.fail(UnavailableError(message, reason="NO_LIKE_WORKER"))
        case scheduler_pb2.DROP_REASON_NO_WORKER:
            opened.fail(_no_worker(opened.model, NO_WORKER_RETRY_S))
        case scheduler_pb2.DROP_REASON_INTERNAL:
            opened.fail(EngineError("the scheduler failed on the request"))
        case _:
            opened.fail(UnavailableError("no worker can hold the request any more", reason="TOO_LARGE"))


def _no_worker(model: str, retry_delay_s: float) -> UnavailableError:
    message = f"no worker serves model {model!r} at present"
    return UnavailableError(message, reason="NO_WORKER", retry_delay_s=retry_delay_s)


def _refusal(model: str, refused: scheduler_pb2.RunRefused) -> BucketServeError:
    """Returns the error that a refusal means for the client."""
    name = scheduler_pb2.RefuseReason.Name(refused.reason).removeprefix("REFUSE_REASON_")
    delay_s = refused.retry_delay_ms / 1e3
    match refused.reason:
        case scheduler_pb2.REFUSE_REASON_TOO_LARGE:
            description = "prompt and max_tokens together need more KV memory than any worker has"
            return InvalidRequestError([FieldViolation("stopping.max_tokens", description)])
        case scheduler_pb2.REFUSE_REASON_NO_GRAMMARS:
            description = "no worker of this model can constrain its output: their engine has no grammars"
            return InvalidRequestError([FieldViolation("structured_output", description)])
        case scheduler_pb2.REFUSE_REASON_NO_WORKER:
            return _no_worker(model, delay_s)
        case scheduler_pb2.REFUSE_REASON_NO_ADAPTER:
            return UnavailableError("no worker has the adapter at present", reason=name, retry_delay_s=1.0)
        case scheduler_pb2.REFUSE_REASON_OTHER_TOKENIZER:
            return UnavailableError("the workers' model has another tokenizer than this gateway", reason=name)
        case _:
            return OverloadedError(f"refused: {name}", reason=name, retry_delay_s=delay_s)
