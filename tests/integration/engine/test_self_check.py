"""What is served computes what the model computes by itself, or is refused with what differs."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from bucketserve.core.errors import EngineError, ModelLoadError
from bucketserve.engine import loader
from bucketserve.engine.attention import NAME, Segment, StepPlan
from bucketserve.engine.kv_memory import KvLayout, KvMemory
from bucketserve.engine.loader import LoadSettings, build_engine
from bucketserve.engine.native.kernels import Kernels
from bucketserve.engine.native.layers import FusedLayer
from bucketserve.engine.packed import PackedEngine
from bucketserve.engine.probe import reach_of
from scripts.model_families import small_config, small_model
from tests.integration.engine.models import CONFIGS
from tests.integration.engine.test_equality import drain, one_thread, prompt, spec  # noqa: F401

pytestmark = pytest.mark.engine

WAYS = {
    "float32": {"dtype": "float32"},
    "torch": {"dtype": "float32", "kernels": "torch"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16-torch": {"dtype": "bfloat16", "kernels": "torch"},
    "int8": {"dtype": "float32", "quantization": "int8"},
    "bfloat16-int8": {"dtype": "bfloat16", "quantization": "int8"},
}


def serve(model: nn.Module, name: str = "m", dtype: str = "float32", **settings: object) -> PackedEngine:
    given = {"kv_budget_tokens": 600, "max_step_tokens": 64, **settings}
    return build_engine(model.to(getattr(torch, dtype)).eval(), LoadSettings(model=name, **given))


def llama(**changes: object) -> nn.Module:
    config = small_config("llama")
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(config, attn_implementation=NAME)


class Beside(nn.Module):
    """An MLP that adds something made of the whole input [1, tokens, hidden] to its output."""

    def __init__(self, mlp: nn.Module, more: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.mlp, self.more = mlp, more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x) + 4 * self.more(x)


def with_convolution(model: nn.Module) -> None:
    """Each token sees the one before it: across sequences when they lie side by side, and lost between steps."""
    layer = model.model.layers[1]
    layer.mlp = Beside(layer.mlp, lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1))


def with_running_sum(model: nn.Module) -> None:
    layer = model.model.layers[2]
    layer.mlp = Beside(layer.mlp, lambda x: x.cumsum(dim=1) / torch.arange(1, x.shape[1] + 1)[:, None].to(x.dtype))


def with_own_positions(model: nn.Module) -> None:
    rotary, forward = model.model.rotary_emb, model.model.rotary_emb.forward
    rotary.forward = lambda x, position_ids: forward(x, torch.arange(x.shape[1])[None])


def with_positions_in_the_embedding(model: nn.Module) -> None:
    embedding = model.model.embed_tokens
    embedding.register_forward_hook(
        lambda module, args, out: out + 0.5 * torch.sin(torch.arange(out.shape[1]))[:, None].to(out.dtype)
    )


def with_a_second_attention(model: nn.Module) -> None:
    attention = model.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: (forward(*args, **kwargs), forward(*args, **kwargs))[1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (with_convolution, "layer 1 computes something else, for tokens that come one by one"),
        (with_running_sum, "layer 2 computes something else, for the second piece"),
        (with_own_positions, "for the second piece of a prompt: .* positions of its own"),
        (with_positions_in_the_embedding, "what comes before layer 0 differs, for the second piece"),
        (with_a_second_attention, "layer 0 calls attention more than once"),
    ],
)
def test_a_model_that_packed_steps_would_change_is_refused_with_what_differs(
    way: str, damage: Callable[[nn.Module], None], says: str
) -> None:
    model = llama()
    damage(model)
    with pytest.raises(ModelLoadError, match=f"'m' \\(LlamaForCausalLM\\) can't be served: .*{says}"):
        serve(model, **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gpt2", "gemma2", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text"]
)
def test_a_right_model_is_accepted_however_it_is_served(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of some less would be rounded than is worth it.
    monkeypatch.setattr(loader, "INT8_LEAST_SHARE", 0.0)
    assert serve(small_model(small_config(name), NAME), **WAYS[way]).info.kv_bytes_per_token > 0


def test_wrong_kernels_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Kernels.attention

    def without_window(self, *args, **options):
        right(self, *args, **{**options, "window": None})

    monkeypatch.setattr(Kernels, "attention", without_window)
    with pytest.raises(ModelLoadError, match=r"layer \d computes something else"):
        serve(small_model(small_config("mistral"), NAME))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ModelLoadError, match="not finite"):
        serve(model)


def test_a_declared_window_that_no_layer_has_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="declares sliding_window 100, and none of its layers"):
        serve(llama(sliding_window=100))
    # Longer than the context, or switched off.
    serve(llama(sliding_window=4096))
    serve(llama(sliding_window=100, use_sliding_window=False))


def test_a_layer_that_scales_late_positions_is_not_fused_and_right() -> None:
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "llama_4_scaling_beta": 0.3,
    }  # fmt: skip
    config = small_config("ministral3")
    config.rope_parameters = {**config.rope_parameters, **rope}
    for way in ("float32", "bfloat16", "int8"):
        model = small_model(copy.deepcopy(config), NAME)
        serve(model, **WAYS[way])
        assert not any(isinstance(module, FusedLayer) for module in model.modules())
    serve(model := llama())
    assert any(isinstance(module, FusedLayer) for module in model.modules())


def test_a_layer_that_counts_late_positions_by_itself_is_served_up_to_where_they_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "INT8_LEAST_SHARE", 0.0)

    def made() -> nn.Module:
        config = small_config("llama4_text")
        config.attn_temperature_tuning, config.floor_scale = True, 200
        return small_model(config, NAME)

    for way in ("float32", "bfloat16", "int8"):
        with pytest.raises(ModelLoadError, match="layer 3 computes something else, late in its context"):
            serve(made(), **WAYS[way])
        assert serve(made(), **WAYS[way], context_tokens=199).info.context_tokens == 199


# --- what a mask says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [40, 1024, 131_072])
@pytest.mark.parametrize("size", [1, 2, 31, 4096, 8192])
def test_windows_and_chunks_of_any_size_are_read_from_the_rule_of_the_mask(size: int, context: int) -> None:
    padding = torch.zeros(1, dtype=torch.long)
    window = reach_of(sliding_window_causal_mask_function(size), context)
    chunk = reach_of(chunked_causal_mask_function(size, padding), context)
    if size >= context:
        assert window == chunk == (None, None)
    else:
        assert window == ((size, None) if size > 1 else (None, 1))
        assert chunk == (None, size)
    assert reach_of(causal_mask_function, context) == (None, None)


def test_masks_of_another_kind_are_refused() -> None:
    with pytest.raises(EngineError, match="look at later ones"):
        reach_of(bidirectional_mask_function, 100)
    with pytest.raises(EngineError, match="neither causal nor a window nor chunks"):
        reach_of(lambda b, h, q, kv: (kv <= q) & ((q - kv < 8) | (kv < 2)), 100)
    with pytest.raises(EngineError, match="look at later ones"):
        reach_of(lambda b, h, q, kv: (kv <= q) | (kv < 10), 100)


@pytest.mark.parametrize("chunk", [1, 7, 32, 1000])
def test_each_piece_of_a_segment_knows_its_own_chunk_only(chunk: int) -> None:
    memory = KvMemory([KvLayout(1, 4, 4)], 1, torch.float32, torch.device("cpu"))
    segments = [Segment(0, 20, 100, 63), Segment(20, 1, 200, 33), Segment(21, 40, 300, 40)]
    plan = StepPlan(memory, {}, segments, array("q", range(12)))
    seen = {}
    for piece in plan.pieces(chunk):
        for i in range(piece.num_tokens):
            end = piece.kv_start + piece.context - piece.num_tokens + i + 1
            seen[piece.first + i] = (piece.kv_start, end)
    wanted = {}
    for segment in segments:
        for i in range(segment.num_tokens):
            position = segment.context - segment.num_tokens + i
            begin = segment.kv_start + position // chunk * chunk
            wanted[segment.first + i] = (begin, segment.kv_start + position + 1)
    assert seen == wanted


# --- rotary embeddings that change with the length --------------------------------------------------------------------

LONG = Phi3Config(
    vocab_size=400,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=512,
    original_max_position_embeddings=128,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 16,
        "long_factor": [4.0] * 16,
        "original_max_position_embeddings": 128,
    },
    initializer_range=0.3,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=0,
)
DYNAMIC = LlamaConfig(
    **{
        **CONFIGS["llama"].to_dict(),
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    }
)


@pytest.mark.parametrize("config", [LONG, DYNAMIC], ids=["longrope", "dynamic"])
def test_the_context_ends_where_the_rotary_embedding_begins_to_change(config: LlamaConfig) -> None:
    under_test = serve(small_model(copy.deepcopy(config), NAME))
    assert under_test.info.context_tokens == 128
    with pytest.raises(ModelLoadError, match="set context_tokens to at most 128"):
        serve(small_model(copy.deepcopy(config), NAME), context_tokens=129)
    alone: dict[str, list[int]] = {}
    under_test.add([spec("r", prompt(40), 20)])
    drain(under_test, alone)
    beside: dict[str, list[int]] = {}
    under_test.add([spec("long", prompt(100), 28), spec("r", prompt(40), 20)], 16)
    drain(under_test, beside)
    assert beside["r"] == alone["r"]
    with pytest.raises(EngineError, match="128 tokens"):
        under_test.add([spec("longer", prompt(100), 29)])


@pytest.mark.parametrize("context", [1, 2, 7, 8])
def test_a_context_of_a_few_tokens_is_checked_and_served(context: int) -> None:
    under_test = serve(llama(), context_tokens=context)
    outputs: dict[str, list[int]] = {f"r{n}": [] for n in range(1, context)}
    under_test.add([spec(f"r{n}", [*range(2, 2 + n)], context - n) for n in range(1, context)])
    drain(under_test, outputs)
    assert [len(tokens) for tokens in outputs.values()] == list(range(context - 1, 0, -1))


def test_looking_and_checking_leave_the_model_as_it_was() -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loader._examine(model.float().eval(), 4, 256)
    assert model.config._attn_implementation == NAME
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
