"""Pools as `up --pool` takes them: what describes one, what describes none, and what doesn't go together."""

from __future__ import annotations

import json

import pytest

from bucketserve_cli.plan import StackSpec
from bucketserve_cli.pools import check_pools, parse_pool, pool_lines, pools_of, sources_of
from bucketserve_cli.terminal import InputError

ARGS = {"tensor_parallel_size": "2", "hf_overrides": '{"a": 1}'}


@pytest.mark.parametrize(
    ("text", "number", "settings"),
    [
        ("{}", 1, {}),
        ("workers=3", 3, {}),
        ("model_name=a,model=/m", 1, {"model_name": "a", "model": "/m"}),
        (" model=/a,b/c , role=decode,workers=64", 64, {"model": "/a,b/c", "role": "decode"}),
        ("engine=vllm,engine_args=" + json.dumps(ARGS), 1, {"engine": "vllm", "engine_args": json.dumps(ARGS)}),
        (json.dumps({"model_name": "a=b, c", "workers": "2"}), 2, {"model_name": "a=b, c"}),
        ("device=cuda:1,prefix_cache=false", 1, {"device": "cuda:1", "prefix_cache": "false"}),
    ],
)  # fmt: skip
def test_a_pool_is_a_number_of_workers_and_their_settings(text: str, number: int, settings: dict[str, str]) -> None:
    pool = parse_pool(text)
    assert (pool.num_workers, pool.settings) == (number, settings)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it describes nothing"),
        (" ", "it describes nothing"),
        ("demo", "write name=value, not 'demo'"),
        ("model=", "write name=value, not 'model'"),
        ("=x", "write name=value"),
        ("model=/a,model=/b", "'model' is named twice"),
        ("{", "not a JSON object"),
        ('{"a":' * 10_000, "not a JSON object"),
        ('{"workers": 2}', "the value of 'workers' must be a text"),
        ('{"model": null}', "write name=value, not 'model'"),
        ('{"model": ["/m"]}', "the value of 'model' must be a text"),
        ("workers=0", "workers is a number from 1 to 64"),
        ("workers=65", "workers is a number from 1 to 64"),
        ("workers=-1", "workers is a number"),
        ("workers=٣", "workers is a number"),
        ("workers=" + "9" * 5000, "workers is a number"),
        ("workers=0000000019999", "workers is a number"),
        ("modell=/m", "modell: no such setting .*; model may be meant"),
        ("role=chef", r"\[worker\] role: Input should be 'both', 'prefill' or 'decode'"),
        ("engine=magic,dtype=int3", r"(?s)\[worker\] engine: .*\[worker\] dtype: "),
        ("listen=127.0.0.1:1", "listen is for a single process"),
        ("worker_id=a,workers=1", "worker_id is for a single process"),
        ("model_name=" + "x" * 129, "model_name: String should have at most 128"),
        ("kv_budget_tokens=nan", "kv_budget_tokens"),
        ("hang_s=nan", "hang_s"),
    ],
)
def test_what_is_no_pool_is_said(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse_pool(text)


def test_pools_and_options_of_a_single_one_are_not_given_together() -> None:
    assert pools_of([], {"--workers": 2}) == ()
    assert len(pools_of(["workers=1", "workers=2"], {"--workers": None, "--model": ""})) == 2
    with pytest.raises(InputError, match="--workers and --pool can't be given together"):
        pools_of(["workers=1"], {"--model": "", "--workers": 2})


def workers(*texts: str) -> list[dict[str, str]]:
    spec = StackSpec(pools=tuple(parse_pool(text) for text in texts))
    return [{"model_name": "demo", "model": "/demo", **given} for given in spec.worker_settings]


def test_workers_of_all_pools_in_order() -> None:
    found = workers("model_name=a,workers=2", "role=decode")
    assert [worker["model_name"] for worker in found] == ["a", "a", "demo"]
    assert StackSpec(pools=(parse_pool("workers=2"), parse_pool("role=decode"))).worker_roles == ("", "", "decode")


def test_a_model_may_have_several_pools_of_the_same_files_only() -> None:
    same = workers("model_name=a,model=/m,engine=fake", "model_name=a,model=/m,role=both", "model_name=b,model=/m")
    assert sources_of(same) == {"a": "/m", "b": "/m"}
    with pytest.raises(InputError, match="pools of model 'a' are of '/m' and of '/n'"):
        sources_of(workers("model_name=a,model=/m", "model_name=a,model=/n"))


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_half_a_model_is_refused_whatever_the_others_are(role: str) -> None:
    other = {"prefill": "decode", "decode": "prefill"}[role]
    check_pools(workers(f"role={role}", f"role={other},workers=3"))
    check_pools(workers(f"role={role}", "role=both"))
    with pytest.raises(InputError, match="model 'demo': prefill workers need a decode worker"):
        check_pools(workers(f"role={role}", f"model_name=b,role={other}", "model_name=b"))


def test_a_line_for_each_pool() -> None:
    assert pool_lines(workers("model_name=a,workers=2,engine=fake", "role=decode", "model_name=a,engine=fake")) == [
        "pool   a: 3 workers, engine fake",
        "pool   demo: 1 worker, role decode",
    ]
