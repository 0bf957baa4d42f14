"""UELLM (arXiv 2409.14961, ICSOC 2024): SLO- and output-driven batching on aggregated workers.

Reimplemented from its description: waiting requests are sorted by w1 x deadline + w2 x predicted output, then cut in
that order while (predicted - largest predicted so far) x (n + 1) x 1.2 stays below a threshold and n below a cap.
Outputs are predicted by class with the published accuracy; a miss lands in a neighbouring class. Two forms: static
batches, which is what UELLM does, and continuous batching, so that the comparison doesn't rest on static batches alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from bucketserve.core.types import LimitedBy, Request, RequestId
from bucketserve.sim.baselines.common import Baseline, KnownWorker
from bucketserve.sim.policy_spec import PolicyContext, PolicySpec, together
from bucketserve.sim.sequence import TABLE_MODE, Discipline

__all__ = ["UELLM_CONTINUOUS_MODE", "UELLM_MODE", "Uellm", "continuous", "predict_output", "rival"]

UELLM_MODE = replace(TABLE_MODE, discipline=Discipline.STATIC)
UELLM_CONTINUOUS_MODE = TABLE_MODE

ACCURACY = 0.85
DEADLINE_WEIGHT = 1.0
OUTPUT_WEIGHT = 0.5
THRESHOLD = 15_000.0
CLASSES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def predict_output(true_tokens: int, rng: random.Random) -> int:
    """Returns the upper bound of the predicted output class; right with probability ACCURACY, else a neighbour's."""
    index = next((i for i, bound in enumerate(CLASSES) if true_tokens <= bound), len(CLASSES) - 1)
    if rng.random() >= ACCURACY:
        index = min(max(index + rng.choice((-1, 1)), 0), len(CLASSES) - 1)
    return CLASSES[index]


class Uellm(Baseline):
    """See the module."""

    def __init__(
        self, true_output: Callable[[RequestId], int], seed: int, *, is_static: bool, max_batch: int = 10
    ) -> None:
        """true_output: what the predictor is right about most of the time."""
        super().__init__()
        self._true_output = true_output
        self._rng = random.Random(seed)
        self._is_static = is_static
        self._max_batch = max_batch
        self._waiting: dict[RequestId, Request] = {}
        self._predicted: dict[RequestId, int] = {}

    def on_submitted(self, request: Request) -> None:
        """Predicts its output and queues it."""
        self._waiting[request.request_id] = request
        self._predicted[request.request_id] = predict_output(self._true_output(request.request_id), self._rng)

    def schedule(self, now_s: float) -> None:
        """Cuts batches in UELLM's order for the workers that can take one."""
        able = [worker for worker in self.workers.values() if self._can_take(worker)]
        if not able or not self._waiting:
            return
        ordered = sorted(self._waiting.values(), key=self._rank)
        for worker in sorted(able, key=lambda worker: (-worker.free_tokens, worker.worker_id)):
            batch, limited_by = self._cut(ordered, worker)
            if not batch:
                continue
            for request in batch:
                del self._waiting[request.request_id], self._predicted[request.request_id]
            ordered = ordered[len(batch) :]
            self.dispatch(worker, batch, limited_by)
            if not ordered:
                return

    def _can_take(self, worker: KnownWorker) -> bool:
        return worker.is_idle if self._is_static else not worker.unfilled

    def _rank(self, request: Request) -> tuple[float, str]:
        deadline_s = request.arrival_s + (request.ttft_slo_s or 0.0)
        return DEADLINE_WEIGHT * deadline_s + OUTPUT_WEIGHT * self._predicted[request.request_id], request.request_id

    def _cut(self, ordered: list[Request], worker: KnownWorker) -> tuple[list[Request], LimitedBy]:
        batch: list[Request] = []
        prompt = limit = reserved = largest = 0
        for request in ordered:
            predicted = self._predicted[request.request_id]
            prompt, limit = max(prompt, request.prompt_tokens), max(limit, request.max_new_tokens)
            padded = (len(batch) + 1) * (prompt + limit)
            needed = padded if self._is_static else reserved + request.reserved_tokens
            if needed > worker.free_tokens:
                return batch, LimitedBy.MEMORY
            if batch and (predicted - largest) * (len(batch) + 1) * 1.2 > THRESHOLD:
                return batch, LimitedBy.TIME
            if len(batch) == self._max_batch:
                return batch, LimitedBy.COUNT
            batch.append(request)
            reserved, largest = reserved + request.reserved_tokens, max(largest, predicted)
        return batch, LimitedBy.SUPPLY


def _build(context: PolicyContext, *, is_static: bool) -> Uellm:
    return Uellm(lambda request_id: context.drawn(request_id).output_tokens, context.seed, is_static=is_static)


def rival() -> PolicySpec:
    """Returns the policy as it is published."""
    return PolicySpec(
        "uellm", "UELLM with static batches", lambda context: _build(context, is_static=True), UELLM_MODE, together
    )


def continuous(step_tokens: int = UELLM_CONTINUOUS_MODE.max_step_tokens) -> PolicySpec:
    """Returns its order with continuous batching, in steps of that many tokens."""
    return PolicySpec(
        "uellm-continuous",
        "UELLM's order with continuous batching",
        lambda context: _build(context, is_static=False),
        replace(UELLM_CONTINUOUS_MODE, max_step_tokens=step_tokens),
        together,
        sized=continuous,
    )
