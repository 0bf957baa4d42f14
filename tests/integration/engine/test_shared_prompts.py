"""Prompts that begin alike and come together: what they share is computed once, and nobody waits for it in vain."""

from __future__ import annotations

import math
import random

import pytest

from bucketserve.core.types import RequestId
from bucketserve.engine.kv_memory import PAGE_TOKENS
from bucketserve.ports import Sampling, StepOutput
from tests.integration.engine.models import engine, generate
from tests.integration.engine.test_equality import drain, one_thread, prompt, spec  # noqa: F401
from tests.integration.engine.test_growth import Load

pytestmark = pytest.mark.engine
SHARED = prompt(8 * PAGE_TOKENS)


def finish(load: Load) -> list[StepOutput]:
    """Runs everything to its end and checks each output against generate."""
    history = []
    while load.engine.has_work():
        history.append(load.step())
    for name, whole in load.whole.items():
        if name not in load.open:
            assert load.outputs[name] == generate("llama", list(whole.token_ids), whole.max_new_tokens), name
    return history


def num_computed(history: list[StepOutput]) -> int:
    return sum(output.sample.prefill_tokens for output in history if output.sample is not None)


@pytest.mark.parametrize("step_tokens", [16, 48, 100, 512])
@pytest.mark.parametrize("num_shared", [len(SHARED), len(SHARED) - 7])
def test_what_prompts_share_is_computed_once_though_they_come_together(step_tokens: int, num_shared: int) -> None:
    load = Load(engine("llama", max_step_tokens=step_tokens))
    for i in range(6):
        load.add(spec(f"r{i}", [*SHARED[:num_shared], *prompt(5 + i, seed=i)], 8))
    computed = num_computed(finish(load))
    known = num_shared // PAGE_TOKENS * PAGE_TOKENS
    assert computed == num_shared + sum(5 + i for i in range(6)) + 5 * (num_shared - known)
    headroom = load.engine.headroom()
    assert headroom.num_prefix_reused_tokens == 5 * known


def test_pages_that_are_computed_meanwhile_are_there_once() -> None:
    load = Load(engine("llama", max_step_tokens=64))
    for i in range(6):
        load.add(spec(f"r{i}", [*SHARED, 5 + i], 40))
    while load.engine.headroom().num_running < 6:
        load.step()
    headroom = load.engine.headroom()
    assert headroom.kv_total_tokens - headroom.kv_free_tokens == len(SHARED) + 6 * PAGE_TOKENS
    finish(load)


def test_without_a_prefix_cache_nobody_waits_for_anybody() -> None:
    load = Load(engine("llama", max_step_tokens=512, prefix_cache=False))
    for i in range(2):
        load.add(spec(f"r{i}", [*SHARED, 5 + i], 3))
    first = load.step()
    assert first.sample is not None
    assert first.sample.prefill_tokens == 512
    assert num_computed(finish(load)) == 2 * (len(SHARED) + 1) - 512


def test_tenants_share_nothing() -> None:
    load = Load(engine("llama", max_step_tokens=100))
    for i in range(4):
        load.add(spec(f"r{i}", [*SHARED, 5 + i], 3, prefix_salt=(b"a", b"b")[i % 2]))
    assert num_computed(finish(load)) == 2 * len(SHARED) + 4


def test_a_short_prompt_does_not_wait_for_a_long_one_that_begins_alike() -> None:
    load = Load(engine("llama", max_step_tokens=64))
    load.add(spec("first", prompt(900, seed=1), 3))
    load.add(spec("long", [*SHARED, *prompt(600, seed=2)], 3))
    load.add(spec("short", [*SHARED[:PAGE_TOKENS], *prompt(8, seed=3)], 3))
    order = [str(name) for output in finish(load) for name in output.prefilled]
    assert order == ["short", "first", "long"]


@pytest.mark.parametrize("how", ["cancelled", "let go"])
def test_others_go_on_when_whoever_computed_for_them_is_gone(how: str) -> None:
    load = Load(engine("llama", max_step_tokens=48))
    for i in range(4):
        load.add(spec(f"r{i}", [*SHARED, 5 + i], 6))
    load.step()
    load.step()
    if how == "cancelled":
        load.cancel(RequestId("r0"))
        del load.whole[RequestId("r0")]
    else:
        load.order_to_go([RequestId("r0")])
    assert 96 + num_computed(finish(load)) == len(SHARED) + (3 if how == "cancelled" else 4)


def test_who_took_kv_that_is_not_finite_is_computed_anew() -> None:
    under_test = engine("llama", max_step_tokens=48)
    requests = [spec(f"r{i}", [*SHARED, 5 + i], 6) for i in range(3)]
    under_test.add(requests)
    under_test.step()
    memory = under_test._table.space.memory
    memory.values[0][:, :PAGE_TOKENS] = math.nan
    failures = [failure for output in drain(under_test, {}) for failure in output.failures]
    # The first one, which computed it, has itself to blame.
    assert {failure.request_id: failure.is_retryable for failure in failures} == {"r0": False, "r1": True, "r2": True}
    under_test.check_integrity()
    outputs: dict[str, list[int]] = {}
    under_test.add(requests[1:])
    drain(under_test, outputs)
    assert outputs == {one.request_id: generate("llama", list(one.token_ids), 6) for one in requests[1:]}


@pytest.mark.parametrize("seed", range(4))
def test_random_ones_give_the_tokens_of_generate(seed: int) -> None:
    rng = random.Random(seed)
    load = Load(
        engine("llama", max_step_tokens=rng.choice((16, 40, 64, 200)), kv_budget_tokens=rng.choice((640, 2000)))
    )
    for i in range(12):
        cut = rng.choice((0, 20, 32, 33, 64, 150, 256))
        token_ids = [*SHARED[:cut], *prompt(rng.choice((1, 3, 31, 32, 40)), seed=rng.randrange(3))]
        load.add(spec(f"r{i}", token_ids, rng.choice((2, 9, 20)), sampling=Sampling()), rng.choice((0, 16, 48)))
        for _ in range(rng.choice((0, 0, 0, 1, 3))):
            load.step()
    finish(load)
