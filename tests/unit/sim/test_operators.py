"""Policies side by side, rivals' step sizes, and public complaints as scenarios."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from bucketserve.sim.cluster import aggregated
from bucketserve.sim.experiment import Experiment, run_experiment
from bucketserve.sim.latency import load_device
from bucketserve.sim.operators import TARGETS, Case, best_step, measure, saturation
from bucketserve.sim.policies import POLICIES, find_policy
from bucketserve.sim.policy_spec import STEP_SIZES
from bucketserve.sim.scenarios import SCENARIOS, run_scenario
from bucketserve.sim.workload import Arrivals
from tests.cli import run_command

SMALL = Case(
    policy="chunked", device="a100-80gb-13b", workload="mixed", num_workers=1, num_requests=120, min_span_s=60.0,
    start_rps=1.5,
)  # fmt: skip
SHORT = ("--workers", "1", "--requests", "60", "--span", "20", "--rate", "1.5", "--device", "a100-80gb-13b")


def test_capacity_falls_with_attainment_and_is_below_saturation() -> None:
    measured = measure(SMALL)
    capacities = [measured.at[target].capacity_rps for target in TARGETS]
    assert capacities == sorted(capacities, reverse=True) and capacities[-1] > 0
    assert 0 < measured.goodput_rps < capacities[0]
    assert measured.light_ttft_p99_s <= measured.at[0.8].ttft_p99_s
    assert measured.at[0.95].ttft_worst_tenth_s <= measured.at[0.95].ttft_p99_s * 3
    most_rps = saturation(SMALL, capacities[0])
    assert most_rps > 0.8 * capacities[1]
    # What is found does not depend on where the search begins.
    assert saturation(SMALL, 2 * capacities[0]) == pytest.approx(most_rps, rel=0.15)
    assert measure(SMALL) == measured


def test_a_rival_gets_the_step_size_that_serves_it_best_and_the_core_what_is_served() -> None:
    assert best_step(SMALL) in STEP_SIZES
    assert best_step(replace(SMALL, policy="adaptive")) == 0


@pytest.mark.parametrize("name", [name for name, spec in POLICIES.items() if spec.sized is not None])
def test_a_policy_with_another_step_size_is_the_same_policy_otherwise(name: str) -> None:
    sized = POLICIES[name].sized
    assert sized is not None
    assert sized(256).name == sized(4096).name == name


def at_rate(policy: str, **more):
    what = {"source": "mixed", "source_name": "mixed", "device": load_device("a100-40gb-13b"), "seed": 5, **more}
    return run_experiment(Experiment(policy=find_policy(policy), **what), aggregated(4), 2.0)


def test_priorities_serve_interactive_requests_before_batch_class() -> None:
    plain, by_priority = (at_rate(name, batch_share=0.3) for name in ("chunked", "chunked-edf"))
    assert by_priority.slo_attainment > plain.slo_attainment
    assert by_priority.batch_tokens_per_s > 0


def test_chunks_sized_by_slack_keep_decodes_on_their_pace() -> None:
    # Steps of up to 4,096 tokens: fixed they take longer than a token may, sized by slack they don't.
    fixed, by_slack = (
        run_experiment(
            Experiment(
                policy=POLICIES[name].sized(4096),
                source="longbench",
                source_name="longbench",
                device=load_device("a100-80gb-13b"),
                seed=5,
                num_requests=600,
                min_span_s=0.0,
            ),
            aggregated(1),
            1.2,
        )
        for name in ("chunked", "qoserve")
    )
    assert by_slack.tpot_s.p99 < 0.1 < fixed.tpot_s.p99


def test_bursts_cost_capacity() -> None:
    smooth, bursty = (measure(replace(SMALL, arrivals=kind)).at[0.95] for kind in (Arrivals.POISSON, Arrivals.GAMMA))
    assert bursty.capacity_rps < smooth.capacity_rps


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_complaint_runs_and_prints_its_figures(name: str, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    status, out, _ = run_command("sim", "--scenario", name, "--json", str(file))
    assert status == 0
    scenario = SCENARIOS[name]
    assert scenario.source in out
    for heading in ("TTFT p50", "TPOT p99", "in SLO", "tokens/s", "preemptions", "most of one"):
        assert heading in out
    rows = json.loads(file.read_text())[name]
    for policy in ("adaptive", "chunked", "chunked-edf"):
        mine = [row for row in rows if row["policy"] == policy]
        names = [cohort.name for cohort in scenario.cohorts] + ([f"{scenario.alone}, alone"] if scenario.alone else [])
        assert [row["cohort"] for row in mine] == names
        for row in mine:
            assert row["cohort"] in out
            assert math.isfinite(row["ttft_max_s"]) and row["tokens_per_s"] > 0
            assert row["ttft_s"]["p50"] <= row["ttft_s"]["p99"] <= row["ttft_max_s"]
            assert row["max_evictions"] <= row["num_evictions"]


def test_scenarios_reproduce_what_was_complained_about() -> None:
    def figures(name: str) -> dict[str, object]:
        return {row.cohort: row for row in run_scenario(SCENARIOS[name], ["chunked"])}

    # In order of arrival short prompts wait for all long ones; a head that doesn't fit holds up those that would.
    short = figures("long-before-short")
    assert short["small"].ttft_s.p99 > 20 * short["small, alone"].ttft_s.p99
    head = figures("head-of-line")
    assert head["small"].ttft_s.p50 > 5 * head["small, alone"].ttft_s.p99
    # Memory given out as it is used runs out: some sequences lose it again and again.
    assert figures("thrash")["all"].max_evictions > 2
    assert figures("outgrown-memory")["all"].num_evictions > 10


def test_a_batch_job_uses_what_interactive_waves_leave_and_costs_them_little() -> None:
    figures = run_scenario(SCENARIOS["waves-over-batch"], ["adaptive", "chunked-edf"])
    found = {(row.policy, row.cohort): row for row in figures}
    assert found["adaptive", "interactive"].slo_attainment >= 0.95
    assert found["adaptive", "job"].tokens_per_s > 1.1 * found["chunked-edf", "job"].tokens_per_s


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_batch_job_that_was_there_first_gives_way(seed: int) -> None:
    found = {row.cohort: row for row in run_scenario(SCENARIOS["job-before-chat"], ["adaptive"], seed)}
    assert found["interactive"].slo_attainment >= 0.95
    assert found["interactive"].ttft_max_s < 3.0
    assert found["job"].max_evictions <= 2


def test_the_command_compares_policies(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    status, out, _ = run_command("sim", "--compare", "adaptive,chunked", *SHORT, "--seeds", "2", "--json", str(file))
    assert status == 0
    for text in ("80%", "95%", "99%", "TTFT p99", "worst tenth", "at 0.7", "served", "x 1.00", "saturation", "2 seeds"):
        assert text in out
    found = json.loads(file.read_text())
    assert [(row["case"]["policy"], row["case"]["seed"]) for row in found["measured"]] == [
        ("adaptive", 0), ("adaptive", 1), ("chunked", 0), ("chunked", 1),
    ]  # fmt: skip
    assert all(row["at"]["0.95"]["capacity_rps"] > 0 for row in found["measured"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--compare", "adaptive,magic"), "magic"),
        (("--compare", "all", "--tpot", "0.2"), "targets"),
        (("--compare", "all", "--arrivals", "recorded"), "searches rates"),
        (("--scenario", "nothing"), "head-of-line"),
    ],
)
def test_what_cannot_be_compared_is_said(arguments: tuple[str, ...], says: str) -> None:
    status, _, err = run_command("sim", *arguments)
    assert status == 2
    assert says in err
