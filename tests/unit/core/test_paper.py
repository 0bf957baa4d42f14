"""Algorithm 1 and the paper's formulas, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from bucketserve.core import paper
from bucketserve.core.adaptive import LengthHistogram, best_edges, edges_cost
from bucketserve.core.types import Bucket


def run(lengths: list[int], edges: tuple[int, ...], n_max: int, theta: float = 0.5) -> tuple[int, ...]:
    def inside(bucket: Bucket) -> list[int]:
        return [length for length in lengths if length in bucket]

    return paper.algorithm_1(
        edges, n_max, theta, lambda b: len(inside(b)), lambda b, length: sum(one < length for one in inside(b))
    )


def test_few_requests_merge_into_one_bucket() -> None:
    assert run([1, 2, 900], (256, 512, 1024), n_max=4) == (1024,)


def test_a_full_bucket_skewed_to_its_lower_half_is_split_in_the_middle() -> None:
    lengths = [10] * 6 + [900] * 4
    assert run(lengths, (1024,), n_max=5) == (512, 1024)
    assert run(lengths, (512, 1024), n_max=5) == (256, 512, 1024)


def test_a_bucket_skewed_to_its_upper_half_is_never_split() -> None:
    # As published: the test looks below the middle only.
    assert run([900] * 50, (1024,), n_max=5) == (1024,)


def test_at_exactly_n_max_buckets_stay() -> None:
    assert run([10] * 5, (512, 1024), n_max=5) == (512, 1024)


def test_formulas() -> None:
    # LLaMA-2-13B in fp16: 40 layers, 40 heads of 128, 2 bytes: 819,200 bytes per token.
    assert paper.kv_bytes(40, 40, 128, 1, 2, 1) == 819_200
    assert paper.waste_ratio([100, 50, 50]) == pytest.approx(1 / 3)
    assert paper.safe_memory(1000) == 900
    assert paper.n_max(11_500, 1024) == 11
    assert paper.n_max(10, 1024) == 1
    assert paper.upper_bound([10, 20, 60]) == 30


def test_the_two_readings_of_the_expected_waste_differ() -> None:
    lengths, edges = [10, 100], (101,)
    assert paper.expected_waste_relative(lengths, edges) == pytest.approx((0.9 + 0.0) / 2)
    assert paper.expected_waste_tokens(lengths, edges) == pytest.approx(1 - 110 / 200)


def histogram(lengths: list[int], context: int = 4096) -> LengthHistogram:
    result = LengthHistogram(context, half_life_s=30.0)
    for length in lengths:
        result.add(length, 0.0)
    return result


def test_the_programme_is_never_worse_than_any_edges_on_its_grid() -> None:
    lengths = [16] * 50 + [40] * 30 + [90] * 10 + [700] * 20 + [1500] * 15 + [4000] * 5
    known = histogram(lengths)
    edges, cost = best_edges(known, max_buckets=8, min_share=0.0)
    assert edges[-1] == 4097
    assert cost == pytest.approx(edges_cost(known, edges))
    for others in ((4097,), (256, 4097), (64, 1024, 4097), (32, 64, 128, 1024, 2048, 4097)):
        assert cost <= edges_cost(known, others) + 1e-9


def test_minimum_share_bounds_the_buckets() -> None:
    known = histogram([10] * 96 + [1000] * 2 + [4000] * 2)
    edges, _ = best_edges(known, max_buckets=8, min_share=0.05)
    assert edges == (4097,)


def test_old_arrivals_fade() -> None:
    known = LengthHistogram(4096, half_life_s=1.0)
    for _ in range(1000):
        known.add(3000, 0.0)
    for _ in range(10):
        known.add(10, 60.0)
        known.add(50, 60.0)
    edges, _ = best_edges(known, max_buckets=4, min_share=0.0)
    assert any(10 < edge <= 50 for edge in edges)


def test_a_long_prompt_of_long_ago_decides_nothing() -> None:
    usual = [16, 40, 90, 300, 700] * 40

    def edges(*early: int) -> tuple[int, ...]:
        known = LengthHistogram(131_072, half_life_s=30.0)
        for length in early:
            known.add(length, 0.0)
        for i, length in enumerate(usual):
            known.add(length, 600.0 + i)
        return best_edges(known, max_buckets=8, min_share=0.05)[0]

    assert len(edges()) > 2
    assert edges(120_000) == edges()
    assert edges(120_000, 2_000) == edges()
