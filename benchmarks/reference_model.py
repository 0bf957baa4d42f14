"""Writes a reference model of the engine benchmarks, random weights with the demo tokenizer.

llama: 110 million weights; hidden 768, 12 layers, 12 heads, 4 KV heads, intermediate 3,072, vocabulary 4,096.
gemma: 268 million, as Gemma 3 270M, 168 million of them in an embedding that is the head as well; hidden 640,
18 layers, 4 heads of 256, 1 KV head, intermediate 2,048, vocabulary 262,144, windows of 512 in five layers of six.
llama-8b: 8.0 billion, as Llama 3 8B, for GPUs; hidden 4,096, 32 layers, 32 heads of 128, 8 KV heads,
intermediate 14,336, vocabulary 128,256.
Context 2,048, of llama-8b 8,192. Speed doesn't depend on what the weights say. Llamas count: after token t comes t + 1,
by a wide margin in every precision, so that a stop token ends an output at a length that is known.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODELS = {
    "llama": LlamaConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=3072,
        vocab_size=4096,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **TOKENS,
    ),
    "llama-8b": LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128_256,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        **TOKENS,
    ),
    "gemma": Gemma3TextConfig(
        hidden_size=640,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        intermediate_size=2048,
        vocab_size=262_144,
        max_position_embeddings=2048,
        sliding_window=512,
        **TOKENS,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=MODELS, default="llama")
    parser.add_argument("--device", default="cpu", help="where weights are drawn; what is drawn differs")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(MODELS[arguments.kind]).to(torch.bfloat16)
    if not model.config.tie_word_embeddings:
        # What layers of small random weights add to an embedding this large stays small beside it.
        embedding = torch.nn.init.normal_(model.get_input_embeddings().weight.data)
        model.get_output_embeddings().weight.data.copy_(embedding.roll(1, dims=0))
    model.save_pretrained(arguments.folder)
    AutoTokenizer.from_pretrained(ROOT / "models" / "demo" / "model").save_pretrained(arguments.folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters in {arguments.folder}")


if __name__ == "__main__":
    main()
