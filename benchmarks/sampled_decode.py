"""Seconds of a decode step by how its tokens are chosen: the best ones, drawn ones, drawn from what filters leave.

    python benchmarks/reference_model.py MODEL --kind gemma      once
    python benchmarks/sampled_decode.py --model MODEL --jsonl OUT

Ways take turns, some steps each, so that all see the same machine. What drawing costs goes by the vocabulary. The
models of random weights have flat distributions, of which top_p alone leaves nearly all, as none that was trained.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path

from conditions import conditions
from rich.console import Console
from rich.table import Table

from bucketserve.core.types import RequestId
from bucketserve.engine.loader import LoadSettings, load_engine
from bucketserve.ports import Engine, Sampling, SequenceSpec

WAYS = {
    "greedy": Sampling(),
    "temperature 1": Sampling(temperature=1.0),
    "top_k 64, top_p 0.95": Sampling(temperature=1.0, top_k=64, top_p=0.95),
    "top_p 0.95, flat": Sampling(temperature=1.0, top_p=0.95),
    "top_k 40, repetition 1.1": Sampling(temperature=0.7, top_k=40, repetition_penalty=1.1),
}
STREAMS = (1, 16)
PROMPT_TOKENS = 128


def steps(engine: Engine, name: str, sampling: Sampling, streams: int, number: int) -> list[float]:
    """Returns the seconds of so many decode steps of so many sequences."""
    rng = random.Random(streams)
    ids = [RequestId(f"{name}-{i}") for i in range(streams)]
    engine.add(
        [
            SequenceSpec(
                request_id=request_id,
                token_ids=tuple(rng.randrange(100, 4000) for _ in range(PROMPT_TOKENS)),
                max_new_tokens=number + 8,
                sampling=sampling,
            )
            for request_id in ids
        ]
    )
    while engine.headroom().num_waiting:
        engine.step()
    engine.step()
    seconds = []
    for _ in range(number):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    engine.cancel(ids)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--label", default="", help="goes into each line")
    parser.add_argument("--jsonl", type=Path)
    options = parser.parse_args()
    engine = load_engine(
        LoadSettings(model=options.model, dtype=options.dtype, num_threads=os.cpu_count() or 1, kv_budget_tokens=8000)
    )
    found: dict[tuple[int, str], list[float]] = {}
    for turn in range(options.rounds):
        for streams in STREAMS:
            for way, sampling in WAYS.items():
                seconds = steps(engine, f"{turn}-{streams}-{way}", sampling, streams, options.steps)
                found.setdefault((streams, way), []).append(statistics.median(seconds))
    table = Table("streams", "tokens", "ms of a step", "least", "most")
    rows = []
    for (streams, way), medians in found.items():
        row = [1000 * each for each in (statistics.median(medians), min(medians), max(medians))]
        table.add_row(str(streams), way, *(f"{each:.1f}" for each in row))
        rows.append({"streams": streams, "way": way, "step_ms": row[0], "rounds_ms": [1000 * m for m in medians]})
    Console().print(table)
    if options.jsonl:
        with options.jsonl.open("a", encoding="utf-8") as file:
            head = conditions(model=Path(options.model).name, dtype=options.dtype, label=options.label)
            for row in rows:
                file.write(json.dumps({**head, **row}) + "\n")
    engine.close()


if __name__ == "__main__":
    main()
