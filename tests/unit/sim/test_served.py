"""What is simulated by default is what is served by default; where docs/paper differs, it says so in one place."""

from __future__ import annotations

import inspect
from dataclasses import asdict, replace

import pytest

from bucketserve.core.settings import CoreSettings
from bucketserve.core.stepping import MAX_SEQUENCES, STEP_TOKENS, plan_prefill
from bucketserve.core.types import RequestId
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.ports import SequenceSpec
from bucketserve.sim.policies import POLICIES, TABLE_SETTINGS, as_in_the_table
from bucketserve.sim.sequence import TABLE_MODE, WorkerMode
from bucketserve_scheduler.adapters import core_settings
from bucketserve_scheduler.settings import SchedulerSettings
from bucketserve_worker.settings import WorkerSettings

UNBOUNDED = {"max_queued_requests": 10_000_000, "max_queued_tokens": 10**12}


@pytest.mark.parametrize("policy", ["adaptive", "paper"])
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
    for name in ("adaptive", "paper"):
        served, shown = POLICIES[name], as_in_the_table(POLICIES[name])
        assert shown.settings is not None and served.settings is not None
        assert shown.mode == TABLE_MODE
        assert asdict(shown.settings) == asdict(served.settings) | TABLE_SETTINGS
    assert as_in_the_table(POLICIES["distserve"]) is POLICIES["distserve"]
