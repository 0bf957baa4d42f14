"""LoRA adapters for tests: random weights, as peft writes them, for a model of the Llama family."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["write_adapter"]

RANK = 8
PLACES = {
    "self_attn.q_proj": ("hidden", "query"),
    "self_attn.v_proj": ("hidden", "value"),
    "self_attn.o_proj": ("query", "hidden"),
    "mlp.down_proj": ("intermediate", "hidden"),
}


def write_adapter(directory: Path, model: Path, seed: int, scale: float = 0.1, rank: int = RANK) -> Path:
    """Writes an adapter of a model into a new directory, under another name until it is whole; returns it."""
    config = json.loads((model / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    sizes = {
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "query": config["num_attention_heads"] * head,
        "value": config["num_key_value_heads"] * head,
    }
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for place, (inner, outer) in PLACES.items():
            name = f"base_model.model.model.layers.{layer}.{place}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, sizes[inner], generator=random) * scale
            tensors[f"{name}.lora_B.weight"] = torch.randn(sizes[outer], rank, generator=random) * scale
    part = directory.with_name(f".{directory.name}")
    part.mkdir(parents=True)
    save_file(tensors, part / "adapter_model.safetensors")
    modules = [place.rpartition(".")[2] for place in PLACES]
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules, "bias": "none"}
    (part / "adapter_config.json").write_text(json.dumps(said))
    return part.rename(directory)
