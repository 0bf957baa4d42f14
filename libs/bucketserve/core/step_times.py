"""How long a worker's step takes, fitted online to the steps it reports.

    step = fixed + a x prompt tokens + b x prompt tokens x context + c x decode context + d x decoding sequences

The form is DistServe's (arXiv 2401.09670, simdistserve), with one fixed part since a step reads the weights once.
Recursive least squares on relative errors, with forgetting; a coefficient below zero counts as zero.
"""

from __future__ import annotations

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
GOOD_ENOUGH = 0.02
"""A step that was predicted this well teaches nothing; skipping it keeps learning cheap."""


class StepTimes:
    """Five coefficients and their uncertainty. Predicts 0 s before anything was measured."""

    def __init__(self) -> None:
        """Knows nothing."""
        n = len(SCALES)
        self._coefficients = [0.0] * n
        self._clipped = _clip(self._coefficients)
        self._covariance = [[VARIANCES[i] if i == j else 0.0 for j in range(n)] for i in range(n)]
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
        covariance, n = self._covariance, len(units)
        gains = [sum(row[j] * units[j] for j in range(n)) for row in covariance]
        spread = FORGETTING + sum(unit * gain for unit, gain in zip(units, gains, strict=True))
        error = 1.0 - sum(value * unit for value, unit in zip(self._coefficients, units, strict=True))
        for i in range(n):
            share = gains[i] / spread
            self._coefficients[i] += share * error
            row = covariance[i]
            for j in range(n):
                row[j] -= share * gains[j]
        self._clipped = _clip(self._coefficients)
        # Forget only what is certain: without new evidence of its kind a coefficient must not run away.
        for i in range(n):
            if covariance[i][i] < VARIANCES[i] * FORGETTING:
                grow = FORGETTING**-0.5
                for j in range(n):
                    covariance[i][j] *= grow
                    covariance[j][i] *= grow


def _clip(coefficients: list[float]) -> list[float]:
    """Returns the coefficients per single unit, none below zero."""
    return [max(value, 0.0) / scale for value, scale in zip(coefficients, SCALES, strict=True)]
