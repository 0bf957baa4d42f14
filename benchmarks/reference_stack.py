"""Our side of the comparisons: the whole stack as processes of this machine, stopped while it is not measured."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import grpc
from peers.client import Outcome
from reference_requests import Request

from bucketserve.client import BucketServeClient, Chunk, Finished
from bucketserve.core.errors import BucketServeError
from bucketserve.store.embedded import EmbeddedServer
from bucketserve.v1 import common_pb2
from bucketserve_cli.stack import LocalStack, StackSpec

MODES = {
    "float32": {"BUCKETSERVE_WORKER_DTYPE": "float32"},
    "bfloat16": {"BUCKETSERVE_WORKER_DTYPE": "bfloat16"},
    "int8": {"BUCKETSERVE_WORKER_DTYPE": "float32", "BUCKETSERVE_WORKER_QUANTIZATION": "int8"},
    "int8-bfloat16": {"BUCKETSERVE_WORKER_DTYPE": "bfloat16", "BUCKETSERVE_WORKER_QUANTIZATION": "int8"},
    "vllm-float32": {"BUCKETSERVE_WORKER_ENGINE": "vllm", "BUCKETSERVE_WORKER_DTYPE": "float32"},
}
"""How a worker runs: 8-bit weights are with float32 KV, or with bfloat16 KV. vLLM's engine needs an environment of its
own, on which all of the stack runs then: PEERS/vllm/bin/python benchmarks/compare.py ..."""
OURS = "bucketserve"
KV_BUDGET_TOKENS = 40_000
RECOVER_S = 120.0
SETTLE_S = 1.0
"""Between waking a system and measuring it: threads and heartbeats find their feet again."""


def end_on_signals() -> None:
    """From now on SIGTERM and SIGHUP raise SystemExit, so that all that was started is ended too.

    Who is stopped by SIGSTOP would otherwise be left, and no signal but SIGKILL would end it.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))


class ReferenceStack:
    """A gateway, a scheduler, workers and Valkey. It runs between go and halt, else it is stopped by SIGSTOP."""

    def __init__(
        self,
        model: Path,
        mode: str,
        kv_tokens: int | None = None,
        *,
        keeps_prefixes: bool = False,
        num_workers: int = 1,
        policy: str = "adaptive",
    ) -> None:
        """Starts nothing yet. Without kv_tokens a worker has room for all of the reference work.

        keeps_prefixes: not beside peers, which keep none either: the same requests come in every round.
        """
        self.name = f"{OURS} {mode}"
        self._environ = {
            **MODES[mode],
            "BUCKETSERVE_WORKER_KV_BUDGET_TOKENS": str(kv_tokens or KV_BUDGET_TOKENS),
            "BUCKETSERVE_WORKER_PREFIX_CACHE": str(keeps_prefixes).lower(),
            "BUCKETSERVE_SCHEDULER_POLICY": policy,
        }
        self._model, self._num_workers = str(model), num_workers
        self._exit = ExitStack()

    def __enter__(self) -> ReferenceStack:
        """Returns once it is loaded, warm and stopped.

        Raises:
            StackError: a service ended, or was not ready in time.
        """
        with ExitStack() as opening:
            self._store = opening.enter_context(EmbeddedServer())
            spec = StackSpec(
                model=self._model, num_workers=self._num_workers, redis_url=self._store.url, environ=self._environ
            )
            self._stack = opening.enter_context(LocalStack(spec))
            opening.callback(self._signal, signal.SIGCONT)
            self.go()
            self.halt()
            self._exit = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    @property
    def address(self) -> str:
        """Of the gateway."""
        return self._stack.gateway_address

    def go(self) -> None:
        """Wakes it and returns once it answers: who was stopped has lost its leases and takes them again."""
        self._signal(signal.SIGCONT)
        asyncio.run(self._until_answers())
        time.sleep(SETTLE_S)

    def halt(self) -> None:
        """Stops all its processes."""
        self._signal(signal.SIGSTOP)

    async def _until_answers(self) -> None:
        deadline_s = time.monotonic() + RECOVER_S
        while True:
            async with BucketServeClient(self.address) as client:
                warm = [Request(list(range(100, 164)), 4)] * 8
                outcomes = await asyncio.gather(*(send(client, request, timeout_s=20.0) for request in warm))
            if not any(outcome.error for outcome in outcomes):
                return
            if time.monotonic() > deadline_s:
                raise SystemExit(f"{self.name} does not answer: {outcomes[0].error}")
            await asyncio.sleep(0.5)

    def _signal(self, number: signal.Signals) -> None:
        for service in self._stack.services.values():
            service.signal(number)
        os.kill(self._store.pid, number)


async def send(
    client: BucketServeClient, request: Request, *, slo: common_pb2.Slo | None = None, timeout_s: float | None = None
) -> Outcome:
    """Returns what the client of a request felt; greedy, the end token ignored."""
    outcome = Outcome(sent_s=time.perf_counter())
    try:
        async for event in client.generate(
            token_ids=request.prompt_ids,
            max_tokens=request.max_tokens or request.output_tokens,
            stop_token_ids=request.stop_token_ids,
            ignore_eos=True,
            slo=slo,
            timeout_s=timeout_s,
        ):
            if isinstance(event, Chunk):
                outcome.came(len(event.token_ids))
            elif isinstance(event, Finished) and event.usage.output_tokens != request.output_tokens:
                outcome.error = f"{event.usage.output_tokens} of {request.output_tokens} tokens"
    except BucketServeError as error:
        outcome.error = error.reason
    except grpc.aio.AioRpcError as error:
        outcome.error = error.code().name
    return outcome
