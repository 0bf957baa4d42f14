"""How long a worker's step takes, fitted online to the steps it reports.

    step = fixed + a x prompt tokens + b x prompt tokens x context + c x decode context + d x decoding sequences

The form is DistServe's (arXiv 2401.09670, simdistserve), with one fixed part since a step reads the weights once.
Recursive least squares on relative errors, with forgetting; a coefficient below zero counts as zero. The covariance
is kept as U D U' with a unit upper triangle U and a positive diagonal D (Bierman, Factorization Methods for Discrete
Sequential Estimation, 1977): updated as it is, steps of microseconds make it indefinite in the end, and the fit runs
away.
"""

from __future__ import annotations

from operator import mul

from bucketserve.core.types import StepSample

__all__ = ["StepTimes"]

# Units that bring the coefficients to the same order of magnitude: 1, tokens, token pairs, tokens, sequences.
SCALES = (1.0, 1e3, 1e6, 1e4, 1e2)
PRIORS = (0.05, 1.0, 0.1, 0.05, 0.1)
"""How large each coefficient may be, in seconds per unit above: until both vary, tokens explain more than the rest."""
NOISE = 0.05
"""Relative scatter of measured steps. The covariance is kept in units of it."""
VARIANCES = tuple((prior / NOISE) ** 2 for prior in PRIORS)
FORGETTING = 0.995
GROWTH = FORGETTING**-0.5
GOOD_ENOUGH = 0.02
"""A step that was predicted this well teaches nothing; skipping it keeps learning cheap."""


class StepTimes:
    """Five coefficients and their uncertainty. Predicts 0 s before anything was measured."""

    def __init__(self) -> None:
        """Knows nothing."""
        n = len(SCALES)
        self._coefficients = [0.0] * n
        self._clipped = _clip(self._coefficients)
        self._columns = [[0.0] * j for j in range(n)]
        """Of U, what is above the diagonal."""
        self._diagonal = list(VARIANCES)
        self.num_samples = 0
        self.relative_error = 1.0
        """Of predictions made before learning from the step, exponentially weighted."""

    def learn(self, sample: StepSample) -> None:
        """Takes a measured step."""
        if sample.duration_s <= 0:
            return
        predicted_s = self.step_s(
            sample.prefill_tokens,
            sample.prefill_attention,
            sample.decode_sequences,
            sample.decode_context_tokens,
        )
        error = abs(predicted_s - sample.duration_s) / sample.duration_s
        self.num_samples += 1
        self.relative_error += (min(error, 1.0) - self.relative_error) * max(0.05, 1.0 / self.num_samples)
        if error > GOOD_ENOUGH:
            self._update(sample)

    def step_s(self, prefill_tokens: int, attention: int, sequences: int, context_tokens: int) -> float:
        """Returns the predicted duration of a step, in seconds."""
        if not self.num_samples:
            return 0.0
        fixed, tokens, pairs, context, decodes = self._clipped
        return fixed + tokens * prefill_tokens + pairs * attention + context * context_tokens + decodes * sequences

    def prefill_s(self, num_tokens: int) -> float:
        """Returns the predicted duration of one prompt alone."""
        return self.step_s(num_tokens, num_tokens * num_tokens, 0, 0)

    def decode_s(self, sequences: int, context_tokens: int) -> float:
        """Returns the predicted duration of a decode step."""
        return self.step_s(0, 0, sequences, context_tokens)

    def prefill_token_s(self) -> float:
        """Returns what a further prompt token adds to a step, without its attention."""
        return self._clipped[1]

    def _update(self, sample: StepSample) -> None:
        weight = 1.0 / sample.duration_s
        units = (
            weight,
            weight * sample.prefill_tokens / 1e3,
            weight * sample.prefill_attention / 1e6,
            weight * sample.decode_context_tokens / 1e4,
            weight * sample.decode_sequences / 1e2,
        )
        coefficients, columns, diagonal = self._coefficients, self._columns, self._diagonal
        error = 1.0 - sum(map(mul, coefficients, units))
        # Bierman's update, column by column: f = U'u, g = Df, and what the measurement leaves of D and U.
        gains: list[float] = []
        variances: list[float] = []
        spread = FORGETTING
        for j, column in enumerate(columns):
            seen = units[j] + sum(map(mul, column, units))
            gain = diagonal[j] * seen
            before = spread
            spread += seen * gain
            diagonal[j] = left = diagonal[j] * (before / spread)
            step = -seen / before
            for i, old in enumerate(column):
                column[i] = new = old + gains[i] * step
                gains[i] += old * gain
                variances[i] += new * new * left
            gains.append(gain)
            variances.append(left)
        for i, gain in enumerate(gains):
            coefficients[i] += gain / spread * error
        self._clipped = _clip(coefficients)
        # Forget only what is certain: without new evidence of its kind a coefficient must not run away.
        for i, variance in enumerate(variances):
            if variance < VARIANCES[i] * FORGETTING:
                # Row and column i of the covariance, times the root of 1 / FORGETTING each.
                diagonal[i] /= FORGETTING
                for column in columns[i + 1 :]:
                    column[i] *= GROWTH
                columns[i] = [value / GROWTH for value in columns[i]]


def _clip(coefficients: list[float]) -> list[float]:
    """Returns the coefficients per single unit, none below zero."""
    return [max(value, 0.0) / scale for value, scale in zip(coefficients, SCALES, strict=True)]
