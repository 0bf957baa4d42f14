"""The transformers engine on a GPU: seconds of decode steps and prompt tokens per second, beside their limits.

A Llama of random weights is made on the device, anew for each way. The memory limit of a decode step is the time in
which its weights and the KV of all contexts can be read, at the rate of a copy on the same device; that of prompts is
the rate of a large matrix product. `torch` is the same engine with torch's attention, sequence by sequence
(kernels=torch); `eager` has one call of our attention per layer; `compiled` is what is served. transformers' continuous
batching does the same work beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from bucketserve.core.types import RequestId
from bucketserve.engine.attention import NAME
from bucketserve.engine.loader import LoadSettings, build_engine
from bucketserve.engine.packed import PackedEngine
from bucketserve.ports import SequenceSpec

SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "torch": {"kernels": "torch"},
    "eager": {"compile": False},
    "compiled": {},
}
CONTEXT = 1024
BATCHES = (1, 16, 64)
STEPS = 48


def timed(run: Callable[[], object], times: int = 5) -> float:
    """Returns the median seconds of a few runs after one more."""
    seconds = []
    for _ in range(times + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def copy_rate() -> float:
    """Returns bytes read and written per second by a copy on the device."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source))


def product_rate() -> float:
    """Returns FLOP per second of a product of 8,192 x 8,192 matrices in bfloat16."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / timed(lambda: a @ b)


def make_model(config: LlamaConfig, attention: str) -> Any:
    """Returns a model of random weights on the device, in bfloat16."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention).eval()


def size_of(model: Any, config: LlamaConfig) -> tuple[int, int]:
    """Returns the bytes of weights that a step reads, and the FLOP of a prompt's token but for the head."""
    embedding = model.get_input_embeddings().weight
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    number = sum(p.numel() for p in model.parameters())
    if config.tie_word_embeddings:
        return num_bytes, 2 * (number - embedding.numel())
    return num_bytes - embedding.nbytes, 2 * (number - 2 * embedding.numel())


def specs(name: str, number: int, length: int, output: int, vocabulary: int) -> list[SequenceSpec]:
    """Returns requests of random tokens."""
    rng = random.Random(number)
    return [
        SequenceSpec(
            request_id=RequestId(f"{name}-{i}"),
            token_ids=tuple(rng.randrange(vocabulary) for _ in range(length)),
            max_new_tokens=output,
        )
        for i in range(number)
    ]


def measure(engine: PackedEngine, name: str, vocabulary: int) -> dict[str, float]:
    """Returns seconds of a decode step by batch, prompt tokens per second, output tokens per second of a whole job."""
    found: dict[str, float] = {}
    for batch in BATCHES:
        engine.add(specs(f"{name}-{batch}", batch, CONTEXT, STEPS + 24, vocabulary))
        while engine.headroom().num_waiting:
            engine.step()
        for _ in range(8):
            engine.step()
        seconds = []
        for _ in range(STEPS):
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)
        found[f"decode_{batch}_s"] = statistics.median(seconds)
        engine.cancel([RequestId(f"{name}-{batch}-{i}") for i in range(batch)])
    for part in ("warm", "prompts"):
        engine.add(specs(f"{name}-{part}", 32, CONTEXT, 1, vocabulary))
        start = time.perf_counter()
        while engine.has_work():
            engine.step()
        found["prompt_tokens_per_s"] = 32 * CONTEXT / (time.perf_counter() - start)
    engine.add(specs(f"{name}-job", 64, CONTEXT, 128, vocabulary))
    start = time.perf_counter()
    while engine.has_work():
        engine.step()
    found["job_tokens_per_s"] = 64 * 128 / (time.perf_counter() - start)
    return found


def continuous_batching(config: LlamaConfig) -> float:
    """Returns output tokens per second of transformers' own engine for the same job."""
    model = make_model(config, "sdpa")
    prompts = [list(spec.token_ids) for spec in specs("peer", 64, CONTEXT, 128, config.vocab_size)]
    generation = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0)
    rate = 0.0
    for number in (4, 64):
        start = time.perf_counter()
        results = model.generate_batch(inputs=prompts[:number], generation_config=generation, persistent_manager=True)
        tokens = sum(len(result.generated_tokens) for result in results.values())
        rate = tokens / (time.perf_counter() - start)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--peer", action="store_true", help="transformers' continuous batching too")
    parser.add_argument("--jsonl", type=Path)
    options = parser.parse_args()
    config = LlamaConfig(**SHAPES[options.shape], max_position_embeddings=4096)
    conditions = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": options.shape,
        "copy_bytes_per_s": copy_rate(),
        "product_flops": product_rate(),
    }
    print(json.dumps(conditions), flush=True)
    model = make_model(config, NAME)
    weights, flops = size_of(model, config)
    del model

    def note(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        if options.jsonl:
            with options.jsonl.open("a") as file:
                file.write(json.dumps({**conditions, **row}) + "\n")

    for way in options.way or WAYS:
        # Compiling changes a model: the next one is as it was.
        model = make_model(config, NAME)
        start = time.perf_counter()
        settings = LoadSettings(model="m", prefix_cache=False, kv_budget_tokens=90_000, max_sequences=64, **WAYS[way])
        engine = build_engine(model, settings, lambda text: print(f"  {text}", flush=True))
        load_s = time.perf_counter() - start
        found = measure(engine, way, config.vocab_size)
        per_token = engine.info.kv_bytes_per_token
        limits = {
            f"decode_{batch}_share": (weights + batch * (CONTEXT + 32) * per_token)
            / conditions["copy_bytes_per_s"]
            / found[f"decode_{batch}_s"]
            for batch in BATCHES
        }
        share = found["prompt_tokens_per_s"] * flops / conditions["product_flops"]
        note({"way": way, "load_s": load_s, **found, **limits, "prompt_share": share})
        engine.close()
        del engine, model
        torch.cuda.empty_cache()
    if options.peer:
        note({"way": "transformers continuous batching", "job_tokens_per_s": continuous_batching(config)})


if __name__ == "__main__":
    main()
