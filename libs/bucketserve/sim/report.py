"""Figures of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from bucketserve.core.types import WorkerRole
from bucketserve.sim.driver import Simulation
from bucketserve.sim.ledger import Outcome
from bucketserve.sim.percentiles import Percentiles, worst_tenth

__all__ = ["Report", "Utilisation", "make_report"]


@dataclass(frozen=True, slots=True)
class Utilisation:
    """Shares of time."""

    prefill: float
    """Of the workers that may prefill: time spent on prompts."""
    decode: float
    """Of the workers that may decode: time spent on decodes."""
    busy: float
    """Of all workers: time spent on steps of any kind."""
    kv_peak: float
    """Fullest that any worker's KV memory was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run's figures. Rates are per second of virtual time, over the time from start to the last end.

    What is said to be measured is of the interactive requests that arrived in the measured window (sim/window.py).
    """

    policy: str
    workload: str
    cluster: str
    cost: str
    device: str
    seed: int
    rate_rps: float | None
    num_requests: int
    num_finished: int
    num_refused: int
    num_dropped: int
    num_truncated_prompts: int
    num_cut_outputs: int
    duration_s: float
    num_measured: int
    slo_attainment: float
    """Share of those measured that finished within both targets."""
    goodput_rps: float
    """Such requests per second of the measured window."""
    completed_rps: float
    """Requests of any class that ended in the measured window, per second of it. Under overload: the saturation."""
    batch_tokens_per_s: float
    """Generated tokens of batch-class requests that ended in the measured window, per second of it."""
    throughput_rps: float
    tokens_per_s: float
    """Generated tokens."""
    total_tokens_per_s: float
    """Prompt and generated tokens."""
    ttft_s: Percentiles
    """Measured."""
    ttft_worst_tenth_s: float
    """Mean of the longest tenth of measured TTFTs."""
    tpot_s: Percentiles
    """Measured."""
    waste_relative: float
    waste_padded_share: float
    mean_batch: float
    limited_by: dict[str, int]
    utilisation: Utilisation
    num_evictions: int
    max_evictions: int
    """Of a single request."""
    num_edge_changes: int
    num_decisions: int
    decisions_per_s: float | None
    """Policy calls per real second spent in them; None if nothing timed them."""
    decision_ms_mean: float
    decision_ms_max: float
    overhead_share: float
    """Real seconds in the policy / virtual seconds of busy workers."""
    simulated_s_per_wall_s: float | None
    capacity_rps: float | None = None

    def as_dict(self) -> dict[str, object]:
        """Returns what --json writes."""
        return asdict(self)


def make_report(
    simulation: Simulation,
    *,
    policy: str,
    workload: str,
    cluster: str,
    device: str,
    seed: int,
    rate_rps: float | None,
    num_truncated_prompts: int,
    num_cut_outputs: int,
    wall_s: float,
) -> Report:
    """Returns the figures of a run that is over."""
    ledger, stats = simulation.ledger, simulation.stats
    records = list(ledger.records.values())
    window, measured = simulation.window, ledger.measured(simulation.window)
    window_s = window.length_s or 1.0
    ended = [record for record in records if record.outcome is Outcome.FINISHED and (record.end_s or 0.0) in window]
    finished = [record for record in records if record.outcome is Outcome.FINISHED]
    duration_s = max((record.end_s or 0.0 for record in records), default=0.0) or 1.0
    good = sum(record.is_within_slo for record in measured)
    ttft_s = [record.ttft_s for record in measured if record.ttft_s is not None]
    output_tokens = sum(record.request.output_tokens for record in finished)
    prompt_tokens = sum(record.request.prompt_tokens for record in finished)
    busy_s = sum(worker.prefill_busy_s + worker.decode_busy_s for worker in simulation.workers.values())
    spec = next(iter(simulation.workers.values())).spec
    return Report(
        policy=policy,
        workload=workload,
        cluster=cluster,
        cost=spec.cost.value,
        device=device,
        seed=seed,
        rate_rps=rate_rps,
        num_requests=len(records),
        num_finished=len(finished),
        num_refused=sum(record.outcome is Outcome.REFUSED for record in records),
        num_dropped=sum(record.outcome is Outcome.DROPPED for record in records),
        num_truncated_prompts=num_truncated_prompts,
        num_cut_outputs=num_cut_outputs,
        duration_s=duration_s,
        num_measured=len(measured),
        slo_attainment=good / len(measured) if measured else 1.0,
        goodput_rps=good / window_s,
        completed_rps=len(ended) / window_s,
        batch_tokens_per_s=sum(r.request.output_tokens for r in ended if not r.is_interactive) / window_s,
        throughput_rps=len(finished) / duration_s,
        tokens_per_s=output_tokens / duration_s,
        total_tokens_per_s=(output_tokens + prompt_tokens) / duration_s,
        ttft_s=Percentiles.of(ttft_s),
        ttft_worst_tenth_s=worst_tenth(ttft_s),
        tpot_s=Percentiles.of([record.tpot_s for record in measured if record.tpot_s is not None]),
        waste_relative=ledger.batches.waste.relative,
        waste_padded_share=ledger.batches.waste.padded_share,
        mean_batch=ledger.batches.num_requests / max(ledger.batches.num_batches, 1),
        limited_by={limit.value: number for limit, number in sorted(ledger.batches.limited_by.items(), key=str)},
        utilisation=_utilisation(simulation, duration_s),
        num_evictions=sum(worker.num_evictions for worker in simulation.workers.values()),
        max_evictions=max((record.num_evictions for record in records), default=0),
        num_edge_changes=stats.num_edge_changes,
        num_decisions=stats.num_steps,
        decisions_per_s=stats.num_steps / stats.policy_wall_s if stats.policy_wall_s else None,
        decision_ms_mean=1e3 * stats.policy_wall_s / max(stats.num_steps, 1),
        decision_ms_max=1e3 * stats.longest_step_wall_s,
        overhead_share=stats.policy_wall_s / busy_s if busy_s else 0.0,
        simulated_s_per_wall_s=duration_s / wall_s if wall_s else None,
    )


def _utilisation(simulation: Simulation, duration_s: float) -> Utilisation:
    workers = list(simulation.workers.values())
    may_prefill = [worker for worker in workers if worker.spec.role is not WorkerRole.DECODE]
    may_decode = [worker for worker in workers if worker.spec.role is not WorkerRole.PREFILL]
    busy_s = sum(worker.prefill_busy_s + worker.decode_busy_s for worker in workers)
    return Utilisation(
        prefill=sum(worker.prefill_busy_s for worker in may_prefill) / (len(may_prefill) * duration_s),
        decode=sum(worker.decode_busy_s for worker in may_decode) / (len(may_decode) * duration_s),
        busy=busy_s / (len(workers) * duration_s),
        kv_peak=max(worker.max_kv_used / worker.spec.kv_total_tokens for worker in workers),
    )
