"""Writes the reference model of the engine benchmarks: a Llama of 110 million random weights, with the demo tokenizer.

Speed doesn't depend on what the weights say. Hidden 768, 12 layers, 12 heads, 4 KV heads, intermediate 3,072,
vocabulary 4,096, context 2,048.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=3072,
        vocab_size=4096,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(arguments.folder)
    AutoTokenizer.from_pretrained(ROOT / "models" / "demo" / "model").save_pretrained(arguments.folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters in {arguments.folder}")


if __name__ == "__main__":
    main()
