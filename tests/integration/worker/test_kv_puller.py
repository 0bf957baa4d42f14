"""What a worker does with KV that it is told to pull, from itself as well."""

from __future__ import annotations

import asyncio
import time

import pytest

from bucketserve.core.types import RequestId
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.engine.kv_staging import KvStaging
from bucketserve.rpc.convert import sequence_from_spec
from bucketserve.rpc.deployment import Deployment
from bucketserve.v1 import common_pb2, scheduler_pb2
from bucketserve_worker.delivery import DeliveryPool
from bucketserve_worker.engine_thread import EngineThread, EngineTurn
from bucketserve_worker.kv_holder import KvHolder
from bucketserve_worker.kv_puller import KvPuller
from bucketserve_worker.kv_source import KvSources
from bucketserve_worker.running import RunningTable
from tests.chaos.oracle import expected_tokens

PROMPT = [7, 8, 9]
SPEC = scheduler_pb2.RunSpec(token_ids=PROMPT, max_new_tokens=6, delivery_address="127.0.0.1:1")


@pytest.mark.parametrize(
    "settings",
    [FakeSettings(), FakeSettings(has_handles=True), FakeSettings(has_handles=True, tokens_per_step=2)],
    ids=["bytes", "handles", "handles and several tokens a step"],
)
async def test_a_worker_that_changed_sides_goes_on_with_what_it_holds_itself(settings: FakeSettings) -> None:
    by_handle = settings.has_handles
    turns: list[EngineTurn] = []
    tokens: list[int] = []
    pool = DeliveryPool(
        "w",
        Deployment(),
        fingerprint=lambda: "f",
        flush_s=0.0,
        give_up_s=60.0,
        on_stop=lambda keys: None,
        on_lost=lambda address, ids: None,
    )
    running = RunningTable(pool, time.monotonic)
    holder = KvHolder(30.0, time.monotonic)
    pulled: list[scheduler_pb2.KvPulled] = []

    def on_turn(turn: EngineTurn) -> None:
        turns.append(turn)
        tokens.extend(token.token_id for token in turn.output.tokens if token.token_id is not None)
        for resumed in turn.resumed:
            puller.resumed(resumed)
        for handed_over in turn.handed_over:
            held_running = running.get(handed_over.key)
            assert held_running is not None
            holder.hold(held_running, handed_over)
        running.take_output(turn.output)

    engine = EngineThread(lambda: FakeEngine(settings), on_turn)
    engine.start()
    started = await engine.started
    staging: KvStaging = engine.staging
    puller = KvPuller(
        KvSources(
            "w",
            Deployment(),
            holder,
            staging,
            started.info.kv_layout,
            started.info.kv_page_bytes,
            engine.known_pages,
        ),
        engine,
        running,
        on_pulled=pulled.append,
        on_transfer=lambda *_: None,
        on_began=lambda *_: None,
    )
    run = scheduler_pb2.AssignedRun(run_id="r.1", spec=SPEC.SerializeToString())
    assignment = scheduler_pb2.BatchAssignment(assignment=1, batch=common_pb2.BatchInfo(batch_id="b"), runs=[run])
    ((key, _),) = running.add(assignment)
    engine.add(1, [sequence_from_spec(SPEC, key, "b", hands_over=True)], 0, specs={key: run.spec})
    while not len(holder):
        await asyncio.sleep(0.01)
    held = holder.get(RequestId(key))
    assert held is not None
    # Of KV that stays in the engine nothing is here, and the engine counts it.
    assert (held.handed_over.num_tokens, bool(held.handed_over.kv_bytes)) == ((0, False) if by_handle else (3, True))
    kv = held.describe(started.info.kv_layout, staging.path)
    puller.pull(scheduler_pb2.PullKv(run_id="r.1", source_worker_id="w", kv=kv, batch=assignment.batch))
    while len(running):
        await asyncio.sleep(0.01)
    assert tokens == expected_tokens(PROMPT, 6, 0.0, 0)
    assert [(each.run_id, each.is_ok) for each in pulled] == [("r.1", True)]
    # Nothing is left of its first life here.
    assert (len(holder), len(running), len(puller), staging.num_blocks) == (0, 0, 0, 0)
    await puller.close()
    await pool.close()
    await engine.stop()
