"""Measures steps of this project's own engine and fits the simulator's latency model to them.

Prints the fit's error on steps that it was not fitted to, and writes a device model for
`bucketserve sim --device FILE`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from rich.console import Console
from rich.progress import track

from bucketserve.core.types import RequestId, StepSample
from bucketserve.engine.loader import LoadSettings, load_engine
from bucketserve.ports import SequenceSpec
from bucketserve.sim.fit import fit_steps, fitted_device, relative_errors
from bucketserve.sim.percentiles import nearest_rank

ROOT = Path(__file__).resolve().parents[1]
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "demo" / "model"))
    parser.add_argument("--name", default="cpu-demo")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "libs" / "bucketserve" / "sim" / "data" / "cpu-demo.json")
    arguments = parser.parse_args()
    engine = load_engine(
        LoadSettings(model=arguments.model, num_threads=arguments.threads, kv_budget_tokens=100_000, max_sequences=64)
    )
    context = engine.info.context_tokens
    rng = random.Random(1)
    samples: list[StepSample] = []
    try:
        for number in track(range(arguments.rounds), "measuring", console=console):
            batch = []
            for i in range(rng.choice((1, 2, 4, 8, 16, 32, 48))):
                prompt = rng.choice((rng.randint(5, 80), rng.randint(100, min(1500, context // 2))))
                batch.append(
                    SequenceSpec(
                        request_id=RequestId(f"{number}-{i}"),
                        token_ids=tuple(rng.randrange(10, 4000) for _ in range(prompt)),
                        max_new_tokens=rng.randint(4, 48),
                    )
                )
            engine.add(batch)
            while engine.has_work():
                sample = engine.step().sample
                if sample is not None:
                    samples.append(sample)
    finally:
        engine.close()
    rng.shuffle(samples)
    held_out, used = samples[: len(samples) // 4], samples[len(samples) // 4 :]
    fitted = fit_steps(used)
    errors = relative_errors(fitted.latency, held_out)
    mean, p90 = sum(errors) / len(errors), nearest_rank(errors, 90)
    console.print(
        f"{len(used)} steps fitted: mean relative error {fitted.mean_relative_error:.1%}; "
        f"{len(held_out)} steps held out: mean {mean:.1%}, p90 {p90:.1%}"
    )
    device = fitted_device(
        fitted,
        name=arguments.name,
        source=f"benchmarks/fit_engine.py: {Path(arguments.model).parent.name} model, {arguments.threads} thread(s)",
        context_tokens=context,
        kv_total_tokens=100_000,
        kv_bytes_per_token=engine.info.kv_bytes_per_token,
    )
    device["held_out"] = {"mean_relative_error": mean, "p90_relative_error": p90, "num_samples": len(errors)}
    arguments.out.write_text(json.dumps(device, indent=2) + "\n")
    console.print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
