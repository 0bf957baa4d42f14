"""Switching roles, on literal events."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bucketserve.core.messages import (
    BatchPrefilled,
    DispatchBatch,
    KvPulled,
    PullKv,
    RequestSubmitted,
    SwitchRole,
    WorkerLost,
)
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings, EdgeRule
from bucketserve.core.types import Batch, StepSample, WorkerId, WorkerRole
from tests.builders import a_request, finished, joined, reported

pytestmark = pytest.mark.usefixtures("all_that_may_be_is_expected", "sides_change_soon")

SLOW_STEPS = tuple(StepSample(prefill_tokens=n, duration_s=0.01 * n) for n in (10, 50, 100, 200, 30, 70))


@pytest.fixture
def sides_change_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bucketserve.core.roles.HOLD_S", 2.0)
    monkeypatch.setattr("bucketserve.core.roles.COOLDOWN_S", 10.0)


def world(prefill: int, decode: int, **more) -> SchedulerCore:
    settings = CoreSettings(**{"edges": EdgeRule.NONE, "switch_roles": True, **more})
    core = SchedulerCore(settings, 4096)
    workers = [replace(joined(f"p{i}", free=2000), role=WorkerRole.PREFILL) for i in range(prefill)]
    workers += [replace(joined(f"d{i}", free=2000), role=WorkerRole.DECODE) for i in range(decode)]
    core.step([*workers, reported("p0", free=2000, total=2000, steps=SLOW_STEPS)], 0.0)
    return core


def switches(core: SchedulerCore, now_s: float) -> list[tuple[str, WorkerRole]]:
    return [(c.worker_id, c.role) for c in core.step([], now_s).commands if isinstance(c, SwitchRole)]


def flood(core: SchedulerCore, number: int, now_s: float, prompt: int = 400, ttft_slo_s: float = 100.0) -> list[Batch]:
    requests = [
        RequestSubmitted(a_request(f"r{now_s}-{i}", prompt, 100, now_s, ttft_slo_s=ttft_slo_s)) for i in range(number)
    ]
    return [c.batch for c in core.step(requests, now_s).commands if isinstance(c, DispatchBatch)]


def test_a_decode_worker_joins_a_prefill_side_that_stays_short() -> None:
    core = world(1, 2)
    flood(core, 10, 1.0)
    # 4,000 prompt tokens at 10 ms each are 40 s of work, and nothing decodes; but it must last.
    assert switches(core, 1.5) == switches(core, 2.0) == switches(core, 2.9) == []
    commands = core.step([], 4.0).commands
    assert [c for c in commands if isinstance(c, SwitchRole)] == [SwitchRole(WorkerId("d0"), WorkerRole.PREFILL)]
    # It takes prompts at once.
    assert {c.batch.worker_id for c in commands if isinstance(c, DispatchBatch)} == {WorkerId("d0")}
    # The last decode worker stays, for how long the shortage may last.
    assert not any(switches(core, 5.0 + i) for i in range(40))


def test_prompts_that_are_late_already_say_that_prefill_is_short() -> None:
    core = world(1, 2)
    # The prefill worker is full, and soon nobody is in time any more.
    core.step([reported("p0", free=0, total=2000)], 0.9)
    assert flood(core, 10, 1.0, ttft_slo_s=0.5) == []
    assert not any(switches(core, 1.0 + 0.5 * i) for i in range(1, 4))
    assert switches(core, 4.0) == [("d0", WorkerRole.PREFILL)]


def test_nothing_switches_unless_it_is_asked_for_or_if_the_shortage_does_not_last() -> None:
    fixed = world(1, 2, switch_roles=False)
    flood(fixed, 10, 1.0)
    assert not any(switches(fixed, 2.0 + i) for i in range(20))
    core = world(1, 2)
    for i in range(10):
        # A shortage that comes and goes before it has lasted for two seconds.
        now_s = 10.0 * (i + 1)
        (batch, *_) = flood(core, 1, now_s)
        assert switches(core, now_s + 1.0) == []
        done = BatchPrefilled(worker_id=batch.worker_id, assignment=batch.assignment, request_ids=batch.request_ids)
        ends = [finished(request_id, "p0", batch.assignment) for request_id in batch.request_ids]
        report = reported("p0", free=2000, total=2000, last_assignment=batch.assignment)
        core.step([done, *ends, report], now_s + 1.6)
        assert switches(core, now_s + 3.0) == []


def test_a_prefill_worker_joins_a_decode_side_that_has_no_room() -> None:
    core = world(2, 1)
    moves = 0
    for i in range(6):
        for batch in flood(core, 1, 1.0 + i / 10, prompt=350):
            ids = batch.request_ids
            held = BatchPrefilled(worker_id=batch.worker_id, assignment=batch.assignment, request_ids=ids, held=ids)
            report = reported(batch.worker_id, free=2000, total=2000, last_assignment=batch.assignment)
            moved = [c for c in core.step([held, report], 1.05 + i / 10).commands if isinstance(c, PullKv)]
            for move in moved:
                moves += 1
                done = KvPulled(
                    request_id=move.request_id,
                    assignment=move.assignment,
                    target_id=WorkerId("d0"),
                    is_ok=True,
                )
                full = reported("d0", free=2000 - 450 * moves, total=2000, num_running=moves)
                core.step([full, done], 1.07 + i / 10)
    # Four of 450 tokens fit into 90% of 2,000; two wait where they are.
    assert moves == 4
    assert switches(core, 2.0) == []
    (switch,) = switches(core, 5.0)
    assert switch[1] is WorkerRole.DECODE
    # What waited goes to it.
    assert core.status().num_running == 6


def test_the_last_decode_worker_of_a_fingerprint_stays() -> None:
    core = SchedulerCore(CoreSettings(edges=EdgeRule.NONE, switch_roles=True), 4096)
    workers = [
        replace(joined(name, free=2000), role=role, fingerprint=fingerprint)
        for name, role, fingerprint in (
            ("p0", WorkerRole.PREFILL, "old"),
            ("d0", WorkerRole.DECODE, "old"),
            ("p1", WorkerRole.PREFILL, "new"),
            ("d1", WorkerRole.DECODE, "new"),
        )
    ]
    core.step([*workers, reported("p0", free=2000, total=2000, steps=SLOW_STEPS)], 0.0)
    flood(core, 30, 1.0)
    assert not any(switches(core, 2.0 + i) for i in range(20))
    # With another of its weights one may go, and not one of the others.
    more = replace(joined("d2", free=2000), role=WorkerRole.DECODE, fingerprint="new")
    commands = [command for i in range(20) for command in core.step([more] if not i else [], 22.0 + i).commands]
    assert [c for c in commands if isinstance(c, SwitchRole)] == [SwitchRole(WorkerId("d1"), WorkerRole.PREFILL)]


def test_weights_that_have_lost_one_side_get_it_from_the_other() -> None:
    core = world(3, 1)
    core.step([replace(joined("old-d", free=2000), role=WorkerRole.DECODE, fingerprint="old")], 0.5)
    core.step([WorkerLost(WorkerId("d0"))], 1.0)
    # A worker that is only away for a moment comes back.
    assert switches(core, 1.5) == switches(core, 2.5) == []
    assert switches(core, 4.0) == [("p0", WorkerRole.DECODE)]
    assert not any(switches(core, 5.0 + i) for i in range(40))
