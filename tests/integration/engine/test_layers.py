"""Which layers are taken over by kernels, which are left to transformers, and what that changes: nothing."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.perplexity import HELD_OUT, perplexity
from bucketserve.core.errors import ModelLoadError
from bucketserve.engine import loader
from bucketserve.engine.attention import NAME
from bucketserve.engine.linear import PlacedEmbedding, place_linears
from bucketserve.engine.loader import LoadSettings, build_engine, load_engine
from bucketserve.engine.native import library
from bucketserve.engine.native.kernels import Kernels, PackedWeights, load_kernels
from bucketserve.engine.native.layers import FusedLayer
from bucketserve.engine.native.products import KernelProducts
from bucketserve.engine.packed import PackedEngine
from tests.integration.engine.models import CONFIGS, VOCAB, engine, reference
from tests.integration.engine.test_equality import drain, prompt, spec
from tests.kernel_paths import INSTRUCTION_SETS, PATHS

pytestmark = pytest.mark.engine
DEMO = "models/demo/model"


def count(under_test: PackedEngine, kind: type) -> int:
    return sum(isinstance(module, kind) for module in under_test.forward.model.modules())


FUSED = {
    "llama": 3,
    "llama-80": 3,
    "llama-20": 0,
    "llama-32": 3,
    "qwen2": 3,
    "qwen3": 3,
    "qwen2-tied": 3,
    "phi3": 3,
    "gpt2": 0,
    "gemma2": 3,
    "gemma3": 3,
}


@pytest.mark.parametrize("kernels", PATHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_of_norms_attention_and_a_gated_mlp_are_fused_and_others_are_not(name: str, kernels: str) -> None:
    assert count(engine(name, kernels=kernels), FusedLayer) == (FUSED[name] if kernels != "torch" else 0)


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "supported", lambda: ("baseline",))
    with pytest.raises(ModelLoadError, match="this processor has no avx512, only baseline"):
        engine("llama", kernels="avx512")


def test_a_layer_that_computes_otherwise_is_left_as_it_is() -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.hidden_act = "gelu"
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa").float().eval()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    model.load_state_dict(plain.state_dict())
    under_test = build_engine(model.float().eval(), LoadSettings(model="gelu", kv_budget_tokens=1000))
    assert count(under_test, FusedLayer) == 0
    outputs: dict[str, list[int]] = {}
    under_test.add([spec("r", prompt(50), 12)])
    drain(under_test, outputs)
    ids = torch.tensor([prompt(50)])
    wanted = plain.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert outputs["r"] == wanted[0, 50:].tolist()


def test_bfloat16_and_8_bit_weights_cost_less_than_one_percent_of_perplexity() -> None:
    exact = perplexity(LoadSettings(model=DEMO, dtype="float32", kernels="torch"), HELD_OUT, most_tokens=4096)
    for more in ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "int8"}):
        found = perplexity(LoadSettings(model=DEMO, **more), HELD_OUT, most_tokens=4096)
        tolerance = 1e-5 if more == {"dtype": "float32"} else 0.01
        assert found == pytest.approx(exact, rel=tolerance), more


def test_8_bit_weights_take_a_quarter_of_the_memory() -> None:
    def weights(**more: str) -> int:
        settings = LoadSettings(model=DEMO, dtype="float32", kv_budget_tokens=100, **more)
        return load_engine(settings).headroom().weights_bytes

    # The embedding is not rounded, and the head, which shares its numbers, has them once more in 8 bits.
    embedding = 4096 * 256 * 4
    assert (weights(quantization="int8") - embedding) / weights() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("more", "remedy"),
    [({"dtype": "float16"}, "set dtype to float32 or bfloat16"), ({"kernels": "torch"}, "set kernels to auto")],
)
def test_8_bit_weights_that_nobody_computes_with_are_refused(more: dict[str, str], remedy: str) -> None:
    settings = LoadSettings(model=DEMO, quantization="int8", kv_budget_tokens=100, **more)
    with pytest.raises(ModelLoadError, match=remedy):
        load_engine(settings)
    model = copy.deepcopy(reference("llama")).to(getattr(torch, more.get("dtype", "float32")))
    with pytest.raises(ModelLoadError, match=remedy):
        build_engine(model, settings)


def test_8_bit_weights_are_most_of_a_model_or_none() -> None:
    told: list[str] = []
    engine("llama", quantization="int8", on_progress=told.append)
    # All but norms.
    assert "100% of the weights that are multiplied with are in 8 bits" in told
    # Its layers are no nn.Linear; its head is.
    with pytest.raises(ModelLoadError, match=r"would round \d\d% of the weights"):
        engine("gpt2", quantization="int8")


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_layer_is_freed_before_the_next_but_one_is_placed(monkeypatch: pytest.MonkeyPatch, quantization: str) -> None:
    pack, alive = Kernels.pack, list[int]()

    def counting(*args: object, **more: object) -> PackedWeights:
        alive.append(sum(type(one) is torch.nn.Linear for one in gc.get_objects()))
        return pack(*args, **more)

    monkeypatch.setattr(Kernels, "pack", counting)
    monkeypatch.setattr(loader, "choose_products", lambda kernels, *of: KernelProducts(kernels))
    engine("llama", quantization=quantization)
    # Of three layers with seven each all are freed but the last one, whose place is taken.
    assert alive[0] - alive[-1] >= 14


@torch.inference_mode()
@pytest.mark.parametrize("kernels", INSTRUCTION_SETS)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Gemma multiplies what it looks up.
@pytest.mark.parametrize("name", ["gemma3", "qwen2-tied"])
def test_a_head_that_shares_the_embedding_s_weights_is_placed(
    name: str, dtype: torch.dtype, is_int8: bool, kernels: str
) -> None:
    original = copy.deepcopy(reference(name)).to(dtype)
    model = copy.deepcopy(original)
    placed = place_linears(model, KernelProducts(load_kernels(kernels), is_int8=is_int8))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head in placed
    assert isinstance(embedding, PlacedEmbedding) != is_int8
    ids, rows = torch.arange(VOCAB)[None], torch.randn(5, 64).to(dtype)
    assert torch.equal(embedding(ids), original.get_input_embeddings()(ids))
    wanted = original.get_output_embeddings()(rows)
    assert (head(rows) - wanted).norm() / wanted.norm() < (0.02 if is_int8 or dtype is torch.bfloat16 else 1e-5)


def test_a_model_in_bfloat16_runs_end_to_end() -> None:
    under_test = load_engine(LoadSettings(model=DEMO, dtype="bfloat16", kv_budget_tokens=2000))
    outputs: dict[str, list[int]] = {}
    under_test.add([spec(f"r{n}", prompt(n), 10) for n in (1, 40, 200)])
    drain(under_test, outputs)
    assert {name: len(tokens) for name, tokens in outputs.items()} == {"r1": 10, "r40": 10, "r200": 10}
