"""Adapters in vLLM behind our port: as vLLM by itself computes them, beside each other and the model alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bucketserve.core.errors import EngineError, NoAdapterError
from bucketserve.core.types import RequestId
from bucketserve.engine.fingerprint import adapter_fingerprint
from bucketserve.ports import Adapter, Engine, Sampling, SequenceSpec
from tests.adapters import write_adapter
from tests.integration.engine.test_vllm import BLOCK, DEMO, LOADED, load, run, spec, tokens

pytestmark = pytest.mark.vllm

MOST = 3
PLAIN = ""
KEPT: list[object] = []


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """By name."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {name: write_adapter(folder / name, Path(DEMO), seed) for seed, name in enumerate("abcd")}
    return {name: Adapter(fingerprint=adapter_fingerprint(path), directory=path) for name, path in found.items()}


@pytest.fixture(scope="module")
def engine(adapters: dict[str, Adapter]) -> Iterator[Engine]:
    """With two adapters."""
    engine = load(max_adapters=MOST)
    for name in "ab":
        engine.load_adapter(adapters[name])
    yield engine
    while LOADED:
        LOADED.pop().close()


def of(name: str, adapter: Adapter | None, num_tokens: int = 40, max_new_tokens: int = 24, **more) -> SequenceSpec:
    fingerprint = PLAIN if adapter is None else adapter.fingerprint
    return spec(name, num_tokens, max_new_tokens, adapter=fingerprint, **more)


def test_outputs_are_vllm_s_own(engine: Engine, adapters: dict[str, Adapter]) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    prompts = [tuple(random.Random(i).randrange(8, 380) for _ in range(20 + 9 * i)) for i in range(6)]
    kinds = [None, adapters["a"], adapters["b"]] * 2
    specs = [of(f"{i}", kind, token_ids=prompts[i]) for i, kind in enumerate(kinds)]
    history = run(engine, *specs, chunk=16)
    found = [tokens(history, one.request_id) for one in specs]
    llm = LLM(
        DEMO,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_loras=2,
        max_model_len=512,
        kv_cache_memory_bytes=2**26,
        skip_tokenizer_init=True,
    )
    # The end of it would be that of vLLM's process groups, which the engine needs as well.
    KEPT.append(llm)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
    numbers = {adapter.fingerprint: i + 1 for i, adapter in enumerate(adapters.values())}
    wanted = [
        llm.generate(
            {"prompt_token_ids": list(prompt)},
            params,
            lora_request=kind and LoRARequest(kind.fingerprint, numbers[kind.fingerprint], str(kind.directory)),
            use_tqdm=False,
        )[0]
        for prompt, kind in zip(prompts, kinds, strict=True)
    ]
    assert found == [list(output.outputs[0].token_ids) for output in wanted]
    # Of an engine without adapters the model says the same, and it is of the same fingerprint.
    plain = load()
    assert plain.info.fingerprint == engine.info.fingerprint
    assert (plain.info.max_adapters, engine.info.max_adapters) == (0, MOST)
    alone = run(plain, *(one for one in specs if not one.adapter))
    assert [tokens(alone, name) for name in ("0", "3")] == [found[0], found[3]]


def test_each_says_what_it_says_alone(engine: Engine, adapters: dict[str, Adapter]) -> None:
    prompt = spec("prompt", 50).token_ids
    seeded = Sampling(temperature=0.9, top_k=50, seed=7)
    alone = {}
    for sampling in (Sampling(), seeded):
        for name, kind in (("plain", None), ("a", adapters["a"]), ("b", adapters["b"])):
            one = of(name, kind, token_ids=prompt, sampling=sampling)
            alone[name, sampling.seed] = tokens(run(engine, one), name)
    assert len({tuple(each) for each in alone.values()}) == 6
    kinds = {"plain": None, "a": adapters["a"], "b": adapters["b"]}
    specs = [
        of(f"{name} {seed}", kinds[name], token_ids=prompt, sampling=seeded if seed else Sampling())
        for name, seed in alone
    ]
    history = run(engine, *specs)
    assert {key: tokens(history, f"{key[0]} {key[1]}") for key in alone} == alone
    # Resumed, as after a worker was lost.
    resumed = [
        replace(
            one,
            request_id=RequestId(f"{one.request_id} again"),
            token_ids=(*prompt, *said[:9]),
            max_new_tokens=15,
            num_resumed_tokens=9,
        )
        for one, said in zip(specs, alone.values(), strict=True)
    ]
    history = run(engine, *resumed)
    assert [tokens(history, one.request_id) for one in resumed] == [said[9:] for said in alone.values()]


