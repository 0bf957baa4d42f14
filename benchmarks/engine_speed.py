"""Output tokens per second of the transformers engine alone, all requests at once, and its share of the GEMM limit.

The GEMM limit is what the fastest matrix product to be had on this machine (torch's, oneDNN's or ours) reaches on the
model's layers with 2,048 rows, measured before and after each run, since a shared machine's speed changes from minute
to minute. The share is how much of it the weights' arithmetic of the run got, 2 FLOPs a weight and token, as if there
were nothing else to compute; in prefill, that of a run that computes all prompts and one token each. "With attention"
adds attention's own FLOPs, 4 x hidden size for each layer and each pair of a token and one that it sees (MFU as in PaLM
appendix B, causal half only). --mode may be given several times: the runs alternate. With --stack the same requests go
through gateway, scheduler and a worker as well, right before each run of the engine alone, and the table has the share
of its speed that is left; whoever is not measured is stopped.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from compare import run_ours
from conditions import Records, Row, conditions, cpu
from reference_requests import Request, read_requests
from reference_stack import ReferenceStack, end_on_signals
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from bucketserve.core.types import RequestId
from bucketserve.engine.loader import LoadSettings, load_engine
from bucketserve.engine.native.kernels import load_kernels
from bucketserve.engine.native.products import KernelProducts, OneDnnProducts, Products, TorchProducts
from bucketserve.engine.packed import PackedEngine
from bucketserve.ports import SequenceSpec

MODES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
STACKS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8-bfloat16"}
"""The same as modes of reference_stack.py."""


def run(engine: PackedEngine, requests: list[Request], name: str) -> tuple[float, int]:
    """Returns (seconds, output tokens)."""
    specs = [
        SequenceSpec(
            request_id=RequestId(f"{name}-{i}"),
            token_ids=tuple(request.prompt_ids),
            max_new_tokens=request.output_tokens,
        )
        for i, request in enumerate(requests)
    ]
    tokens = 0
    start = time.perf_counter()
    engine.add(specs)
    while engine.has_work():
        tokens += len(engine.step().tokens)
    return time.perf_counter() - start, tokens


def gemm_flops(mode: str, hidden: int, wide: int) -> float:
    """FLOP/s on the model's two largest shapes, by whoever is fastest."""
    dtype, kernels = DTYPES[mode], load_kernels()
    candidates: list[Products] = [KernelProducts(kernels, is_int8=mode == "int8")]
    if mode == "float32":
        candidates.append(TorchProducts(kernels))
    if OneDnnProducts.suits(dtype):
        candidates.append(OneDnnProducts(kernels))
    return max(_flops(candidate, dtype, hidden, wide) for candidate in candidates)


def _flops(products: Products, dtype: torch.dtype, hidden: int, wide: int) -> float:
    seconds, work = 0.0, 0
    for inner, outer in ((hidden, wide), (wide, hidden)):
        # Activations are float32 where that costs nothing, as in the engine.
        x = torch.randn(2048, inner, dtype=torch.float32 if products.wants_float32 else dtype)
        product = products.linear([torch.randn(outer, inner, dtype=dtype)], None)
        out = torch.empty(2048, outer, dtype=x.dtype)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            product.write(x, out)
            times.append(time.perf_counter() - start)
        seconds += statistics.median(times)
        work += 2 * 2048 * inner * outer
    return work / seconds


