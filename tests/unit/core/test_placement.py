"""Which worker, where several could."""

from __future__ import annotations

import pytest

from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings, EdgeRule
from bucketserve.core.types import StepSample
from tests.builders import at, joined, reported
from tests.unit.core.cores import batches, submitted

DECODE_S = 0.02
RUNNING = 10


def a_fleet(token_s: float, decode_s: float = DECODE_S) -> SchedulerCore:
    """Returns a core with three workers that decode and have shown what a prompt token takes; 0: nothing."""
    core = SchedulerCore(CoreSettings(edges=EdgeRule.NONE), 4096)
    mixes = [(tokens, sequences) for tokens in range(0, 300, 30) for sequences in (0, 5, RUNNING) if tokens + sequences]
    steps = tuple(
        StepSample(prefill_tokens=tokens, decode_sequences=sequences, duration_s=decode_s + token_s * tokens)
        for tokens, sequences in mixes * 3
    )
    for name in ("a", "b", "c"):
        core.step([joined(name, free=8000, total=9000, running=(at(f"{name}0", assignment=7),))], 0.0)
        core.step([still_decodes(name, 7, steps=steps if token_s else ())], 0.0)
    return core


def still_decodes(name: str, last_assignment: int, **more):
    return reported(name, free=8000, total=9000, num_running=RUNNING, last_assignment=last_assignment, **more)


def places(core: SchedulerCore, *names: str) -> list[str]:
    """Returns where each goes, one after another."""
    return [batches(core.step(submitted(name, prompt_tokens=40), 0.1))[0].worker_id for name in names]


def test_short_prompts_share_the_next_step_of_one_worker_until_it_takes_twice_as_long() -> None:
    # 40 tokens take 8 ms, a step without prompts 20.
    assert places(a_fleet(2e-4), *"rstuv") == ["a", "a", "a", "b", "b"]


def test_a_step_that_has_begun_is_shared_by_nobody() -> None:
    core = a_fleet(1e-4)
    assert places(core, "r") == ["a"]
    core.step([still_decodes("a", 8, waiting_prefill_tokens=40)], 0.1)
    assert places(core, "s", "t") == ["b", "b"]


def test_where_prompts_take_long_each_goes_to_another_worker() -> None:
    assert places(a_fleet(1e-3), *"rst") == ["a", "b", "c"]


@pytest.mark.parametrize(("token_s", "decode_s"), [(1e-3, 0.08), (1e-3, 0.1), (4e-3, 0.2), (1e-3, 0.2)])
def test_whoever_may_not_join_a_long_step_goes_where_none_waits(token_s: float, decode_s: float) -> None:
    # What shares a step is to be done in 0.15 s.
    assert places(a_fleet(token_s, decode_s), *"rst") == ["a", "b", "c"]


def test_before_anything_was_measured_nothing_is_shared() -> None:
    assert places(a_fleet(0.0), *"rst") == ["a", "b", "c"]


@pytest.mark.parametrize("token_s", [1e-4, 1e-3])
def test_an_idle_worker_comes_before_a_shared_step(token_s: float) -> None:
    core = a_fleet(token_s)
    assert places(core, "r") == ["a"]
    core.step([joined("idle", free=9000)], 0.1)
    assert places(core, "s") == ["idle"]
