"""Together or apart: what is tried, what is kept, and what is left alone; on literal events."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

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
from bucketserve.core.types import RequestClass, WorkerId, WorkerRole
from tests.builders import a_request, finished, joined, reported

WINDOW_S = 10.0


class World:
    """Two workers, or more; each request is served at once, as slowly as the layout of the moment makes it."""

    def __init__(self, num_workers: int = 2, keeps_kv: bool = False, **more: object) -> None:
        options = {"choose_layout": True, "layout_window_s": WINDOW_S, "layout_retry_s": 100.0, **more}
        self.core = SchedulerCore(CoreSettings(edges=EdgeRule.NONE, **options), 4096)
        self.roles = {f"w{i}": WorkerRole.BOTH for i in range(num_workers)}
        self.core.step([replace(joined(name, free=8000), keeps_kv=keeps_kv) for name in self.roles], 0.0)
        self.now_s = 0.0
        self.number = 0
        self.history: list[tuple[float, bool]] = []

    @property
    def is_apart(self) -> bool:
        return WorkerRole.PREFILL in self.roles.values()

    def run(self, seconds: float, *, together_s: float, apart_s: float, prompt: int = 100, **more: object) -> None:
        """One request every quarter of a second, with so many seconds per output token."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 0.25
            self.number += 1
            name = f"r{self.number}"
            tpot_s = apart_s if self.is_apart else together_s
            submitted = RequestSubmitted(a_request(name, prompt, 10, self.now_s, **more))
            self.serve(name, self.step([submitted], self.now_s), tpot_s)

    def serve(self, name: str, commands: list[object], tpot_s: float) -> None:
        (batch,) = [c.batch for c in commands if isinstance(c, DispatchBatch)]
        held = batch.request_ids if self.roles[batch.worker_id] is WorkerRole.PREFILL else ()
        done = BatchPrefilled(
            worker_id=batch.worker_id,
            assignment=batch.assignment,
            request_ids=batch.request_ids,
            held=held,
        )
        first_s, place, assignment = self.now_s + 0.02, batch.worker_id, batch.assignment
        report = reported(place, free=8000, total=8000, last_assignment=batch.assignment)
        for move in [c for c in self.step([done, report], first_s) if isinstance(c, PullKv)]:
            place, assignment = move.target_id, move.assignment
            moved = KvPulled(request_id=move.request_id, target_id=place, assignment=move.assignment, is_ok=True)
            self.step([moved, reported(place, free=8000, total=8000)], first_s)
        # Ends are in the future of the next arrival; the core only sees their times.
        ended = finished(batch.request_ids[0], place, assignment, output_tokens=10)
        self.step([ended], first_s + 9 * tpot_s)

    def step(self, events: list[object], now_s: float) -> list[object]:
        commands = list(self.core.step(events, now_s).commands)
        switches = [command for command in commands if isinstance(command, SwitchRole)]
        self.roles.update((switch.worker_id, switch.role) for switch in switches)
        if switches:
            self.history.append((now_s, self.is_apart))
        return commands


def test_the_better_layout_is_adopted_after_a_trial_between_two_windows() -> None:
    world = World()
    world.run(WINDOW_S * 5, together_s=0.2, apart_s=0.05)
    # One window together, one apart, one together, and apart from then on.
    assert [apart for _, apart in world.history] == [True, False, True]
    assert world.is_apart
    assert sorted(role.value for role in world.roles.values()) == ["decode", "prefill"]
    assert world.core.status().roles == world.roles
    before = len(world.history)
    # Everybody is served well now: nothing more is tried.
    world.run(WINDOW_S * 20, together_s=0.2, apart_s=0.02)
    assert len(world.history) == before


def test_a_layout_that_is_no_better_is_left_again_and_tried_less_and_less() -> None:
    world = World()
    world.run(WINDOW_S * 100, together_s=0.2, apart_s=0.19)
    assert not world.is_apart
    # Trials after 100, 200, 400 s of rest and so on, each of one window apart.
    trials = [at_s for at_s, is_apart in world.history if is_apart]
    rests = [later - earlier for earlier, later in pairwise(trials)]
    assert 3 <= len(trials) <= 5
    assert all(later > 1.5 * earlier for earlier, later in pairwise(rests))


