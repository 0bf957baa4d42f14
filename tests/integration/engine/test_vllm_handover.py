"""Prompts computed by one vLLM and gone on with by another, through its KV connectors."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bucketserve.core.errors import EngineError, ModelLoadError
from bucketserve.core.types import FinishReason, RequestId
from bucketserve.ports import Engine, Sampling, SequenceSpec, StepOutput
from tests.contract.engine.test_engine import drain, tokens_of
from tests.integration.engine import connectors

pytestmark = pytest.mark.vllm

DEMO = str(Path(__file__).resolve().parents[3] / "models" / "demo" / "model")
RANDOM = Sampling(temperature=0.9, top_k=50, seed=11)
SAMPLINGS = {
    "greedy": Sampling(),
    "seeded": RANDOM,
    "penalised": Sampling(presence_penalty=0.5, frequency_penalty=1.5, logit_bias=((7, 2.0), (9, -100.0))),
}
LOADED: list[Engine] = []


def load(connector: dict[str, object] | None = None, **settings) -> Engine:
    known = {"context_tokens": 512, "kv_budget_tokens": 2048, "max_step_tokens": 64, "max_sequences": 16}
    LOADED.append(connectors.load(connector, model=DEMO, **(known | settings)))
    return LOADED[-1]


@pytest.fixture(scope="module")
def together() -> Iterator[Engine]:
    """What does both halves. All engines are closed together: the first one to close ends process groups of all."""
    yield load()
    while LOADED:
        LOADED.pop().close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def pair(folder: Path, together: Engine) -> tuple[Engine, Engine]:
    connector = connectors.folder(folder, wait_s=0.2)
    return load(connector), load(connector)


def spec(name: str, num_tokens: int = 20, max_new_tokens: int = 8, **more) -> SequenceSpec:
    rng = random.Random(f"{name}{num_tokens}")
    token_ids = more.pop("token_ids", tuple(rng.randrange(8, 380) for _ in range(num_tokens)))
    return SequenceSpec(request_id=RequestId(name), token_ids=token_ids, max_new_tokens=max_new_tokens, **more)


def alone(engine: Engine, *specs: SequenceSpec) -> dict[str, list[int]]:
    engine.add(specs)
    return tokens_of(drain(engine))


def prefill(engine: Engine, *specs: SequenceSpec) -> dict[str, tuple[list[int], bytes]]:
    """Returns the token and the handle of each."""
    engine.add([replace(one, hands_over=True) for one in specs])
    found: dict[str, tuple[list[int], bytes]] = {}
    while len(found) < len(specs):
        output = engine.step()
        for name in output.prefilled:
            handle = engine.hand_over(name)
            assert handle is not None
            found[name] = tokens_of([output])[name], handle
    # Connectors send in the steps that follow.
    engine.step()
    return found


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_outputs_are_those_of_one_engine_that_does_both(
    pair: tuple[Engine, Engine], together: Engine, sampling: Sampling
) -> None:
    source, target = pair
    free = source.headroom().kv_free_tokens
    # Within a block, whole blocks, over several steps.
    specs = [
        spec(f"{sampling.seed} {n}", n, 12, sampling=sampling, num_logprobs=n % 3 or None)
        for n in (1, 2, 31, 32, 33, 64, 65, 200)
    ]
    came = prefill(source, *specs)
    other = spec(f"beside {sampling}", 50, 30, sampling=RANDOM)
    target.add([other])
    history = [target.step()]
    for one in specs:
        target.take_over(one, *came[one.request_id])
    history += drain(target)
    found = tokens_of(history)
    assert {one.request_id: came[one.request_id][0] + found[one.request_id] for one in specs} == alone(together, *specs)
    assert found[other.request_id] == alone(together, other)[other.request_id]
    # One prompt token of each was computed: the last one.
    samples = [output.sample for output in history if output.sample is not None]
    assert sum(sample.prefill_tokens for sample in samples) == 50 + len(specs)
    assert not [name for output in history for name in output.prefilled if name != other.request_id]
    for output in history:
        for token in output.tokens:
            number = next((one.num_logprobs for one in specs if one.request_id == token.request_id), None)
            assert (token.logprobs is None) == (number is None)
            assert token.logprobs is None or len(token.logprobs.top) == number
    # Nothing stays taken once it has been fetched.
    drain(source)
    assert source.headroom().kv_free_tokens == free


def test_what_was_computed_stays_in_memory_until_it_is_fetched(pair: tuple[Engine, Engine], together: Engine) -> None:
    source, target = pair
    free = source.headroom().kv_free_tokens
    one = spec("held", 100, 5)
    came = prefill(source, one)["held"]
    for _ in range(5):
        assert source.has_work()
        assert source.step() == StepOutput()
    assert source.headroom().kv_free_tokens == free - 4 * connectors.BLOCK
    target.take_over(one, *came)
    assert came[0] + tokens_of(drain(target))["held"] == alone(together, one)["held"]
    drain(source)
    assert source.headroom().kv_free_tokens == free


@pytest.mark.parametrize("phase", ["loading", "decoding"])
def test_who_leaves_while_its_kv_comes_leaves_nothing(pair: tuple[Engine, Engine], folder: Path, phase: str) -> None:
    source, target = pair
    free = source.headroom().kv_free_tokens, target.headroom().kv_free_tokens
    one = spec(f"leaves {phase}", 100, 50)
    came = prefill(source, one)[one.request_id]
    target.take_over(one, *came)
    if phase == "decoding":
        while not tokens_of([target.step()]):
            pass
    target.cancel([one.request_id])
    assert not tokens_of([*drain(target), *drain(source)])
    assert (source.headroom().kv_free_tokens, target.headroom().kv_free_tokens) == free
    assert not list(folder.iterdir())


def test_kv_that_does_not_come_fails_its_sequence_alone(
    pair: tuple[Engine, Engine], folder: Path, together: Engine
) -> None:
    source, target = pair
    free = target.headroom().kv_free_tokens
    lost, good = spec("lost", 100, 9), spec("good", 90, 9)
    came = prefill(source, lost, good)
    name = json.loads(came["lost"][1])["params"]["remote_request_id"]
    (folder / name).unlink()
    for one in (lost, good):
        target.take_over(one, *came[one.request_id])
    history = drain(target)
    failures = [failure for output in history for failure in output.failures]
    assert [(failure.request_id, failure.is_retryable) for failure in failures] == [("lost", True)]
    assert came["good"][0] + tokens_of(history)["good"] == alone(together, good)["good"]
    assert "lost" not in tokens_of(history)
    assert target.headroom().kv_free_tokens == free
    drain(source)
    # It begins anew, and no trace of what was to come is found.
    assert alone(target, lost) == alone(together, lost)


def test_kv_for_which_a_connector_waits_for_ever_is_given_up(
    pair: tuple[Engine, Engine], folder: Path, together: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = pair
    target = load(connectors.folder(folder, wait_s=3.0))
    free = target.headroom().kv_free_tokens
    lost, good = spec("waits", 100, 9), spec("comes", 90, 9)
    came = prefill(source, lost, good)
    (folder / json.loads(came["waits"][1])["params"]["remote_request_id"]).unlink()
    monkeypatch.setattr("bucketserve.engine.vllm.FETCH_S", 0.5)
    for one in (lost, good):
        target.take_over(one, *came[one.request_id])
    history = drain(target)
    failures = [failure for output in history for failure in output.failures]
    assert [(failure.request_id, failure.is_retryable) for failure in failures] == [("waits", True)]
    assert "has not come in" in failures[0].message
    assert came["comes"][0] + tokens_of(history)["comes"] == alone(together, good)["comes"]
    assert target.headroom().kv_free_tokens == free
    drain(source)
    assert alone(target, lost) == alone(together, lost)


@pytest.mark.parametrize("sampling", [Sampling(), RANDOM], ids=["greedy", "seeded"])
@pytest.mark.parametrize("stale", ["other prompt's", "nothing", "not finite"])
def test_kv_of_another_prompt_is_noticed_and_forgotten(
    pair: tuple[Engine, Engine], folder: Path, together: Engine, sampling: Sampling, stale: str
) -> None:
    import torch

    source, target = pair
    free = target.headroom().kv_free_tokens
    mine = spec(f"mine {stale} {sampling.seed}", 100, 9, sampling=sampling)
    other = spec(f"other {stale} {sampling.seed}", 100, 9)
    came = prefill(source, mine, other)
    paths = [folder / json.loads(handle)["params"]["remote_request_id"] for _, handle in came.values()]
    kv = torch.load(paths[1])
    if stale != "other prompt's":
        kv = {name: torch.full_like(each, 0.0 if stale == "nothing" else float("nan")) for name, each in kv.items()}
    torch.save(kv, paths[0])
    target.take_over(mine, *came[mine.request_id])
    history = drain(target)
    assert not tokens_of(history)
    (failure,) = [failure for output in history for failure in output.failures]
    assert (failure.request_id, failure.is_retryable) == (mine.request_id, True)
    assert target.headroom().kv_free_tokens == free
    # Nor does anybody who has that prompt find it.
    again = replace(mine, request_id=RequestId("again"))
    assert alone(target, again) == alone(together, again)
    paths[1].unlink()
    drain(source)


@pytest.mark.parametrize("stale", ["other prompt's", "not finite"])
def test_nobody_goes_on_with_kv_that_is_not_proved(
    pair: tuple[Engine, Engine], folder: Path, together: Engine, stale: str
) -> None:
    import torch

    source, target = pair
    free = target.headroom().kv_free_tokens
    # Whole blocks, and one that is whole with the token that is computed here.
    for num_tokens in (100, 4 * connectors.BLOCK):
        salt = stale.encode()
        mine, other = (spec(whose, num_tokens, 9, prefix_salt=salt) for whose in ("shared", "stranger"))
        came = prefill(source, mine, other)
        paths = [folder / json.loads(came[one.request_id][1])["params"]["remote_request_id"] for one in (mine, other)]
        kv = torch.load(paths[1])
        if stale == "not finite":
            kv = {name: torch.full_like(each, float("nan")) for name, each in kv.items()}
        torch.save(kv, paths[0])
        target.take_over(mine, *came[mine.request_id])
        history = [target.step()]
        # They begin when it has come, and is not tried yet.
        token_ids = {"same": mine.token_ids, "last": mine.token_ids, "longer": (*mine.token_ids, 5, 6, 7)}
        sharing = [
            spec(name, token_ids=ids, max_new_tokens=1 if name == "last" else 9, prefix_salt=salt)
            for name, ids in token_ids.items()
        ]
        target.add(sharing)
        history += drain(target)
        failures = [failure for output in history for failure in output.failures]
        assert [(failure.request_id, failure.is_retryable) for failure in failures] == [(mine.request_id, True)]
        assert tokens_of(history) == alone(together, *sharing)
        # Nor does what they left lead anybody to it.
        again = [replace(one, request_id=RequestId(f"again {one.request_id}")) for one in sharing]
        assert alone(target, *again) == alone(together, *again)
        assert target.headroom().kv_free_tokens == free
        paths[1].unlink()
        drain(source)


def test_what_came_and_was_proved_is_found_by_its_prompt(pair: tuple[Engine, Engine], together: Engine) -> None:
    source, target = pair
    one = spec("reused", 100, 3)
    came = prefill(source, one)["reused"]
    target.take_over(one, *came)
    drain(target)
    again = replace(one, request_id=RequestId("reusing"))
    target.add([again])
    history = drain(target)
    assert tokens_of(history) == alone(together, again)
    assert {token.cached_prompt_tokens for output in history for token in output.tokens} == {3 * connectors.BLOCK}
    drain(source)


def test_a_step_is_the_prompts_own_while_kv_is_on_its_way(
    pair: tuple[Engine, Engine], folder: Path, together: Engine
) -> None:
    source, _ = pair
    target = load(connectors.folder(folder))
    one, prompt = spec("on its way", 100, 5), spec("beside", 63 + 3 * 64, 2)
    came = prefill(source, one)["on its way"]
    path = folder / json.loads(came[1])["params"]["remote_request_id"]
    away = path.rename(path.with_suffix(".away"))
    target.take_over(one, *came)
    target.add([prompt], 16)
    history = [target.step() for _ in range(4)]
    # All but the token that might have been computed had there been no KV to fetch; no chunks, for nobody decodes.
    assert [output.sample.prefill_tokens for output in history if output.sample is not None] == [63, 64, 64, 64]
    assert all(output.sample.decode_sequences == 0 for output in history if output.sample is not None)
    away.rename(path)
    history += drain(target)
    found = tokens_of(history)
    assert found["beside"] == alone(together, prompt)["beside"]
    assert came[0] + found["on its way"] == alone(together, one)["on its way"]
    drain(source)


def test_a_handle_that_is_none_or_another_s_is_refused(pair: tuple[Engine, Engine]) -> None:
    source, target = pair
    before = target.headroom()
    one = spec("refused", 40, 5, prefix_salt=b"one")
    token, handle = prefill(source, one)["refused"]
    plain = json.loads(handle)
    others = [
        replace(one, token_ids=one.token_ids[:-1]),
        replace(one, token_ids=(*one.token_ids[:-1], 5)),
        replace(one, prefix_salt=b"other"),
    ]
    for other in others:
        with pytest.raises(EngineError, match="not of this prompt's KV"):
            target.take_over(other, token, handle)
    wrong = [
        b"",
        b"\xff",
        b"[" * 100_000,
        b"null",
        b"[]",
        handle[:-1],
        *(json.dumps(plain | change).encode() for change in ({"params": 3}, {"logprob": float("nan")}, {"source": 1})),
        json.dumps({name: plain[name] for name in ("source", "prompt", "logprob")}).encode(),
    ]
    for data in wrong:
        with pytest.raises(EngineError, match="no handle"):
            target.take_over(one, token, data)
    for generated in ([], [*token, 5], [-1], [10**9]):
        with pytest.raises(EngineError):
            target.take_over(one, generated, handle)
    assert target.headroom() == replace(before, num_decode_steps=target.headroom().num_decode_steps)
    target.take_over(one, token, handle)
    with pytest.raises(EngineError, match="already here"):
        target.take_over(one, token, handle)
    with pytest.raises(EngineError, match="already here"):
        target.add([one])
    assert len(tokens_of(drain(target))["refused"]) == 4
    drain(source)


def test_only_what_is_to_be_handed_over_and_goes_on_is(pair: tuple[Engine, Engine]) -> None:
    source, _ = pair
    stays, ends, stops = spec("stays", 10, 3), spec("ends", 10, 1, hands_over=True), spec("stops", 33, 9)
    (token,), _ = prefill(source, replace(stops, request_id=RequestId("first")))["first"]
    source.add([stays, ends, replace(stops, hands_over=True, stop_token_ids=frozenset({token}))])
    found: dict[str, FinishReason] = {}
    while len(found) < 3:
        output = source.step()
        for name in ("stays", "ends", "stops", "nobody"):
            with pytest.raises(EngineError, match="not here"):
                source.hand_over(RequestId(name))
        found |= {each.request_id: each.finish_reason for each in output.tokens if each.finish_reason is not None}
    assert found == {"stays": FinishReason.LENGTH, "ends": FinishReason.LENGTH, "stops": FinishReason.STOP}
    for refused in (source.export_kv, lambda name, kv: source.import_kv(stays, [1], kv)):
        with pytest.raises(EngineError, match="not as bytes"):
            refused(RequestId("stays"), memoryview(bytearray(10)))


def test_an_engine_goes_on_with_what_it_computed_itself(together: Engine, folder: Path) -> None:
    one, two = spec("own", 100, 9, sampling=RANDOM), spec("small", 3, 9)
    engine = load(connectors.folder(folder))
    came = prefill(engine, one, two)
    for each in (one, two):
        engine.take_over(each, *came[each.request_id])
    history: list[StepOutput] = []
    while engine.headroom().num_running:
        history.append(engine.step())
    found = tokens_of(history)
    assert {name: token + found[name] for name, (token, _) in came.items()} == alone(together, one, two)
    for path in folder.iterdir():
        path.unlink()
    drain(engine)


def test_there_is_room_for_kv_that_comes_or_it_is_refused(pair: tuple[Engine, Engine], folder: Path) -> None:
    source, _ = pair
    small = load(connectors.folder(folder), kv_budget_tokens=6 * connectors.BLOCK, context_tokens=6 * connectors.BLOCK)
    handed = spec("handed", 90, 20)
    token, handle = prefill(source, handed)["handed"]
    small.add([replace(spec("other", 115, 40), num_preemptions=2)])
    small.step()
    with pytest.raises(EngineError, match="no room"):
        small.take_over(handed, token, handle)
    with pytest.raises(EngineError, match="no room"):
        small.take_over(replace(handed, max_new_tokens=300), token, handle)
    small.cancel([RequestId("other")])
    small.add([spec("goes", 115, 40)])
    small.step()
    small.take_over(handed, token, handle)
    history = drain(small)
    assert [name for output in history for name in output.preempted] == ["goes"]
    assert len(tokens_of(history)["handed"]) == 19
    drain(source)


def test_there_is_no_room_in_what_is_kept_for_others(
    pair: tuple[Engine, Engine], folder: Path, together: Engine
) -> None:
    source, target = pair
    small = load(connectors.folder(folder), kv_budget_tokens=6 * connectors.BLOCK, context_tokens=6 * connectors.BLOCK)
    kept, handed, runs = spec("kept", 100, 20), spec("coming", 90, 20), spec("runs", 20, 20)
    to_fetch, came = prefill(small, kept)["kept"], prefill(source, handed)["coming"]
    assert small.headroom().kv_free_tokens == 2 * connectors.BLOCK
    small.add([runs])
    history = [small.step()]
    with pytest.raises(EngineError, match="no room"):
        small.take_over(handed, *came)
    # Nobody was let go in vain.
    while small.headroom().num_running:
        history.append(small.step())
    assert not any(output.preempted for output in history)
    assert tokens_of(history) == alone(together, runs)
    target.take_over(kept, *to_fetch)
    drain(target)
    drain(small)
    small.take_over(handed, *came)
    assert came[0] + tokens_of(drain(small))["coming"] == alone(together, handed)["coming"]
    drain(source)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_vllm_s_example_connector_hands_over_too(together: Engine, tmp_path: Path, sampling: Sampling) -> None:
    # It saves a prompt in one step only, and whole blocks.
    source, target = (load(connectors.example(tmp_path), max_step_tokens=512) for _ in range(2))
    specs = [spec(f"example {n}", n, 12, sampling=sampling) for n in (20, 50, 100, 200)]
    came = prefill(source, *specs)
    for one in specs:
        target.take_over(one, *came[one.request_id])
    history = drain(target)
    found = tokens_of(history)
    assert {one.request_id: came[one.request_id][0] + found[one.request_id] for one in specs} == alone(together, *specs)
    computed = sum(output.sample.prefill_tokens for output in history if output.sample is not None)
    assert computed == 20 + (50 - 32) + (100 - 96) + (200 - 192)
    # What is not there any more is computed.
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    gone = [replace(one, request_id=RequestId(f"gone {one.request_id}"), prefix_salt=b"new") for one in specs]
    came = prefill(source, *gone)
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for one in gone:
        target.take_over(one, *came[one.request_id])
    found = tokens_of(drain(target))
    assert {one.request_id: came[one.request_id][0] + found[one.request_id] for one in gone} == alone(together, *gone)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv_role": "kv_producer"}, "the kv_role kv_both"),
        ({"kv_connector": None, "kv_role": None}, "names a kv_connector"),
        ({"kv_load_failure_policy": "recompute"}, "kv_load_failure_policy fail"),
        ({"kv_connector": "Nowhere", "kv_connector_module_path": None}, "Nowhere"),
        ({"no_such": 1}, "no_such"),
    ],
    ids=str,
)
def test_a_connector_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(ModelLoadError, match=said):
        load(connectors.folder(tmp_path) | change)


def test_the_example_connector_is_refused_where_there_are_adapters(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="finds KV by the prompt alone"):
        load(connectors.example(tmp_path), max_adapters=1)
