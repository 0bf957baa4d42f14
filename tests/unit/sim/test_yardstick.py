"""What capacities are measured with: output limits, the measured window, devices, prefixes."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketserve.core.types import RequestClass
from bucketserve.sim.cluster import aggregated
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.experiment import Experiment, run_experiment
from bucketserve.sim.latency import CostMode, load_device
from bucketserve.sim.limits import FLAT_TOKENS, ROUND_TOKENS, OutputLimits, draw_limit
from bucketserve.sim.percentiles import worst_tenth
from bucketserve.sim.policies import find_policy, with_settings
from bucketserve.sim.prefix_cache import PrefixCache
from bucketserve.sim.report import Report
from bucketserve.sim.window import Window
from bucketserve.sim.workload import BLOCK_TOKENS, Arrivals, Lengths, largest_request, make_workload, read_trace

A100_40, A100_80, H100 = (load_device(name) for name in ("a100-40gb-13b", "a100-80gb-13b", "h100-80gb-8b"))


def workload(source="mixed", number: int = 1000, rate: float = 5.0, context: int = 4096, seed: int = 1, **more):
    return make_workload(source, num_requests=number, rate_rps=rate, context_tokens=context, seed=seed, **more).requests


# --- output limits ----------------------------------------------------------------------------------------------------


def test_half_of_the_limits_are_round_a_quarter_flat_a_quarter_exact() -> None:
    rng = random.Random(7)
    kinds = Counter(draw_limit(100, rng) for _ in range(8000))
    # 100 tokens: at least twice that is 256 or the next, 512.
    assert set(kinds) == {256, 512, FLAT_TOKENS, 100}
    for limit, share in ((256, 0.25), (512, 0.25), (FLAT_TOKENS, 0.25), (100, 0.25)):
        assert kinds[limit] / 8000 == pytest.approx(share, abs=0.02)


@given(st.integers(1, 10_000), st.integers(0, 2**32))
def test_a_limit_is_one_of_those_that_clients_send(output: int, seed: int) -> None:
    limit = draw_limit(output, random.Random(seed))
    assert limit >= output
    assert limit in (output, FLAT_TOKENS, *ROUND_TOKENS)
    if limit > max(output, FLAT_TOKENS):
        assert limit >= 2 * output or limit == ROUND_TOKENS[-1]


def test_limits_are_drawn_apart_and_fit_the_context() -> None:
    drawn, exact = workload(), workload(limits=OutputLimits.EXACT)
    same = [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in drawn]
    assert same == [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in exact]
    assert all(r.max_new_tokens == r.output_tokens for r in exact)
    assert all(r.output_tokens <= r.max_new_tokens <= 4096 - r.prompt_tokens for r in drawn)
    assert sum(r.max_new_tokens > r.output_tokens for r in drawn) > 600
    assert drawn == workload()


def test_a_longer_workload_begins_with_the_shorter_one() -> None:
    for source in ("mixed", [Lengths(10 * i, i) for i in range(1, 40)]):
        assert workload(source, number=300)[:100] == workload(source, number=100)


def test_batch_class_requests_are_drawn_by_share_and_have_no_part_in_attainment() -> None:
    drawn = workload(batch_share=0.3)
    share = sum(r.request_class is RequestClass.BATCH for r in drawn) / len(drawn)
    assert share == pytest.approx(0.3, abs=0.05)
    what = Experiment(
        policy=find_policy("chunked-edf"),
        source="alpaca",
        source_name="alpaca",
        device=A100_40,
        num_requests=300,
        min_span_s=0.0,
        batch_share=0.3,
    )
    report = run_experiment(what, aggregated(1), 5.0)
    assert 130 < report.num_measured < 200
    assert report.batch_tokens_per_s > 0


# --- the measured window ----------------------------------------------------------------------------------------------


@given(st.floats(0, 1e6), st.floats(0, 1e5))
def test_the_window_leaves_out_warm_up_and_tail_and_keeps_most(span_s: float, longest_s: float) -> None:
    window = Window.of(span_s, longest_s)
    assert 0 <= window.start_s <= longest_s
    assert window.length_s >= 0.8 * span_s - 1e-6
    assert window.start_s == pytest.approx(span_s - window.end_s, abs=1e-6)


def test_arrivals_last_ten_times_the_longest_request() -> None:
    what = Experiment(policy=find_policy("chunked"), source="alpaca", source_name="alpaca", device=A100_40)
    prompt, output = largest_request("alpaca", 4096)
    assert output == 473
    assert what.span_s() == 10 * A100_40.alone_s(prompt, output)
    report = run_experiment(what, aggregated(1), 20.0)
    assert report.num_requests == round(20 * what.span_s()) > 1000
    assert 0.75 * report.num_requests < report.num_measured < 0.95 * report.num_requests


def test_requests_alone_take_their_prefill_and_a_step_per_further_token() -> None:
    latency = A100_40.latency[1]
    steps = sum(latency.step_s(0, 0, 1, 101 + i) for i in range(9))
    assert A100_40.alone_s(100, 10) == pytest.approx(latency.prefill_s(100) + steps)
    assert A100_40.alone_s(100, 1) == latency.prefill_s(100)


def test_a_lost_run_ends_early_and_is_below_the_target() -> None:
    what = Experiment(policy=find_policy("chunked"), source="mixed", source_name="mixed", device=A100_40)
    whole, stopped = (run_experiment(what, aggregated(1), 2.0, stop_below=below) for below in (0.0, 0.8))
    assert whole.slo_attainment < 0.8 and stopped.slo_attainment < 0.8
    assert stopped.num_finished < whole.num_finished == whole.num_requests


def test_the_worst_tenth_is_a_mean_of_the_longest() -> None:
    assert worst_tenth([]) == 0.0
    assert worst_tenth([3.0]) == 3.0
    assert worst_tenth([float(i) for i in range(1, 21)]) == 19.5


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_the_worst_tenth_lies_between_its_members(values: list[float]) -> None:
    least = sorted(values)[-math.ceil(len(values) / 10)]
    assert least * (1 - 1e-9) <= worst_tenth(values) <= max(values) * (1 + 1e-9)


# --- devices ----------------------------------------------------------------------------------------------------------


def test_the_devices_are_starved_of_memory_balanced_and_bound_by_prefill() -> None:
    assert A100_40.kv_total_tokens[1] == pytest.approx(12_800, rel=0.01)
    assert A100_80.kv_total_tokens[1] == 66_144
    assert H100.kv_total_tokens[1] == pytest.approx(411_500, rel=0.001)
    # 64 mean requests of Mixed at once: what their KV takes of the memory, and prefill's share of their work.
    shares = []
    for device in (A100_40, A100_80, H100):
        latency = device.latency[1]
        step_s = latency.step_s(0, 0, 64, 64 * 1400) / 64
        prefill_s = latency.prefill_s(1300) - latency.prefill_a_s
        shares.append((64 * 1500 / device.kv_total_tokens[1], prefill_s / (prefill_s + 170 * step_s)))
    assert [memory > 1 for memory, _ in shares] == [True, True, False]
    assert shares[2][1] > 0.5


def test_the_derived_device_follows_from_its_data_sheet() -> None:
    latency = H100.latency[1]
    # 989 TFLOP/s at half of peak, 14 GFLOP a token; 16 GB of weights at 0.8 x 3.35 TB/s and a millisecond.
    assert 1 / latency.prefill_b_s == pytest.approx(989e12 * 0.5 / (2 * 6.98e9))
    assert latency.step_s(0, 0, 1, 0) == pytest.approx(16.06e9 / 2.68e12 + 0.001 + latency.prefill_b_s, rel=1e-3)
    assert H100.kv_bytes_per_token == 131_072
    assert H100.context_tokens == 131_072


# --- shared prefixes --------------------------------------------------------------------------------------------------


def test_a_trace_with_block_hashes_is_read_and_cut_with_its_prompts(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl.gz"
    rows = [
        {"i": 0, "t": 0.5, "in": 1100, "out": 6, "h": [1, 2, 3]},
        {"i": 1, "t": 2.0, "in": 600, "out": 2, "h": [1, 9]},
    ]
    with gzip.open(file, "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    read = read_trace(file)
    assert read == [Lengths(1100, 6, 0.5, (1, 2, 3)), Lengths(600, 2, 2.0, (1, 9))]
    twice = workload(read, number=4)
    assert [r.block_hashes for r in twice[:2]] == [r.block_hashes for r in twice[2:]]
    hashes = sorted(r.block_hashes for r in twice[:2])
    # Whole blocks only: the last one of either is not full.
    assert hashes == [(1,), (1, 2)]
    file.write_bytes(gzip.compress(b'{"t": 1, "in": 5, "out": 1}\n{"t": 1, "in": 5}\n'))
    with pytest.raises(SimulationError, match="line 2"):
        read_trace(file)


def test_a_prefix_cache_forgets_the_least_recently_used_and_nothing_in_use() -> None:
    cache = PrefixCache()
    cache.hold([1, 2, 3])
    cache.shrink(0)
    assert cache.num_tokens_of([1, 2, 9]) == 2 * BLOCK_TOKENS
    cache.hold([1, 5])
    cache.release([1, 2, 3])
    cache.release([1, 5])
    cache.shrink(3 * BLOCK_TOKENS)
    # 3 was released first of all; 1 is the oldest that both used, and goes last of its chain.
    assert cache.num_tokens_of([1, 2, 3]) == 2 * BLOCK_TOKENS
    cache.shrink(0)
    assert cache.num_tokens_of([1]) == 0


def test_routing_by_prefix_spares_work_that_routing_without_does() -> None:
    roots = 12
    rows = [Lengths(8200, 20, None, tuple(100 * (i % roots) + b for b in range(16))) for i in range(240)]
    ttft_s = {}
    for name in ("lmetric", "chunked"):
        what = Experiment(
            policy=find_policy(name), source=rows, source_name="prefixes", device=H100, num_requests=240, min_span_s=0.0
        )
        ttft_s[name] = run_experiment(what, aggregated(4), 4.0).ttft_s.mean
    assert ttft_s["lmetric"] < 0.7 * ttft_s["chunked"]


# --- buckets ----------------------------------------------------------------------------------------------------------


def test_edges_give_back_what_padding_takes_where_prefill_is_the_bottleneck() -> None:
    def run(edges: str, cost: CostMode) -> Report:
        # An engine that pads computes one batch at a time, and is given no more.
        experiment = Experiment(
            policy=with_settings(find_policy("adaptive"), {"edges": edges, "fill_tokens": "1"}),
            source="mixed",
            source_name="mixed",
            device=H100,
            num_requests=600,
            min_span_s=15.0,
            seed=1,
            cost=cost,
            arrivals=Arrivals.GAMMA,
            burstiness_cv=3.0,
        )
        return run_experiment(experiment, aggregated(4), 51.0)

    packed, apart, mixed = (
        run(edges, cost)
        for edges, cost in (("none", CostMode.PACKED), ("adaptive", CostMode.PADDED), ("none", CostMode.PADDED))
    )
    assert apart.waste_padded_share < 0.02
    assert mixed.waste_padded_share > 0.05
    assert apart.slo_attainment > mixed.slo_attainment + 0.02
    assert apart.slo_attainment > packed.slo_attainment - 0.01
