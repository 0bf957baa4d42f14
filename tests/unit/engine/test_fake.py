"""KV that grows in the fake engine: who begins, who is let go, and what is never let go."""

from __future__ import annotations

from bucketserve.core.types import MAX_PREEMPTIONS, RequestId
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.ports import SequenceSpec, StepOutput


def an_engine(kv_tokens: int, **settings) -> FakeEngine:
    return FakeEngine(FakeSettings(kv_total_tokens=kv_tokens, **settings))


def spec(name: str, num_tokens: int, max_new_tokens: int, **more) -> SequenceSpec:
    return SequenceSpec(request_id=RequestId(name), token_ids=(7,) * num_tokens, max_new_tokens=max_new_tokens, **more)


def free(engine: FakeEngine) -> int:
    return engine.headroom().kv_free_tokens


def until_somebody_goes(engine: FakeEngine) -> StepOutput:
    while not (output := engine.step()).preempted:
        assert engine.has_work()
    return output


def test_kv_is_taken_as_it_is_used() -> None:
    engine = an_engine(1000)
    engine.add([spec("a", 100, 500)])
    assert free(engine) == 900
    frees = [engine.step() and free(engine) for _ in range(4)]
    # The prompt's step brings a token whose KV the next step computes.
    assert frees == [900, 899, 898, 897]
    # One that is not let go any more has all that it may use at once.
    engine.add([spec("b", 100, 200, num_preemptions=MAX_PREEMPTIONS)])
    assert free(engine) == 597
    engine.step()
    assert free(engine) == 596


def test_a_sequence_begins_only_if_others_can_grow_a_little() -> None:
    engine = an_engine(1000)
    engine.add([spec("first", 500, 400)])
    engine.step()
    engine.add([spec("large", 481, 10), spec("small", 10, 10)])
    engine.step()
    # 19 tokens would be left, of which the first one needs one now: 2% are wanted. Nobody passes it in the queue.
    assert (engine.headroom().num_running, engine.headroom().num_waiting) == (1, 2)
    engine.cancel([RequestId("large")])
    assert engine.step().prefilled == ("small",)
    # In an empty engine there is nobody to be spared.
    alone = an_engine(1000)
    alone.add([spec("whole", 990, 10)])
    assert len([alone.step() for _ in range(10)]) == 10
    assert not alone.has_work()


def test_one_whose_prompt_has_begun_goes_on_though_one_before_it_has_no_room_any_more() -> None:
    engine = an_engine(1000, max_step_tokens=64)
    engine.add([spec(f"d{i}", 10, 400) for i in range(6)])
    engine.step()
    # Half of each step goes to the first, the rest to the shortest. By the third step the others have grown too much
    # for the middle one, which has nothing yet.
    engine.add([spec("first", 400, 5), spec("middle", 404, 5), spec("last", 100, 5)])
    assert [engine.step().prefilled for _ in range(4)] == [(), (), (), ("last",)]
    assert engine.headroom().waiting_prefill_tokens == 404 + 400 - 4 * 29 - 16


def test_batch_class_goes_first_then_the_new_then_the_short() -> None:
    engine = an_engine(330)
    engine.add(
        [
            spec("kept", 10, 90, num_preemptions=MAX_PREEMPTIONS, is_batch=True),
            spec("old", 10, 200, num_preemptions=1),
            spec("long", 60, 200),
            spec("short", 30, 200),
            spec("batch", 90, 200, is_batch=True),
        ]
    )
    assert [until_somebody_goes(engine).preempted for _ in range(3)] == [("batch",), ("short",), ("long",)]


def test_as_many_go_as_the_step_needs_and_no_more() -> None:
    engine = an_engine(400)
    engine.add([spec(f"r{i}", 40, 60) for i in range(8)])
    output = until_somebody_goes(engine)
    # All have 50 tokens each and need 8 more. All are alike, and the last to begin goes.
    assert output.preempted == ("r7",)
    assert {token.request_id for token in output.tokens} == {f"r{i}" for i in range(7)}
    assert free(engine) == 400 - 7 * 51


def test_a_prompt_that_is_being_computed_is_let_go_as_well() -> None:
    engine = an_engine(300, max_step_tokens=7)
    engine.add([spec(f"r{i}", 40, 60) for i in range(3)])
    while engine.headroom().num_waiting:
        engine.step()
    engine.add([spec("long", 130, 10)])
    # It has computed less than the others have, and goes.
    assert until_somebody_goes(engine).preempted == ("long",)
    assert engine.headroom().num_waiting == 0


def test_what_may_not_be_let_go_always_fits() -> None:
    engine = an_engine(300)
    engine.add([spec("kept", 50, 200, num_preemptions=MAX_PREEMPTIONS), spec("other", 20, 100)])
    output = until_somebody_goes(engine)
    assert output.preempted == ("other",)
    # The next one of its kind begins when it has ended, since both together would not fit.
    engine.add([spec("next", 60, 100, num_preemptions=MAX_PREEMPTIONS)])
    ended: list[str] = []
    while engine.has_work():
        output = engine.step()
        assert not output.preempted
        assert not output.prefilled or ended == ["kept"]
        ended += [token.request_id for token in output.tokens if token.finish_reason is not None]
    assert ended == ["kept", "next"]
