"""A two-class split of prefill after LAPS / PLA-Serve (arXiv 2601.11589): short prompts never wait behind long ones.

Short prompts are batched, held back for at most min(slack, time to fill); long ones run alone, in order. With several
prefill workers each class has workers of its own, and a pressure controller with hysteresis and cooldown moves one at a
time; with a single one the classes take turns by urgency. Decode is DistServe's.
"""

from __future__ import annotations

from collections import deque

from bucketserve.core.types import Bucket, LimitedBy, Request, WorkerId, WorkerRole
from bucketserve.sim.baselines.common import KnownWorker
from bucketserve.sim.baselines.decode_pull import Disaggregated
from bucketserve.sim.baselines.distserve import DISTSERVE_MODE
from bucketserve.sim.policy_spec import PolicySpec, apart

__all__ = ["Laps", "rival"]

BOUNDARY_TOKENS = 256
SHORT_BATCH_TOKENS = 512
COOLDOWN_S = 2.0
HYSTERESIS = 2.0
SLACK_SHARE = 0.25
"""Share of a short request's TTFT target that it may be held back for."""
EWMA = 0.1


class Laps(Disaggregated):
    """See the module."""

    def __init__(
        self,
        short_batch_tokens: int = SHORT_BATCH_TOKENS,
        boundary_tokens: int = BOUNDARY_TOKENS,
        decode_watermark: float = 0.05,
    ) -> None:
        """Prompts below boundary_tokens are short, and batched up to short_batch_tokens."""
        super().__init__(decode_watermark)
        self._batch_tokens = short_batch_tokens
        self._boundary = boundary_tokens
        self._short: deque[Request] = deque()
        self._long: deque[Request] = deque()
        self._for_long: set[WorkerId] = set()
        self._last_switch_s = 0.0
        self._token_gap_s = 0.0
        """Smoothed time between short prompt tokens: predicts the time to fill."""
        self._last_short_s = 0.0

    def on_submitted(self, request: Request) -> None:
        """Queues it in its class."""
        if request.prefill_tokens >= self._boundary:
            self._long.append(request)
            return
        gap_s = (request.arrival_s - self._last_short_s) / request.prefill_tokens
        self._token_gap_s = (1 - EWMA) * self._token_gap_s + EWMA * gap_s
        self._last_short_s = request.arrival_s
        self._short.append(request)

    def schedule(self, now_s: float) -> None:
        """Lets decode pull, balances the classes, then fills idle prefill workers."""
        self.pull()
        workers = self.of_role(WorkerRole.PREFILL)
        self._balance(workers, now_s)
        for worker in workers:
            if worker.unfilled:
                continue
            if len(workers) == 1:
                self._serve_either(worker, now_s)
            elif worker.worker_id in self._for_long:
                if not self._serve_long(worker):
                    self._serve_short(worker, now_s)
            elif now_s - self._last_short_s > COOLDOWN_S and not self._short:
                self._serve_long(worker)
            else:
                self._serve_short(worker, now_s)

    def _balance(self, workers: list[KnownWorker], now_s: float) -> None:
        """Moves a prefill worker to the class under more pressure (waiting tokens per worker of the class)."""
        if len(workers) < 2:
            return
        if not self._for_long:
            self._for_long = {workers[-1].worker_id}
        if now_s - self._last_switch_s < COOLDOWN_S:
            return
        num_long = len(self._for_long)
        num_short = len(workers) - num_long
        long_load = sum(request.prefill_tokens for request in self._long) / num_long
        short_load = sum(request.prefill_tokens for request in self._short) / num_short
        if long_load > HYSTERESIS * short_load and num_short > 1:
            self._for_long.add(next(w.worker_id for w in workers if w.worker_id not in self._for_long))
            self._last_switch_s = now_s
        elif short_load > HYSTERESIS * long_load and num_long > 1:
            self._for_long.discard(max(self._for_long))
            self._last_switch_s = now_s

    def _serve_either(self, worker: KnownWorker, now_s: float) -> None:
        """The class whose head must start sooner goes first."""
        heads = sorted((_latest_s(queue[0]), i) for i, queue in enumerate((self._short, self._long)) if queue)
        for _, which in heads:
            if self._serve_short(worker, now_s) if which == 0 else self._serve_long(worker):
                return

    def _serve_long(self, worker: KnownWorker) -> bool:
        if not self._long or not self._fits(worker, self._long[0].prompt_tokens, 1):
            return False
        self.dispatch(worker, [self._long.popleft()], LimitedBy.TIME, Bucket(self._boundary, 1 << 30))
        return True

    def _serve_short(self, worker: KnownWorker, now_s: float) -> bool:
        tokens = sum(request.prefill_tokens for request in self._short)
        if not self._short or self._is_held(tokens, now_s):
            return False
        batch: list[Request] = []
        total, limited_by = 0, LimitedBy.SUPPLY
        while self._short:
            head = self._short[0]
            if batch and total + head.prefill_tokens > self._batch_tokens:
                limited_by = LimitedBy.TIME
                break
            if not self._fits(worker, total + head.prefill_tokens, len(batch) + 1):
                limited_by = LimitedBy.MEMORY
                break
            batch.append(self._short.popleft())
            total += head.prefill_tokens
        if batch:
            self.dispatch(worker, batch, limited_by, Bucket(0, self._boundary))
        return bool(batch)

    def _is_held(self, tokens: int, now_s: float) -> bool:
        """Whether the short batch should still fill; sets wake_s to the end of the wait."""
        head = self._short[0]
        fill_s = max(self._batch_tokens - tokens, 0) * self._token_gap_s
        until_s = head.arrival_s + min(SLACK_SHARE * (head.ttft_slo_s or 0.0), fill_s)
        if tokens >= self._batch_tokens or until_s <= now_s:
            return False
        self.wake_s = until_s if self.wake_s is None else min(self.wake_s, until_s)
        return True

    def _fits(self, worker: KnownWorker, tokens: int, number: int) -> bool:
        return tokens + 2 * number + 0.01 * worker.headroom.kv_total_tokens <= worker.free_tokens


def _latest_s(request: Request) -> float:
    """When its first token is due."""
    return request.arrival_s + (request.ttft_slo_s or 0.0)


def rival(short_batch_tokens: int = SHORT_BATCH_TOKENS) -> PolicySpec:
    """Returns the policy with batches of short prompts of that many tokens."""
    return PolicySpec(
        "laps",
        "short and long prompts prefilled apart (LAPS)",
        lambda _: Laps(short_batch_tokens),
        DISTSERVE_MODE,
        apart,
        sized=rival,
    )