def linear_weights(model: str) -> int:
    """Returns how many weights a token is multiplied with, the LM head left out."""
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    linears = [m for m in shape.modules() if isinstance(m, torch.nn.Linear)]
    return sum(m.weight.numel() for m in linears if m is not shape.get_output_embeddings())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory, such as one of benchmarks/reference_model.py")
    parser.add_argument("--requests", type=Path, help="JSON with requests[] of prompt_ids and output_len")
    parser.add_argument("--mode", action="append", choices=sorted(MODES))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-step-tokens", type=int, default=0)
    parser.add_argument("--stack", action="store_true", help="the whole stack beside it")
    parser.add_argument("--profile", action="store_true", help="one run under cProfile, and nothing else")
    parser.add_argument("--jsonl", type=Path)
    arguments = parser.parse_args()
    console = Console()
    requests = read_requests(arguments.requests)
    num_prompt = sum(len(request.prompt_ids) for request in requests)
    engines = {
        name: load_engine(
            LoadSettings(
                model=arguments.model,
                prefix_cache=False,
                **MODES[name],
                num_threads=arguments.threads,
                kv_budget_tokens=num_prompt + sum(r.output_tokens for r in requests) + 1000,
                max_step_tokens=arguments.max_step_tokens,
            )
        )
        for name in arguments.mode or list(MODES)
    }
    if arguments.profile:
        engine = next(iter(engines.values()))
        run(engine, requests, "warm")
        profile = cProfile.Profile()
        profile.runcall(run, engine, requests, "profiled")
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
        return
    config = json.loads((Path(arguments.model) / "config.json").read_text())
    shape = (config["hidden_size"], config["intermediate_size"])
    per_token = 2 * linear_weights(arguments.model)
    # A prompt of n tokens has n (n + 1) / 2 pairs of a token and one that it sees.
    pairs = sum(len(request.prompt_ids) * (len(request.prompt_ids) + 1) // 2 for request in requests)
    attention = 4 * config["hidden_size"] * config["num_hidden_layers"] * pairs
    prompts = [Request(request.prompt_ids, 1) for request in requests]
    first = conditions(threads=arguments.threads, requests=len(requests), prompt_tokens=num_prompt)
    end_on_signals()
    with ExitStack() as stack, Records(arguments.jsonl, first) as records:
        stacks = {
            name: stack.enter_context(ReferenceStack(Path(arguments.model), STACKS[name]))
            for name in (engines if arguments.stack else ())
        }
        for number in range(arguments.rounds + 1):
            for name, engine in engines.items():
                stack_s, stack_tokens, _ = run_ours(stacks[name], requests) if stacks else (0.0, 0, [])
                limits = [gemm_flops(name, *shape)]
                seconds, tokens = run(engine, requests, f"{name}{number}")
                limits.append(gemm_flops(name, *shape))
                prefill_s, _ = run(engine, prompts, f"{name}{number}p")
                limits.append(gemm_flops(name, *shape))
                if not number:
                    continue  # to warm up
                whole, prefill = sum(limits[:2]) / 2, sum(limits[1:]) / 2
                records.add(
                    {
                        "mode": name,
                        "output_tokens_per_s": tokens / seconds,
                        "gemm_gflops": prefill / 1e9,
                        "share": per_token * (num_prompt + tokens) / seconds / whole,
                        "share_in_prefill": per_token * num_prompt / prefill_s / prefill,
                        "share_in_prefill_with_attention": (per_token * num_prompt + attention) / prefill_s / prefill,
                        "share_in_stack": stack_tokens / stack_s * seconds / tokens if stacks else None,
                    }
                )
    table = Table(
        "mode", "output tok/s", "GEMM limit, GFLOP/s", "share of it", "in prefill", "with attention", "whole stack"
    )
    for name in engines:
        of_mode = [row for row in records.rows if row["mode"] == name]
        table.add_row(
            name,
            _spread(of_mode, "output_tokens_per_s", ".0f"),
            _spread(of_mode, "gemm_gflops", ".0f"),
            _spread(of_mode, "share", ".0%"),
            _spread(of_mode, "share_in_prefill", ".0%"),
            _spread(of_mode, "share_in_prefill_with_attention", ".0%"),
            _spread(of_mode, "share_in_stack", ".0%") if arguments.stack else "",
        )
    console.print(f"{len(requests)} requests, {num_prompt} prompt tokens, {arguments.threads} threads")
    console.print(table)
    console.print(f"torch {torch.__version__}, Python {platform.python_version()}, {cpu()}")


def _spread(rows: list[Row], key: str, form: str) -> str:
    values = [float(row[key]) for row in rows]  # type: ignore[arg-type]
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
