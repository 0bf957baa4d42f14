"""SLO-aware chunking after QoServe / Niyama (arXiv 2503.22562, ASPLOS'26).

- Dynamic chunks: a step computes as many prompt tokens as the running decodes' slack to their TPOT allows.
- Hybrid order of prompts: deadline plus a multiple of the work left, between earliest deadline and shortest first.
- Eager relegation: who can't meet its TTFT any more gives way to everyone who can.

Its latency predictor is the truth here for the chunks, and fitted online for the order. Slack is counted from the first
token, as this project judges TPOT, not from the arrival.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import replace
from math import inf

from bucketserve.core.messages import WorkerReported
from bucketserve.core.step_times import StepTimes
from bucketserve.core.types import Request, RequestClass
from bucketserve.sim.baselines.chunked import Chunked, Rank, chunked_mode
from bucketserve.sim.policy_spec import PolicySpec, together
from bucketserve.sim.sequence import SimSequence

__all__ = ["QoServe", "rival"]

STEP_TOKENS = 2048
"""Largest chunk, where the decodes have slack for it."""
WORK_WEIGHT = 1.0
"""How many seconds later a prompt counts per second of its own prefill."""
RELEGATED_S = 1e5
"""How much later a prompt counts at its worker that is late already; less than batch class."""


class QoServe(Chunked):
    """A queue of those in time, one of those relegated."""

    def __init__(self, step_tokens: int = STEP_TOKENS) -> None:
        """See Chunked."""
        super().__init__(step_tokens)
        self._relegated: deque[Request] = deque()
        self._times = StepTimes()

    def on_reported(self, event: WorkerReported) -> None:
        """Learns how long steps take."""
        for sample in event.steps:
            self._times.learn(sample)

    def on_submitted(self, request: Request) -> None:
        """Batch class is relegated from the start."""
        if request.request_class is RequestClass.BATCH:
            self._relegated.append(request)
        else:
            super().on_submitted(request)

    def rank(self, request: Request) -> Rank:
        """Deadline and work."""
        work_s = self._times.prefill_s(request.prompt_tokens)
        return (request.arrival_s + (request.ttft_slo_s or 0.0) + WORK_WEIGHT * work_s, 0.0, request.request_id)

    def schedule(self, now_s: float) -> None:
        """Those in time first; the relegated take what is left."""
        while self._queue:
            request = self._queue[0][1]
            due_s = request.arrival_s + (request.ttft_slo_s or 0.0)
            if now_s + self._times.prefill_s(request.prompt_tokens) > due_s:
                self._relegated.append(request)
            elif not self.hand_out(request):
                return
            heapq.heappop(self._queue)
        while self._relegated and self.hand_out(self._relegated[0]):
            self._relegated.popleft()


def _urgency(sequence: SimSequence, now_s: float) -> float:
    return sequence.due_s + (RELEGATED_S if now_s > sequence.due_s else 0.0)


def rival(step_tokens: int = STEP_TOKENS) -> PolicySpec:
    """Returns the policy with steps of at most that many tokens."""
    return PolicySpec(
        "qoserve",
        "chunks sized by slack, deadline and work in order, the late relegated (QoServe/Niyama)",
        lambda _: QoServe(step_tokens),
        replace(chunked_mode(step_tokens), most_lent=inf, urgency=_urgency),
        together,
        sized=rival,
    )
