"""Small models with random weights, of several architectures, made without downloads."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import cache

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from bucketserve.engine.attention import NAME
from bucketserve.engine.loader import LoadSettings, build_engine
from bucketserve.engine.packed import PackedEngine

DEVICE = os.environ.get("ENGINE_DEVICE", "cpu")
"""Where engines are; what they are compared with is computed on the CPU."""
# Compiling takes many seconds: tests/integration/engine/test_cuda.py does it.
OF_DEVICE = {} if DEVICE == "cpu" else {"max_sequences": 16, "compile": False}
VOCAB = 400
CONTEXT = 1024
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    # Larger than usual, so that the logits of random weights are far apart and no rounding decides between two tokens.
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    # Halves of heads that are no whole number of any vectors, and heads that none of our kernels take.
    "llama-80": LlamaConfig(**COMMON, head_dim=80),
    "llama-32": LlamaConfig(**COMMON, head_dim=32),
    "llama-20": LlamaConfig(**COMMON, head_dim=20),
    "qwen2": Qwen2Config(**COMMON),
    "qwen2-tied": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "phi3": Phi3Config(**COMMON),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=64,
        n_layer=3,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    ),
    # Alternating sliding-window and full layers, soft-capped scores and logits.
    "gemma2": Gemma2Config(**COMMON, head_dim=16, sliding_window=32, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=32, query_pre_attn_scalar=16),
}


@cache
def reference(name: str) -> torch.nn.Module:
    """The model as transformers runs it; eager where that is what its authors compare with."""
    torch.manual_seed(7)
    implementation = "eager" if name.startswith("gemma") else "sdpa"
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=implementation)
    return model.to(torch.float32).eval()


def engine(
    name: str, *, device: str = DEVICE, on_progress: Callable[[str], None] = lambda text: None, **settings: object
) -> PackedEngine:
    """A fresh engine around a copy of the reference's weights."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=NAME)
    model.load_state_dict(reference(name).state_dict())
    return build_engine(
        model.to(device, torch.float32).eval(),
        LoadSettings(model=name, **{"kv_budget_tokens": 6000, "max_step_tokens": 512, **OF_DEVICE, **settings}),
        on_progress,
    )


def generate(name: str, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of model.generate, the end token ignored."""
    return list(_generated(name, tuple(prompt), num_tokens))


@cache
@torch.inference_mode()
def _generated(name: str, prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    output = reference(name).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(output[0, len(prompt) :].tolist())
