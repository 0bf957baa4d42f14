"""Whether a model's workers do everything, or half of them prefill and half decode: tried out, and kept if better.

No formula says beforehand which is better: it depends on how much prompts disturb decoding, on what moving KV costs and
on the mix. So the other layout is tried for a window between two windows of the present one, and adopted only if it
beats both of them by a margin. What counts is what interactive clients felt: TTFT and TPOT relative to their targets.
Windows with little trouble are left alone; a trial that changes nothing doubles the time to the next one, and a change
of the mix ends the wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from bucketserve.core.fleet import Fleet
from bucketserve.core.messages import SwitchRole
from bucketserve.core.settings import CoreSettings
from bucketserve.core.types import Request, RequestClass, WorkerId, WorkerRole
from bucketserve.core.workers import WorkerState

__all__ = ["LayoutChooser"]

MIN_REQUESTS = 20
"""A window is not over before so many requests that arrived in it have ended."""
PATIENCE = 4
"""Windows' time after which one without enough requests ends with nothing learnt."""
WORTH = 0.3
"""Below this cost everybody is served well within the targets, and nothing is tried."""
GAIN = 0.1
"""The other layout must cost less than either window of the present one by this share."""
WORST = 4.0
"""A request that misses a target by more than this factor counts as this: one outlier decides nothing."""
MIX_FACTOR = 2.0
"""Another mix has so many times as many prompt tokens to an output token, or so many times fewer."""
MIX_MEMORY = 0.75
"""Weight of the windows before in the mix: with bursts a single window says little about it."""
MOST_BACKOFF = 16


@dataclass(slots=True)
class _Window:
    since_s: float
    number: int = 0
    cost: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def mean(self) -> float:
        return self.cost / max(self.number, 1)


class LayoutChooser:
    """Decides for all workers of a model; does nothing unless settings.choose_layout is set."""

    def __init__(self, settings: CoreSettings, fleet: Fleet) -> None:
        """Starts with workers that do everything."""
        self._settings = settings
        self._fleet = fleet
        self._is_adopted = False
        """Whether apart is the present layout, trials aside."""
        self._trial: list[float] = []
        """Costs of the windows of the trial that runs: present, other, present again."""
        self._window = _Window(0.0)
        self._prompt_tokens = self._output_tokens = 0.0
        """Of all windows, the older the less."""
        self._tried_mix = 0.0
        self._next_s = 0.0
        self._backoff = 1

    @property
    def is_apart(self) -> bool:
        """Whether prefill and decode are apart now."""
        return self._is_adopted != (len(self._trial) == 1)

    def finished(self, request: Request, prefilled_s: float | None, output_tokens: int, now_s: float) -> None:
        """Takes what a request's client felt; requests from before the window belong to the layout before."""
        settings, window = self._settings, self._window
        is_judged = request.request_class is RequestClass.INTERACTIVE and request.arrival_s >= window.since_s
        if prefilled_s is None or not is_judged:
            return
        ttft = (prefilled_s - request.arrival_s) / (request.ttft_slo_s or settings.default_ttft_s)
        tpot_s = (now_s - prefilled_s) / max(output_tokens - 1, 1)
        tpot = tpot_s / (request.tpot_slo_s or settings.default_tpot_s)
        window.number += 1
        window.cost += (min(ttft, WORST) + min(tpot, WORST)) / 2
        window.prompt_tokens += request.prefill_tokens
        window.output_tokens += output_tokens

    def update(self, now_s: float) -> list[SwitchRole]:
        """Returns the switches to make now."""
        workers = [worker for worker in self._fleet if worker.stays and not worker.keeps_kv]
        if not self._settings.choose_layout or not workers:
            return []
        age_s = now_s - self._window.since_s
        if len(workers) < 2:
            self._is_adopted, self._trial, self._window = False, [], _Window(now_s)
        elif self._window.number >= MIN_REQUESTS and age_s >= self._settings.layout_window_s:
            self._close(self._window, now_s)
            self._window = _Window(now_s)
        elif age_s > PATIENCE * self._settings.layout_window_s:
            # Nothing to learn from; a trial that ran is over.
            self._trial, self._window = [], _Window(now_s)
        return self._align(workers)

    def _close(self, window: _Window, now_s: float) -> None:
        """Goes one step on with what a window showed."""
        self._prompt_tokens = MIX_MEMORY * self._prompt_tokens + window.prompt_tokens
        self._output_tokens = MIX_MEMORY * self._output_tokens + window.output_tokens
        if self._trial:
            self._trial.append(window.mean)
            if len(self._trial) == 3:
                self._judge(*self._trial, now_s=now_s)
            return
        mix = self._prompt_tokens / max(self._output_tokens, 1.0)
        ratio = mix / self._tried_mix if self._tried_mix else 0.0
        has_changed = not 1 / MIX_FACTOR < ratio < MIX_FACTOR
        if window.mean < WORTH or not (has_changed or now_s >= self._next_s):
            return
        if has_changed:
            self._backoff = 1
        self._tried_mix = mix
        self._trial = [window.mean]

    def _judge(self, before: float, other: float, after: float, *, now_s: float) -> None:
        self._trial = []
        if other < (1 - GAIN) * min(before, after):
            self._is_adopted = not self._is_adopted
            self._backoff = 1
        else:
            self._backoff = min(2 * self._backoff, MOST_BACKOFF)
        self._next_s = now_s + self._backoff * self._settings.layout_retry_s

    def _align(self, workers: list[WorkerState]) -> list[SwitchRole]:
        """Gives workers the roles of the layout; where it is kept already nothing happens."""
        wanted = {worker.worker_id: worker.role for worker in workers}
        if not self.is_apart:
            wanted = dict.fromkeys(wanted, WorkerRole.BOTH)
        else:
            for fingerprint in {worker.fingerprint: None for worker in workers}:
                wanted |= _apart([worker for worker in workers if worker.fingerprint == fingerprint])
        switches = []
        for worker in workers:
            role = wanted[worker.worker_id]
            if worker.role is not role:
                self._fleet.switch(worker, role)
                switches.append(SwitchRole(worker.worker_id, role))
        return switches


def _apart(workers: list[WorkerState]) -> dict[WorkerId, WorkerRole]:
    """Returns roles of workers of one fingerprint, none of which can decode what those of another have prefilled."""
    if len(workers) < 2:
        return {worker.worker_id: WorkerRole.BOTH for worker in workers}
    sides = {role: [worker.worker_id for worker in workers if worker.role is role] for role in WorkerRole}
    prefill, decode = sides[WorkerRole.PREFILL], sides[WorkerRole.DECODE]
    for worker_id in sides[WorkerRole.BOTH]:
        (prefill if len(prefill) <= len(decode) else decode).append(worker_id)
    # A side whose last worker is gone gets one of the other's.
    if not prefill:
        prefill.append(decode.pop())
    elif not decode:
        decode.append(prefill.pop())
    return dict.fromkeys(prefill, WorkerRole.PREFILL) | dict.fromkeys(decode, WorkerRole.DECODE)
