"""The service's core and the simulator's are one: a log recorded in the service replays to the same decisions."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time

from bucketserve.core.messages import Decision, DispatchBatch
from bucketserve.core.prefixes import BLOCK_TOKENS
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.rpc.outbox import Outbox
from bucketserve.sim.policies import core_policy
from bucketserve.sim.policy_spec import PolicyContext
from bucketserve.store.embedded import EmbeddedServer
from bucketserve.telemetry.names import Service
from bucketserve.telemetry.process import open_telemetry
from bucketserve.v1 import common_pb2, scheduler_pb2
from bucketserve_scheduler.factories import core_settings, stores
from bucketserve_scheduler.loop import LoopDeps, SchedulingLoop
from bucketserve_scheduler.peers import GatewayPeer, GatewayPeers
from bucketserve_scheduler.settings import SchedulerSettings
from bucketserve_scheduler.telemetry import LoopTelemetry

CONTEXT = 2048
KV_TOKENS = 6000


class RecordingCore(SchedulerCore):
    """The production core, and a log of all that went in and out."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.log: list[tuple[float, tuple, Decision]] = []

    def step(self, events, now_s) -> Decision:
        decision = super().step(events, now_s)
        self.log.append((now_s, tuple(events), decision))
        return decision


def a_run(number: int, rng: random.Random) -> scheduler_pb2.SubmitRun:
    prompt = rng.choice([rng.randint(3, 60), rng.randint(400, 1400)])
    ticket = scheduler_pb2.Ticket(
        run_id=f"r{number}.1",
        model="m",
        prompt_tokens=prompt,
        max_new_tokens=rng.randint(1, 200),
        request_class=rng.choice([common_pb2.REQUEST_CLASS_INTERACTIVE, common_pb2.REQUEST_CLASS_BATCH]),
        tenant=rng.choice(["a", "b"]),
        slo=common_pb2.Slo(ttft_ms=rng.randint(20, 3000)),
        gateway_id="g",
        context_tokens=CONTEXT,
    )
    spec = scheduler_pb2.RunSpec(token_ids=[7] * prompt, max_new_tokens=ticket.max_new_tokens)
    remaining_us = 400_000 if number % 11 == 0 else None
    # Two thirds begin like others of theirs.
    begins = rng.choice([None, None, 1, 2, 3, 4])
    hashes = [] if begins is None else [2**63 + 1000 * begins + i for i in range(prompt // BLOCK_TOKENS)]
    return scheduler_pb2.SubmitRun(
        ticket=ticket, spec=spec.SerializeToString(), remaining_us=remaining_us, block_hashes=hashes
    )


async def play_worker(loop: SchedulingLoop, name: str) -> None:
    """A worker that does what it is told: prefills in a blink, finishes a little later, reports."""
    used, last, sizes = 0, 0, {}

    def report() -> scheduler_pb2.WorkerReport:
        return scheduler_pb2.WorkerReport(
            kv_total_tokens=KV_TOKENS, kv_free_tokens=KV_TOKENS - used, max_sequences=8, last_assignment=last
        )

    peer = await loop.connect(scheduler_pb2.WorkerHello(worker_id=name, context_tokens=CONTEXT, report=report()))

    async def tell(**message) -> None:
        await loop.hear(peer, scheduler_pb2.WorkRequest(**message))

    async for message in peer.outbox.messages():
        if message.WhichOneof("message") != "batch":
            continue
        assignment = message.batch
        last = assignment.assignment
        for run in assignment.runs:
            spec = scheduler_pb2.RunSpec.FromString(run.spec)
            sizes[run.run_id] = len(spec.token_ids) + spec.max_new_tokens
            used += sizes[run.run_id]
        ids = [run.run_id for run in assignment.runs]
        await tell(report=report())
        await asyncio.sleep(0.003)
        done = scheduler_pb2.BatchPrefilled(
            assignment=last,
            run_ids=ids,
            cached_prompt_tokens=[BLOCK_TOKENS * (number % 4) for number in range(len(ids))],
        )
        await tell(prefilled=done)
        await asyncio.sleep(0.005)
        for run_id in ids:
            used -= sizes.pop(run_id)
            finished = scheduler_pb2.RunFinished(
                run_id=run_id, assignment=last, output_tokens=3, reason=common_pb2.FINISH_REASON_LENGTH
            )
            await tell(finished=finished)
        await tell(report=report())


async def test_a_log_of_the_service_replays_in_the_simulator_s_policy() -> None:
    settings = SchedulerSettings()
    cores: list[RecordingCore] = []

    def new_core(context_tokens: int) -> RecordingCore:
        cores.append(RecordingCore(core_settings(settings), context_tokens))
        return cores[-1]

    async with contextlib.AsyncExitStack() as stack:
        outlets = stack.enter_context(open_telemetry(Service.SCHEDULER, "s", metrics_address=None))
        server = stack.enter_context(EmbeddedServer())
        gateways = GatewayPeers()
        gateways.connect(GatewayPeer("g", Outbox(10_000)))
        ticks = itertools.count()
        deps = LoopDeps(
            settings=settings,
            scheduler_id="s",
            telemetry=LoopTelemetry(outlets.log, outlets.metrics, outlets.tracing),
            clock=lambda: time.monotonic() + 1e-6 * next(ticks),
            new_core=new_core,
        )
        loop = SchedulingLoop("m", CONTEXT, (await stores(server.url, "default", stack)).of_model("m"), gateways, deps)
        running = asyncio.create_task(loop.run())
        workers = [asyncio.create_task(play_worker(loop, name)) for name in ("w0", "w1")]
        rng = random.Random(5)
        for number in range(300):
            await loop.submit(a_run(number, rng))
            if number % 10 == 9:
                await loop.cancel(f"r{rng.randrange(number)}.1")
            if number % 5 == 0:
                await asyncio.sleep(0.004)
        for _ in range(400):
            view = cores[-1].status()
            if cores[-1].log and not view.num_waiting + view.num_running:
                break
            await asyncio.sleep(0.05)
        for task in (*workers, running):
            task.cancel()
        await asyncio.wait([*workers, running])

    (core,) = cores
    view = core.status()
    assert (view.num_waiting, view.num_running) == (0, 0)
    batches = [c for _, _, decision in core.log for c in decision.commands if isinstance(c, DispatchBatch)]
    assert len(batches) > 20
    policy = core_policy("service", "", core_settings(settings), lambda *_: ())
    replayed = policy.build(PolicyContext(CONTEXT, 0, lambda _: 1))
    for now_s, events, decision in core.log:
        assert replayed.step(events, now_s) == decision
