"""Random steps and draws, by CUDA's kernels and by torch: on a GPU, or by Triton's interpreter without one.

    TRITON_INTERPRET=1 python -m tests.integration.engine.device_attention cpu

Triton reads that variable when it is imported, so that tests without a GPU need a process of their own.
"""

from __future__ import annotations

import argparse
import itertools
import random
from array import array
from collections.abc import Sequence

import torch

from bucketserve.engine import loader
from bucketserve.engine.attention import AttentionCall, Segment, StepPlan
from bucketserve.engine.cuda.plan import plan_step
from bucketserve.engine.cuda.race import race
from bucketserve.engine.kv_memory import PAGE_TOKENS, KvLayout, KvMemory, num_pages
from tests.race_cases import check_not_finite, check_race

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
NUM_TOKENS = 6000


class Layer(torch.nn.Module):
    """What attention wants to know of a layer."""

    layer_idx = 0


def difference(seed: int, device: torch.device, dtypes: list[torch.dtype]) -> tuple[str, float]:
    """Returns what was tried, and the difference from float32 by what is tolerated; infinite where the KV is wrong."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    is_cpu = device.type == "cpu"
    kv_heads, group = rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 4, 7))
    dim = rng.choice((16, 20, 64, 80) if is_cpu else (16, 20, 64, 80, 96, 128, 256))
    layout = KvLayout(kv_heads, dim, rng.choice((dim, dim, 32)))
    dtype = rng.choice(dtypes)
    sinks = rng.choice((None, None, torch.randn(kv_heads * group, device=device)))
    call = AttentionCall(
        layout,
        scale=rng.choice((0.1, 0.3)),
        window=rng.choice((None, None, 5, 40, 100)),
        softcap=rng.choice((None, None, 20.0)),
        chunk=rng.choice((None, None, None, 33)),
        group=group,
    )
    memory = KvMemory([layout], NUM_TOKENS, dtype, device)
    memory.keys[0].normal_()
    memory.values[0].normal_()
    pages = list(range(memory.num_pages))
    rng.shuffle(pages)
    segments: list[Segment] = []
    table = array("q")
    first = 0
    for _ in range(rng.randint(1, 4 if is_cpu else 20)):
        context = rng.choice((1, 2, 31, 32, 33, 64, rng.randint(1, 300)))
        number = rng.choice((1, 1, context, rng.randint(1, context)))
        segments.append(Segment(first, number, len(table) * PAGE_TOKENS, context))
        first += number
        table.extend(pages.pop() for _ in range(num_pages(context)))
    # As models pass them: views whose tokens or heads come first in memory.
    query, key = (
        torch.randn(1, first, heads, dim, dtype=dtype, device=device).transpose(1, 2)
        for heads in (kv_heads * group, kv_heads)
    )
    value = torch.randn(1, kv_heads, first, layout.value_dim, dtype=dtype, device=device)
    asked = {"s_aux": sinks}
    exact = KvMemory([layout], NUM_TOKENS, torch.float32, device)
    exact.keys[0].copy_(memory.keys[0])
    exact.values[0].copy_(memory.values[0])
    found = plan_step(memory, {0: call}, segments, table).attend(Layer(), query, key, value, None, asked).float()
    given = (x.float() for x in (query, key, value))
    wanted = StepPlan(exact, {0: call}, segments, table).attend(Layer(), *given, None, asked)
    told = f"{call} {dtype} {[(s.num_tokens, s.context) for s in segments]} sinks={sinks is not None}"
    if not (
        torch.equal(memory.keys[0].float(), exact.keys[0]) and torch.equal(memory.values[0].float(), exact.values[0])
    ):
        return told, float("inf")
    # Token by token: a short context must not hide behind a long one.
    shares = (found - wanted).flatten(2).norm(dim=2) / wanted.flatten(2).norm(dim=2)
    return told, float(shares.max()) / TOLERANCE[dtype]


def check_draws(device: torch.device, sizes: Sequence[int]) -> None:
    """Compares the device's draws with torch's."""
    for size, dtype in itertools.product(sizes, (torch.float32, torch.float64)):
        check_race(race, size, 3.0, dtype, device)
    check_not_finite(race, device)


def serve_by_device_plans() -> None:
    """Has engines in this process attend as they would on CUDA, whatever their device."""
    loader._is_by_triton = lambda *given: True
    loader._forward = lambda model, memory, probed, planner, *rest, **how: loader.EagerForward(
        model, memory, probed.calls, planner
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--model", action="append", default=[], help="of models.CONFIGS, to be served")
    options = parser.parse_args()
    device = torch.device(options.device)
    # The interpreter computes with numpy, which has no bfloat16.
    dtypes = [torch.float32, torch.float16] if device.type == "cpu" else list(TOLERANCE)
    for seed in range(options.cases):
        told, share = difference(seed, device, dtypes)
        assert share <= 1, f"case {seed}: {told}: {share:.3g} x what is tolerated"
    check_draws(device, (1, 50, 2048, 5000) if device.type == "cpu" else (1, 50, 2048, 5000, 128_256))
    if options.model:
        from tests.integration.engine.models import engine, generate
        from tests.integration.engine.test_equality import drain, prompt, spec

        serve_by_device_plans()
        for name in options.model:
            under_test = engine(name, kernels="torch")
            outputs: dict[str, list[int]] = {}
            lengths = (1, 33, 70)
            for length in lengths:
                under_test.add([spec(f"r{length}", prompt(length), 4)], 48)
                drain(under_test, outputs, steps=1)
            drain(under_test, outputs)
            assert outputs == {f"r{length}": generate(name, prompt(length), 4) for length in lengths}, name
    print(f"{options.cases} cases, draws and {len(options.model)} models are right")


if __name__ == "__main__":
    main()
