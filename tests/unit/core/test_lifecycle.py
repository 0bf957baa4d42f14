"""States of a request, the steps between them, and the books that go with them."""

from __future__ import annotations

import itertools

import pytest

from bucketserve.core.errors import IllegalStepError
from bucketserve.core.fleet import Fleet
from bucketserve.core.lifecycle import NEXT_STATES, Life, Lifecycle, State
from bucketserve.core.settings import CoreSettings
from bucketserve.core.types import RequestId, WorkerId
from bucketserve.core.workers import WorkerState
from tests.builders import a_request, joined

W, D = WorkerId("w"), WorkerId("d")


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_only_the_steps_of_the_table_are_made(before: State, after: State) -> None:
    life = Life(a_request(), before)
    if after in NEXT_STATES[before]:
        life.go(after)
        assert life.state is after
    else:
        with pytest.raises(IllegalStepError, match=f"from {before.value} to {after.value}"):
            life.go(after)
        assert life.state is before


def test_every_state_can_end_and_the_end_is_final() -> None:
    assert all(State.ENDED in following for state, following in NEXT_STATES.items() if state is not State.ENDED)
    assert not NEXT_STATES[State.ENDED]


def world() -> tuple[Lifecycle, Fleet]:
    fleet = Fleet(CoreSettings())
    for event in (joined("w"), joined("d")):
        fleet.join(WorkerState.joined(event, fleet.outputs))
    return Lifecycle(fleet), fleet


def test_books_are_as_before_once_a_request_has_ended_wherever_it_was() -> None:
    for path in (["place"], ["place", "prefilled"], ["place", "hold", "pull"], ["place", "hold", "pull", "pulled"]):
        lives, fleet = world()
        request = a_request("r", 10, 30)
        lives.wait(request)
        life = lives.get(RequestId("r"))
        assert life is not None
        for step in path:
            match step:
                case "place":
                    fleet.get(W).take(request)
                    lives.place(life, W, 1)
                case "prefilled":
                    lives.prefilled(life)
                case "hold":
                    lives.hold(life)
                case "pull":
                    fleet.get(D).expect(request, 40)
                    lives.pull(life, D, 1)
                case "pulled":
                    assert lives.pulled(life) == W
        assert lives.num_at_workers == 1
        lives.end(life)
        assert (lives.num_at_workers, list(lives)) == (0, [])
        assert all(not worker.requests and not worker.incoming and not worker.kv.peak() for worker in fleet)
