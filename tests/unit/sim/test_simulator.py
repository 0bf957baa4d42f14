"""Latency models, workloads, experiments and the command."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bucketserve.core.step_times import StepTimes
from bucketserve.core.types import StepSample
from bucketserve.sim.capacity import find_capacities, find_capacity
from bucketserve.sim.cluster import aggregated, layout_name, parse_cluster, splits
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.experiment import Experiment, run_experiment
from bucketserve.sim.fit import fit_steps, fitted_device
from bucketserve.sim.latency import load_device, parse_device
from bucketserve.sim.policies import find_policy, with_settings
from bucketserve.sim.workload import Arrivals, make_workload, read_trace
from bucketserve_cli.main import app

DEVICE = load_device("a100-40gb-13b")
A100_80 = load_device("a100-80gb-13b")


def experiment(policy: str = "adaptive", **more) -> Experiment:
    values = {
        "source": "mixed",
        "source_name": "mixed",
        "device": DEVICE,
        "num_requests": 150,
        "min_span_s": 0.0,
        **more,
    }
    return Experiment(policy=find_policy(policy), **values)


def test_published_coefficients_give_the_published_times() -> None:
    # 13B, one A100-80GB (arXiv 2401.09670's artefact): prefill of 512 and 2,048 tokens, decode steps of 16 and 256.
    latency = A100_80.latency[1]
    assert latency.prefill_s(512) == pytest.approx(0.072, abs=0.001)
    assert latency.prefill_s(2048) == pytest.approx(0.257, abs=0.001)
    assert latency.step_s(0, 0, 16, 16 * 600) == pytest.approx(0.027, abs=0.001)
    assert latency.step_s(0, 0, 256, 256 * 600) == pytest.approx(0.137, abs=0.001)


def test_a_run_of_decodes_costs_the_sum_of_its_steps() -> None:
    latency = DEVICE.latency[1]
    for number, context, steps in ((3, 900, 40), (120, 9000, 7)):
        one_by_one = sum(latency.step_s(0, 0, number, context + i * number) for i in range(steps))
        assert latency.decode_run_s(steps, number, context) == pytest.approx(one_by_one)
        assert latency.decode_steps_until(one_by_one, number, context) == steps


def test_the_same_seed_gives_the_same_report_and_another_seed_another() -> None:
    first, again = (run_experiment(experiment(seed=3), aggregated(2), 2.0) for _ in range(2))
    assert asdict(first) == asdict(again)
    assert first.ttft_s != run_experiment(experiment(seed=4), aggregated(2), 2.0).ttft_s


def test_capacity_is_a_rate_that_keeps_the_target_and_more_is_too_much() -> None:
    what = experiment("chunked", num_requests=300)
    found = find_capacity(what, [aggregated(2)], 0.9, start_rps=4.0)
    assert found.slo_attainment >= 0.9
    assert found.capacity_rps is not None
    assert run_experiment(what, aggregated(2), found.capacity_rps * 1.5).slo_attainment < 0.9


def test_one_search_finds_the_capacities_of_several_targets() -> None:
    what = experiment("chunked", num_requests=300)
    found = find_capacities(what, [aggregated(2)], [0.99, 0.8], start_rps=4.0)
    assert [found[target].slo_attainment >= target for target in (0.8, 0.99)] == [True, True]
    assert (found[0.8].capacity_rps or 0.0) > (found[0.99].capacity_rps or 0.0) > 0
    # Stopping early changes no answer: a search for the higher target alone is given up later.
    assert find_capacity(what, [aggregated(2)], 0.99, start_rps=4.0).capacity_rps == found[0.99].capacity_rps


def test_a_longer_span_means_more_requests_at_a_higher_rate() -> None:
    what = experiment(source="alpaca", source_name="alpaca", num_requests=50, min_span_s=20.0)
    assert run_experiment(what, aggregated(2), 1.0).num_requests == 50
    assert run_experiment(what, aggregated(2), 10.0).num_requests == 200


def test_workloads_have_the_published_percentiles_and_fit_the_context() -> None:
    workload = make_workload("mixed", num_requests=4000, rate_rps=5, context_tokens=4096, seed=1)
    prompts = sorted(request.prompt_tokens for request in workload.requests)
    assert 40 <= prompts[len(prompts) // 4] <= 60
    assert 2500 <= prompts[3 * len(prompts) // 4] <= 3000
    assert all(r.prompt_tokens + r.output_tokens <= 4096 for r in workload.requests)
    assert workload.num_truncated_prompts > 0
    assert workload.span_s == pytest.approx(800, rel=0.1)


def test_bursty_arrivals_have_the_same_rate_and_a_greater_spread() -> None:
    def gaps(kind: Arrivals) -> list[float]:
        drawn = make_workload("alpaca", num_requests=4000, rate_rps=10, context_tokens=4096, seed=1, arrivals=kind)
        times = [request.arrival_s for request in drawn.requests]
        return [b - a for a, b in itertools.pairwise(times)]

    def spread(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5 / mean

    smooth, bursty = gaps(Arrivals.POISSON), gaps(Arrivals.GAMMA)
    assert sum(smooth) == pytest.approx(sum(bursty), rel=0.15)
    assert spread(smooth) == pytest.approx(1.0, abs=0.1)
    assert spread(bursty) == pytest.approx(2.0, abs=0.25)


def test_a_trace_is_read_with_its_times_and_errors_name_the_line(tmp_path: Path) -> None:
    good = tmp_path / "t.csv"
    good.write_text("arrival_s,prompt_tokens,output_tokens\n5,10,2\n6,20,3\n8.5,30,4\n")
    rows = read_trace(good)
    workload = make_workload(
        rows, num_requests=9, rate_rps=None, context_tokens=4096, seed=0, arrivals=Arrivals.RECORDED
    )
    assert [request.arrival_s for request in workload.requests] == [0.0, 1.0, 3.5]
    bad = tmp_path / "bad.csv"
    bad.write_text("arrival_s,prompt_tokens,output_tokens\n5,ten,2\n")
    with pytest.raises(SimulationError, match="line 2"):
        read_trace(bad)
    with pytest.raises(SimulationError, match="no column output_tokens"):
        (tmp_path / "c.csv").write_text("arrival_s,prompt_tokens\n1,2\n")
        read_trace(tmp_path / "c.csv")


def test_clusters_are_read_and_written() -> None:
    for text in ("4xboth", "1xprefill+3xdecode", "1xprefill/tp2+2xdecode"):
        assert layout_name(parse_cluster(text)) == text
    assert layout_name(parse_cluster("2p2d")) == "2xprefill+2xdecode"
    assert len(splits(4)) == 3
    for bad in ("", "4xcook", "2xprefill", "0xboth"):
        with pytest.raises(SimulationError):
            parse_cluster(bad)


def steps(count: int, noise: float) -> list[StepSample]:
    rng = random.Random(3)
    latency, samples = DEVICE.latency[1], []
    for i in range(count):
        prompt = rng.randint(10, 3000) if i % 2 else 0
        sequences, context = (0, 0) if i % 2 else (rng.randint(1, 64), rng.randint(100, 40_000))
        seconds = latency.step_s(prompt, prompt * prompt, sequences, context) * (1 + rng.uniform(-noise, noise))
        samples.append(
            StepSample(
                prefill_tokens=prompt,
                prefill_attention=prompt * prompt,
                decode_sequences=sequences,
                decode_context_tokens=context,
                duration_s=seconds,
            )
        )
    return samples


def test_a_fit_finds_the_coefficients_and_survives_its_data_file() -> None:
    fitted = fit_steps(steps(400, 0.03))
    assert fitted.mean_relative_error < 0.03
    device = parse_device(
        json.loads(
            json.dumps(
                fitted_device(
                    fitted, name="x", source="y", context_tokens=4096, kv_total_tokens=1000, kv_bytes_per_token=10
                )
            )
        )
    )
    for tokens in (100, 2000):
        assert device.latency[1].prefill_s(tokens) == pytest.approx(DEVICE.latency[1].prefill_s(tokens), rel=0.05)
    with pytest.raises(SimulationError, match="need 3"):
        fit_steps(steps(4, 0.0))


def test_step_times_learned_online_predict_new_steps() -> None:
    times = StepTimes()
    assert times.prefill_s(1000) == 0.0
    for sample in steps(300, 0.05):
        times.learn(sample)
    latency = DEVICE.latency[1]
    for tokens in (60, 500, 2500):
        assert times.prefill_s(tokens) == pytest.approx(latency.prefill_s(tokens), rel=0.15)
    for number, context in ((4, 3000), (48, 30_000)):
        assert times.decode_s(number, context) == pytest.approx(latency.step_s(0, 0, number, context), rel=0.15)
    assert times.relative_error < 0.15


def test_settings_as_text_and_what_is_wrong_with_them() -> None:
    changed = with_settings(
        find_policy("adaptive"), {"edges": "none", "is_time_aware": "false", "max_batch_tokens": "3"}
    )
    assert changed.settings is not None
    assert (changed.settings.max_batch_tokens, changed.settings.is_time_aware) == (3, False)
    for values in ({"nonsense": "1"}, {"max_batch_tokens": "many"}, {"is_time_aware": "perhaps"}):
        with pytest.raises(SimulationError):
            with_settings(find_policy("adaptive"), values)
    with pytest.raises(SimulationError, match="not the core"):
        with_settings(find_policy("chunked"), {"max_batch_tokens": "3"})


def test_the_command_writes_the_figures_and_explains_errors(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["sim", "--policy", "adaptive", "--rate", "2", "--requests", "80", "--span", "0", "--json", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--cluster", "1xprefill+3xdecode"])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    wanted = "tokens_per_s goodput_rps slo_attainment waste_relative waste_padded_share decisions_per_s capacity_rps"
    assert set(wanted.split()) <= set(figures)
    assert set(figures["ttft_s"]) >= {"p50", "p90", "p99"} and set(figures["utilisation"]) >= {"prefill", "decode"}
    assert figures["decisions_per_s"] > 0 and 0 < figures["slo_attainment"] <= 1
    bad = CliRunner().invoke(app, ["sim", "--policy", "magic"])
    assert bad.exit_code == 2
    assert "adaptive" in bad.output
