"""Attention, graphs and memory on a CUDA device; without one the same kernels by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton
from transformers import AutoModelForCausalLM, MixtralConfig, PhimoeConfig
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bucketserve.core.types import RequestId
from bucketserve.engine.attention import NAME
from bucketserve.engine.cuda import kernels
from bucketserve.engine.cuda.race import BLOCK, WARPS
from bucketserve.engine.loader import LoadSettings, build_engine
from bucketserve.ports import Sampling
from tests.integration.engine.models import COMMON, CONFIGS, engine, generate
from tests.integration.engine.test_equality import drain, prompt, spec


@pytest.mark.timeout(600)
def test_kernels_and_models_by_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.integration.engine.device_attention", "cpu", "--cases", "15"]
    subprocess.run(
        [*command, "--model", "llama"], check=True, env={**os.environ, "TRITON_INTERPRET": "1", "ENGINE_DEVICE": "cpu"}
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("scores", ["*fp32", "*fp64"])
def test_draws_compile_for_a_gpu_that_is_not_here(scores: str, capability: int) -> None:
    pointers = {"scores": scores, "tops": scores, "temperatures": "*fp64", "starts": "*i64", "winners": "*i64"}
    signature = {**pointers, "row_stride": "i32", "size": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=kernels.race, signature=signature, constexprs={"BLOCK": BLOCK})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
    assert compiled.asm["cubin"]


@pytest.mark.gpu
def test_kernels() -> None:
    from tests.integration.engine.device_attention import TOLERANCE, difference

    for seed in range(40):
        told, share = difference(seed, torch.device("cuda", 0), list(TOLERANCE))
        assert share <= 1, f"case {seed}: {told}: {share:.3g} x what is tolerated"


@pytest.mark.gpu
def test_draws() -> None:
    from tests.integration.engine.device_attention import check_draws

    check_draws(torch.device("cuda", 0), (1, 50, 2048, 5000, 128_256))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "compiles"),
    [*((name, False) for name in CONFIGS), *((name, True) for name in ("llama", "gpt2", "gemma2"))],
)
def test_a_crowd_of_decodes(name: str, compiles: bool) -> None:
    told: list[str] = []
    under_test = engine(name, device="cuda", compile=compiles, on_progress=told.append)
    assert not any("without" in text for text in told)
    outputs: dict[str, list[int]] = {}
    lengths = (1, 2, 31, 32, 33, 64, 100, 150, 200, 250, 333)
    for length in lengths:
        under_test.add([spec(f"r{length}", prompt(length), 20 + length % 7)])
        drain(under_test, outputs, steps=2)
    drain(under_test, outputs)
    assert outputs == {f"r{length}": generate(name, prompt(length), 20 + length % 7) for length in lengths}


@pytest.mark.gpu
def test_seeds_choose_as_on_a_cpu() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=5)
    found = []
    for device in ("cuda", "cpu"):
        under_test = engine("llama", device=device)
        outputs: dict[str, list[int]] = {}
        under_test.add([spec("seeded", prompt(40), 30, sampling=sampling), spec("beside", prompt(90), 12)])
        drain(under_test, outputs)
        found.append(outputs)
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("config", [MixtralConfig, PhimoeConfig])
def test_a_model_that_can_not_be_captured_is_served_without_graphs(config: type) -> None:
    torch.manual_seed(1)
    reference = AutoModelForCausalLM.from_config(config(**COMMON, num_local_experts=4), attn_implementation="sdpa")
    reference = reference.float().eval()
    served = AutoModelForCausalLM.from_config(config(**COMMON, num_local_experts=4), attn_implementation=NAME)
    served.load_state_dict(reference.state_dict())
    told: list[str] = []
    under_test = build_engine(
        served.to("cuda", torch.float32).eval(),
        LoadSettings(model="m", kv_budget_tokens=4000, max_step_tokens=256, max_sequences=8),
        told.append,
    )
    print(told)
    outputs: dict[str, list[int]] = {}
    under_test.add([spec(f"r{length}", prompt(length), 8) for length in (5, 40, 100)])
    drain(under_test, outputs)
    for length in (5, 40, 100):
        ids = torch.tensor([prompt(length)])
        wanted = reference.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert outputs[f"r{length}"] == wanted[0, length:].tolist()


@pytest.mark.gpu
def test_handed_over_kv_is_the_same() -> None:
    first, second = engine("qwen3", device="cuda"), engine("qwen3", device="cuda")
    prompts = {"r": prompt(200), "again": [*prompt(200)[:192], *prompt(40)]}
    outputs: dict[str, list[int]] = {}
    for number, (name, token_ids) in enumerate(prompts.items()):
        first.add([spec(name, token_ids, 12, hands_over=True)])
        while name not in outputs:
            drain(first, outputs, steps=1)
        data = memoryview(bytearray(len(token_ids) * first.info.kv_bytes_per_token))
        first.export_kv(RequestId(name), data)
        assert second.known_pages(token_ids, b"") == 6 * number
        missing = data[6 * number * second.info.kv_page_bytes :]
        second.import_kv(spec(name, token_ids, 12), outputs[name], missing)
    drain(second, outputs)
    assert outputs == {name: generate("qwen3", token_ids, 12) for name, token_ids in prompts.items()}
