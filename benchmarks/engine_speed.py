"""Output tokens per second of the transformers engine alone, all requests at once, and its share of the GEMM limit.

The GEMM limit is what the machine's matrix product reaches on this model's layers with 2,048 tokens: the time that the
weights' arithmetic would take if there were nothing else. --dtype may be given several times: the runs alternate.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import random
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bucketserve.core.types import RequestId
from bucketserve.engine.linear import PackedLinear
from bucketserve.engine.loader import LoadSettings, load_engine
from bucketserve.engine.packed import PackedEngine
from bucketserve.ports import SequenceSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_requests(path: Path | None) -> list[tuple[list[int], int]]:
    """Prompt ids and output length of each request; without a file, a mix like the reference work's."""
    if path is not None:
        rows = json.loads(path.read_text())["requests"]
        return [(row["prompt_ids"], int(row["output_len"])) for row in rows]
    rng = random.Random(1)
    requests = []
    for _ in range(64):
        length = rng.randint(400, 1500) if rng.random() < 0.3 else max(int(rng.lognormvariate(3.7, 0.6)), 1)
        requests.append(([rng.randrange(100, 4000) for _ in range(length)], rng.randint(16, 128)))
    return requests


def run(engine: PackedEngine, requests: list[tuple[list[int], int]], name: str) -> tuple[float, int, list[float]]:
    """Returns (seconds, output tokens, seconds of each step)."""
    specs = [
        SequenceSpec(request_id=RequestId(f"{name}-{i}"), token_ids=tuple(prompt), max_new_tokens=output)
        for i, (prompt, output) in enumerate(requests)
    ]
    tokens, steps = 0, []
    start = time.perf_counter()
    engine.add(specs)
    while engine.has_work():
        before = time.perf_counter()
        tokens += len(engine.step().tokens)
        steps.append(time.perf_counter() - before)
    return time.perf_counter() - start, tokens, steps


def gemm_flops(dtype: torch.dtype, hidden: int, wide: int) -> float:
    """FLOP/s of the model's two largest shapes."""
    times, work = [], 0
    for inner, outer in ((hidden, wide), (wide, hidden)):
        x, w = torch.randn(2048, inner, dtype=dtype), torch.randn(outer, inner, dtype=dtype)
        for _ in range(3):
            torch.nn.functional.linear(x, w)
        best = min(_timed(x, w) for _ in range(10))
        times.append(best)
        work += 2 * 2048 * inner * outer
    return work / sum(times)


def _timed(x: torch.Tensor, w: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.nn.functional.linear(x, w)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory, such as one of benchmarks/reference_model.py")
    parser.add_argument("--requests", type=Path, help="JSON with requests[] of prompt_ids and output_len")
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-step-tokens", type=int, default=2048)
    parser.add_argument("--profile", action="store_true", help="one run under cProfile, and nothing else")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    requests = read_requests(arguments.requests)
    num_prompt = sum(len(prompt) for prompt, _ in requests)
    engines = {
        name: load_engine(
            LoadSettings(
                model=arguments.model,
                dtype=name,
                num_threads=arguments.threads,
                kv_budget_tokens=sum(len(prompt) + output for prompt, output in requests) + 1000,
                max_step_tokens=arguments.max_step_tokens,
            )
        )
        for name in arguments.dtype or ["float32", "bfloat16"]
    }
    if arguments.profile:
        engine = next(iter(engines.values()))
        run(engine, requests, "warm")
        profile = cProfile.Profile()
        profile.runcall(run, engine, requests, "profiled")
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
        return
    figures: dict[str, list[float]] = {name: [] for name in engines}
    limits: dict[str, list[float]] = {name: [] for name in engines}
    config = json.loads((Path(arguments.model) / "config.json").read_text())
    weights = sum(
        module.in_features * module.out_features
        for module in next(iter(engines.values())).model.modules()
        if isinstance(module, PackedLinear | torch.nn.Linear)
    )
    for number in range(arguments.rounds + 1):
        for name, engine in engines.items():
            seconds, tokens, _ = run(engine, requests, f"{name}{number}")
            if number:
                figures[name].append(tokens / seconds)
                flops = gemm_flops(DTYPES[name], config["hidden_size"], config["intermediate_size"])
                limits[name].append(2 * weights * (num_prompt + tokens) / flops / seconds)
    table = Table("dtype", "output tokens/s", "min - max", "share of the GEMM limit")
    for name, values in figures.items():
        table.add_row(
            name,
            f"{statistics.median(values):.0f}",
            f"{min(values):.0f} - {max(values):.0f}",
            f"{statistics.median(limits[name]):.0%}",
        )
    console.print(f"{len(requests)} requests, {num_prompt} prompt tokens, {arguments.threads} threads")
    console.print(table)
    console.print(f"torch {torch.__version__}, Python {platform.python_version()}, {_cpu()}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"output_tokens_per_s": figures, "gemm_share": limits}, indent=2) + "\n")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