def test_no_kv_is_shared_between_adapters(engine: Engine, adapters: dict[str, Adapter]) -> None:
    prompt = tuple(range(100, 100 + 3 * BLOCK + 1))
    reused = {}
    # Of one salt: it is vLLM's own hash that tells them apart.
    for name, kind in (("a", adapters["a"]), ("b", adapters["b"]), ("plain", None), ("a again", adapters["a"])):
        history = run(engine, of(name, kind, token_ids=prompt, prefix_salt=b"t"))
        reused[name] = max(token.cached_prompt_tokens for output in history for token in output.tokens)
    assert reused == {"a": 0, "b": 0, "plain": 0, "a again": 3 * BLOCK}


def test_what_vllm_can_not_unload_now_is_here_still(
    engine: Any, adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> bool:
        raise RuntimeError(f"not {number}")

    engine.load_adapter(adapters["c"])
    wanted = tokens(run(engine, of("before", adapters["c"])), "before")
    with monkeypatch.context() as broken:
        broken.setattr(engine._vllm, "remove_lora", fail)
        with pytest.raises(EngineError, match="vLLM can't unload it"):
            engine.unload_adapter(adapters["c"].fingerprint)
    same = replace(of("after", adapters["c"]), token_ids=of("before", None).token_ids)
    assert tokens(run(engine, same), "after") == wanted
    assert engine.unload_adapter(adapters["c"].fingerprint)


def test_adapters_are_loaded_and_unloaded(engine: Engine, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    with pytest.raises(NoAdapterError):
        engine.add([of("unknown", adapters["c"])])
    assert not engine.has_work()
    engine.load_adapter(adapters["c"])
    engine.load_adapter(adapters["c"])
    with pytest.raises(EngineError, match="max_adapters"):
        engine.load_adapter(adapters["d"])
    wanted = tokens(run(engine, of("alone", adapters["c"])), "alone")
    engine.add([of("runs", adapters["c"], token_ids=of("alone", None).token_ids)])
    assert not engine.unload_adapter(adapters["c"].fingerprint)
    history = [engine.step(), engine.step()]
    assert not engine.unload_adapter(adapters["c"].fingerprint)
    while engine.has_work():
        history.append(engine.step())
    assert tokens(history, "runs") == wanted
    assert engine.unload_adapter(adapters["c"].fingerprint)
    assert engine.unload_adapter(adapters["c"].fingerprint)
    # What is not as vLLM wants it is refused in a sentence, takes no place, and harms nobody.
    large = write_adapter(tmp_path / "large", Path(DEMO), 9, rank=32)
    with pytest.raises(EngineError, match=r"vLLM can't serve it: .*rank"):
        engine.load_adapter(Adapter(fingerprint="large", directory=large))
    (tmp_path / "empty").mkdir()
    with pytest.raises(EngineError, match="vLLM can't serve it"):
        engine.load_adapter(Adapter(fingerprint="empty", directory=tmp_path / "empty"))
    manager = engine._vllm.model_executor.driver_worker.worker.model_runner.lora_manager  # type: ignore[attr-defined]
    assert len(manager.list_adapters()) == 2
    engine.load_adapter(adapters["d"])
    said = tokens(run(engine, of("alone", adapters["d"])), "alone")
    assert len(said) == 24
    assert said != wanted
    assert engine.unload_adapter(adapters["d"].fingerprint)
