"""What is simulated by default is what is served by default; where docs/paper differs, it says so in one place."""

from __future__ import annotations

import inspect
from dataclasses import asdict, replace

import pytest

from bucketserve.core.settings import CoreSettings
from bucketserve.core.stepping import MAX_SEQUENCES, STEP_TOKENS, plan_prefill
from bucketserve.core.types import BatchId, RequestId, WorkerId, WorkerRole
from bucketserve.engine import fake
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.ports import SequenceSpec
from bucketserve.sim import worker as sim_worker
from bucketserve.sim.latency import CostMode, load_device
from bucketserve.sim.policies import POLICIES, TABLE_SETTINGS, as_in_the_table
from bucketserve.sim.sequence import TABLE_MODE, SimSequence, WorkerMode, WorkerSpec
from bucketserve.sim.worker import SimWorker
from bucketserve_scheduler.factories import core_settings
from bucketserve_scheduler.settings import SchedulerSettings
from bucketserve_worker.settings import WorkerSettings

ROUTERS = ("round-robin", "least-loaded", "least-prefill")
UNBOUNDED = {"max_queued_requests": 10_000_000, "max_queued_tokens": 10**12}


@pytest.mark.parametrize("policy", ["adaptive", "paper", *ROUTERS])
def test_the_core_that_is_simulated_is_the_one_that_is_served(policy: str) -> None:
    served, simulated = core_settings(SchedulerSettings(policy=policy)), POLICIES[policy].settings
    assert simulated == replace(served, **UNBOUNDED)


def test_what_is_served_by_default_is_the_core_s_default() -> None:
    assert core_settings(SchedulerSettings()) == CoreSettings()


def test_simulated_workers_compose_steps_as_engines_do() -> None:
    mode = POLICIES["adaptive"].mode
    assert mode == WorkerMode()
    assert (mode.max_sequences, mode.max_step_tokens) == (MAX_SEQUENCES, STEP_TOKENS)
    assert mode.shares_steps is inspect.signature(plan_prefill).parameters["is_shared"].default
    assert WorkerSettings().max_sequences == MAX_SEQUENCES
    assert (FakeSettings().max_sequences, FakeSettings().max_step_tokens) == (MAX_SEQUENCES, STEP_TOKENS)


def test_an_engine_lets_a_short_prompt_share_the_step_of_a_long_one() -> None:
    engine = FakeEngine()
    lengths = {"long": 6000, "short": 10}
    engine.add(
        [
            SequenceSpec(request_id=RequestId(name), token_ids=(5,) * length, max_new_tokens=1)
            for name, length in lengths.items()
        ]
    )
    assert engine.step().prefilled == (RequestId("short"),)


def test_the_table_differs_where_it_says_so_and_nowhere_else() -> None:
    for name in ("adaptive", "paper", *ROUTERS):
        served, shown = POLICIES[name], as_in_the_table(POLICIES[name])
        assert shown.settings is not None and served.settings is not None
        assert shown.mode == replace(TABLE_MODE, kv=served.mode.kv)
        alone = {"fill_tokens": 1} if served.settings.is_time_aware else {}
        assert asdict(shown.settings) == asdict(served.settings) | TABLE_SETTINGS | alone
    assert as_in_the_table(POLICIES["distserve"]) is POLICIES["distserve"]


def recorded(module: object, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Returns the rule's arguments for each step with prompts that the module's workers compose from now on."""
    rule, calls = plan_prefill, list[dict[str, object]]()

    def watched(waiting, **options):
        queue = list(waiting)
        bound = inspect.signature(rule).bind(queue, **options)
        bound.apply_defaults()
        if queue:
            calls.append(dict(bound.arguments))
        return rule(queue, **options)

    monkeypatch.setattr(module, "plan_prefill", watched)
    return calls


@pytest.mark.parametrize("chunk", [0, 512])
@pytest.mark.parametrize("prompts", [[6000, 10, 3000, 100, 700], [30] * 80, [5000], [1, 2048, 2047, 1]])
def test_a_simulated_worker_hands_the_step_rule_what_an_engine_hands_it(
    prompts: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [3 + 5 * i % 17 for i in range(len(prompts))]
    engine_calls = recorded(fake, monkeypatch)
    engine = FakeEngine(FakeSettings(kv_total_tokens=100_000, context_tokens=8192))
    ids = [RequestId(f"r{i:03d}") for i in range(len(prompts))]
    wanted = list(zip(ids, prompts, outputs, strict=True))
    engine.add(
        [SequenceSpec(request_id=name, token_ids=(5,) * n, max_new_tokens=out) for name, n, out in wanted], chunk
    )
    left = dict(zip(ids, outputs, strict=True))
    while engine.has_work():
        for output in engine.step().tokens:
            left[output.request_id] -= 1
        engine.cancel([name for name in ids if not left[name]])

    simulated_calls = recorded(sim_worker, monkeypatch)
    device = load_device("a100-40gb-13b")
    worker = SimWorker(
        WorkerSpec(
            worker_id=WorkerId("w"),
            role=WorkerRole.BOTH,
            latency=device.latency[1],
            kv_total_tokens=100_000,
            cost=CostMode.PACKED,
            mode=POLICIES["adaptive"].mode,
        )
    )
    worker.add(
        (SimSequence(name, n, out, out, BatchId("b"), 1, max_chunk_tokens=chunk) for name, n, out in wanted),
        1,
    )
    worker.plan(0.0)
    while worker.end_s is not None:
        at_s = worker.end_s
        worker.finish()
        worker.plan(at_s)
    assert simulated_calls == engine_calls
