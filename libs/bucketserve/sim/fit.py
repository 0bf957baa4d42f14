"""Fits a latency model to measured steps, so that the simulator can stand for this project's own engine.

Least squares on relative errors: a step of 1 ms and one of 1 s count alike. Plain Python, since the bare wheel has no
numpy and the systems have three unknowns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bucketserve.core.types import StepSample
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.latency import StepLatency
from bucketserve.sim.percentiles import nearest_rank

__all__ = ["FittedLatency", "fit_steps", "fitted_device", "relative_errors"]


@dataclass(frozen=True, slots=True)
class FittedLatency:
    """A fit and how far off it is."""

    latency: StepLatency
    mean_relative_error: float
    """Mean of |predicted - measured| / measured over all samples, mixed steps included."""
    p90_relative_error: float
    num_samples: int


def fit_steps(samples: Sequence[StepSample]) -> FittedLatency:
    """Returns the fit of DistServe's form (see sim/latency.py).

    Prefill-only and decode-only steps determine the coefficients, none of them negative; mixed steps only test them.

    Raises:
        SimulationError: fewer than three steps of either kind.
    """
    prefill = [s for s in samples if s.prefill_tokens and not s.decode_sequences and s.duration_s > 0]
    decode = [s for s in samples if s.decode_sequences and not s.prefill_tokens and s.duration_s > 0]
    if len(prefill) < 3 or len(decode) < 3:
        raise SimulationError(f"{len(prefill)} prefill-only and {len(decode)} decode-only steps: need 3 of each")
    p = _fit([(1.0, float(s.prefill_tokens), float(s.prefill_attention)) for s in prefill], _durations(prefill))
    d = _fit([(1.0, float(s.decode_context_tokens), float(s.decode_sequences)) for s in decode], _durations(decode))
    latency = StepLatency(p[0], p[1], p[2], ((0, d[0], d[1], d[2]),))
    errors = relative_errors(latency, samples)
    return FittedLatency(latency, sum(errors) / len(errors), nearest_rank(errors, 90), len(errors))


def relative_errors(latency: StepLatency, samples: Sequence[StepSample]) -> list[float]:
    """Returns |predicted - measured| / measured of each step, ascending."""
    return sorted(_relative_error(latency, sample) for sample in samples if sample.duration_s > 0)


def fitted_device(
    fitted: FittedLatency, *, name: str, source: str, context_tokens: int, kv_total_tokens: int, kv_bytes_per_token: int
) -> dict[str, object]:
    """Returns the content of a data file, which sim.latency.parse_device reads."""
    latency = fitted.latency
    return {
        "name": name,
        "source": source,
        "note": f"mean relative error {fitted.mean_relative_error:.3f}, p90 {fitted.p90_relative_error:.3f}, "
        f"{fitted.num_samples} steps",
        "context_tokens": context_tokens,
        "coefficients_unit": "s",
        "parallel": {
            "1": {
                "prefill": [latency.prefill_a_s, latency.prefill_b_s, latency.prefill_c_s],
                "decode": [list(terms) for terms in latency.decode],
                "kv_total_tokens": kv_total_tokens,
            }
        },
        "scale": {"prefill_fixed": 1.0, "prefill_variable": 1.0, "decode": 1.0},
        "memory": {"kv_bytes_per_token": kv_bytes_per_token},
        "kv_link": {"bytes_per_s": 1e9, "latency_s": 0.001},
        "fit": {
            "mean_relative_error": fitted.mean_relative_error,
            "p90_relative_error": fitted.p90_relative_error,
            "num_samples": fitted.num_samples,
        },
    }


def _durations(samples: Sequence[StepSample]) -> list[float]:
    return [sample.duration_s for sample in samples]


def _relative_error(latency: StepLatency, s: StepSample) -> float:
    predicted_s = latency.step_s(s.prefill_tokens, s.prefill_attention, s.decode_sequences, s.decode_context_tokens)
    return abs(predicted_s - s.duration_s) / s.duration_s


def _fit(rows: Sequence[tuple[float, ...]], durations: Sequence[float]) -> list[float]:
    """Weighted least squares; a negative coefficient is set to 0 and the rest fitted again."""
    active = list(range(len(rows[0])))
    while True:
        # Columns are scaled to mean 1, or the squares of long prompts would drown the fixed part in rounding.
        scales = [sum(row[i] for row in rows) / len(rows) or 1.0 for i in active]
        weighted = [
            [row[i] / scale / y for i, scale in zip(active, scales, strict=True)]
            for row, y in zip(rows, durations, strict=True)
        ]
        found = _solve_normal(weighted)
        worst = min(range(len(active)), key=lambda i: found[i])
        if found[worst] >= 0 or len(active) == 1:
            result = [0.0] * len(rows[0])
            for index, scale, value in zip(active, scales, found, strict=True):
                result[index] = max(value, 0.0) / scale
            return result
        del active[worst]


def _solve_normal(rows: Sequence[Sequence[float]]) -> list[float]:
    """Solves min |R x - 1| by the normal equations, with a breath of ridge against collinear columns."""
    n = len(rows[0])
    matrix = [[sum(row[i] * row[j] for row in rows) for j in range(n)] for i in range(n)]
    right = [sum(row[i] for row in rows) for i in range(n)]
    for i in range(n):
        matrix[i][i] *= 1 + 1e-9
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(matrix[k][i]))
        matrix[i], matrix[pivot], right[i], right[pivot] = matrix[pivot], matrix[i], right[pivot], right[i]
        if matrix[i][i] == 0.0:
            continue
        for k in range(i + 1, n):
            factor = matrix[k][i] / matrix[i][i]
            for j in range(i, n):
                matrix[k][j] -= factor * matrix[i][j]
            right[k] -= factor * right[i]
    solution = [0.0] * n
    for i in reversed(range(n)):
        rest = right[i] - sum(matrix[i][j] * solution[j] for j in range(i + 1, n))
        solution[i] = rest / matrix[i][i] if matrix[i][i] else 0.0
    return solution
