"""Perplexity of a model as the engine computes it, in each number type: what bfloat16 and 8-bit weights cost.

    python benchmarks/perplexity.py [--model DIR] [--text FILE] [--window 256]

Windows do not overlap and each begins anew; the first token of a window is not predicted.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from bucketserve.engine.forward import PackedTokens
from bucketserve.engine.kv_memory import num_pages
from bucketserve.engine.loader import LoadSettings, load_engine

DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"
HELD_OUT = DEMO / "heldout.txt"
MODES = {
    "float32, torch's operations": {"dtype": "float32", "kernels": "torch"},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "8-bit weights, float32": {"dtype": "float32", "quantization": "int8"},
    "8-bit weights, bfloat16 KV": {"dtype": "bfloat16", "quantization": "int8"},
}


@torch.inference_mode()
def perplexity(settings: LoadSettings, text: Path, *, window: int = 256, most_tokens: int | None = None) -> float:
    """Returns e to the mean negative log-likelihood of the text's tokens, through the engine's model and attention."""
    ids = AutoTokenizer.from_pretrained(settings.model)(text.read_text(encoding="utf-8"))["input_ids"][:most_tokens]
    engine = load_engine(replace(settings, kv_budget_tokens=window))
    total, number = 0.0, 0
    for begin in range(0, len(ids) - 1, window):
        part = ids[begin : begin + window]
        tokens = PackedTokens()
        tokens.add(part, 0, range(num_pages(window)), wants_logits=False)
        tokens.last = list(range(len(part) - 1))
        if not tokens.last:
            continue
        logprobs = torch.log_softmax(engine.forward(tokens), dim=-1)
        total -= float(logprobs.gather(1, torch.tensor(part[1:])[:, None]).double().sum())
        number += len(part) - 1
    return math.exp(total / number)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO / "model"))
    parser.add_argument("--text", type=Path, default=HELD_OUT)
    parser.add_argument("--window", type=int, default=256)
    options = parser.parse_args()
    table = Table("weights and KV", "perplexity", "against the first")
    first = 0.0
    for name, mode in MODES.items():
        found = perplexity(LoadSettings(model=options.model, **mode), options.text, window=options.window)
        first = first or found
        table.add_row(name, f"{found:.4f}", f"{found / first - 1:+.3%}")
    Console().print(table)


if __name__ == "__main__":
    main()