def test_nobody_is_moved_while_all_are_served_well_or_if_it_is_not_asked_for() -> None:
    content = World()
    content.run(WINDOW_S * 20, together_s=0.03, apart_s=0.01)
    fixed = World(choose_layout=False)
    fixed.run(WINDOW_S * 20, together_s=0.5, apart_s=0.01)
    # Whoever waits on purpose says nothing about the layout.
    batch = World()
    batch.run(WINDOW_S * 20, together_s=0.5, apart_s=0.01, request_class=RequestClass.BATCH)
    # Nor do they whose engine hands no KV over.
    keeping = World(keeps_kv=True)
    keeping.run(WINDOW_S * 20, together_s=0.5, apart_s=0.01)
    assert content.history == fixed.history == batch.history == keeping.history == []


def test_another_mix_is_a_reason_to_try_again() -> None:
    world = World(layout_retry_s=10_000.0)
    world.run(WINDOW_S * 6, together_s=0.2, apart_s=0.2)
    tried = len(world.history)
    world.run(WINDOW_S * 10, together_s=0.2, apart_s=0.2)
    assert len(world.history) == tried
    world.run(WINDOW_S * 8, together_s=0.2, apart_s=0.05, prompt=400)
    assert world.is_apart


def test_bursts_are_not_another_mix() -> None:
    world = World(layout_retry_s=10_000.0)
    for prompt in (100, 300) * 4:
        world.run(WINDOW_S, together_s=0.2, apart_s=0.2, prompt=prompt)
    # The first window alone said little; from here on the mix is known.
    tried = len(world.history)
    for prompt in (100, 300) * 10:
        world.run(WINDOW_S, together_s=0.2, apart_s=0.2, prompt=prompt)
    assert len(world.history) == tried


def test_a_trial_without_requests_ends_where_it_began() -> None:
    world = World()
    world.run(WINDOW_S * 1.5, together_s=0.2, apart_s=0.05)
    assert world.is_apart
    world.step([], world.now_s + WINDOW_S * 5)
    assert not world.is_apart


@pytest.mark.parametrize("num_workers", [2, 3, 5])
def test_both_sides_always_have_a_worker_and_one_alone_does_everything(num_workers: int) -> None:
    world = World(num_workers)
    world.run(WINDOW_S * 5, together_s=0.2, apart_s=0.05)
    assert world.is_apart
    while len(world.roles) > 1:
        # The smaller side loses its workers first.
        roles = list(world.roles.values())
        rarer = min((WorkerRole.PREFILL, WorkerRole.DECODE), key=roles.count)
        gone = next(name for name, role in world.roles.items() if role is rarer)
        del world.roles[gone]
        world.step([WorkerLost(WorkerId(gone))], world.now_s)
        expected = {WorkerRole.PREFILL, WorkerRole.DECODE} if len(world.roles) > 1 else {WorkerRole.BOTH}
        assert set(world.roles.values()) == expected
    # One that joins takes the side that is short, once the layout is chosen again; until then it does everything.
    world.roles["new"] = WorkerRole.BOTH
    world.step([replace(joined("new", free=8000), role=WorkerRole.PREFILL)], world.now_s)
    assert set(world.roles.values()) == {WorkerRole.BOTH}


def test_prefill_and_decode_are_apart_within_one_fingerprint_only() -> None:
    world = World()
    world.run(60.0, together_s=0.2, apart_s=0.01)
    assert world.is_apart
    new = [replace(joined(name, free=8000), fingerprint="new") for name in ("x0", "x1")]
    # One alone does both: nobody of other weights could decode what it prefills.
    world.step(new[:1], world.now_s)
    assert world.core.status().roles["x0"] is WorkerRole.BOTH
    world.step(new[1:], world.now_s)
    roles = world.core.status().roles
    assert {roles["x0"], roles["x1"]} == {roles["w0"], roles["w1"]} == {WorkerRole.PREFILL, WorkerRole.DECODE}
    world.step([WorkerLost(WorkerId("w0"))], world.now_s)
    assert world.core.status().roles["w1"] is WorkerRole.BOTH
