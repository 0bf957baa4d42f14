"""Which workers prefill and which decode, when the scheduler may choose.

Prefill is short of workers when its queue takes long to compute, decode when KV waits for room. A worker changes sides
if one side is short for a while and the other could spare one: two thresholds apart from each other, a time for which
the shortage must last, and a pause after each switch keep workers from going to and fro. A worker that changes finishes
what it has in its old role and takes new work in the new one; each side keeps at least one of each fingerprint, since
nobody else could go on with what others of that fingerprint have begun.
"""

from __future__ import annotations

from collections import Counter

from bucketserve.core.fleet import Fleet
from bucketserve.core.handover import Handover
from bucketserve.core.lanes import Lanes
from bucketserve.core.messages import SwitchRole
from bucketserve.core.settings import CoreSettings
from bucketserve.core.types import WorkerRole
from bucketserve.core.workers import WorkerState

__all__ = ["RoleBalancer"]

LOOK_S = 0.5
HOLD_S = 5.0
"""How long one side must be short of workers before another one joins it."""
COOLDOWN_S = 15.0
"""Least time between two switches."""
PREFILL_SHORT = 0.5
"""Share of the default TTFT target that the prefill queue may take; beyond it prefill is short."""
PREFILL_SPARE = 0.2
"""With one worker fewer it would still take less than this."""
DECODE_SHORT = 0.9
"""Share of the decode side's KV that is used or waited for; beyond it decode is short."""
DECODE_SPARE = 0.7


SIDES = (WorkerRole.PREFILL, WorkerRole.DECODE)
Short = tuple[WorkerRole, str | None]
"""A side that is short of workers; of the fingerprint that has none there, if it is for want of them."""


class RoleBalancer:
    """Looks at both sides twice a second."""

    def __init__(self, settings: CoreSettings, fleet: Fleet, lanes: Lanes, handover: Handover) -> None:
        """Reads all of them; changes workers' roles."""
        self._settings = settings
        self._fleet = fleet
        self._lanes = lanes
        self._handover = handover
        self._look_s = 0.0
        self._switched_s = float("-inf")
        self._short: tuple[Short, float] | None = None
        """What is short, and since when."""

    def update(self, now_s: float) -> list[SwitchRole]:
        """Returns the switch to make now, if one."""
        if not self._settings.switch_roles or now_s < self._look_s:
            return []
        self._look_s = now_s + LOOK_S
        short = self._short_side()
        if short is None or self._short is None or self._short[0] != short:
            self._short = (short, now_s) if short is not None else None
        if self._short is None or now_s - self._short[1] < HOLD_S or now_s - self._switched_s < COOLDOWN_S:
            return []
        role, fingerprint = self._short[0]
        giver = WorkerRole.DECODE if role is WorkerRole.PREFILL else WorkerRole.PREFILL
        side = self._side(giver)
        number = Counter(worker.fingerprint for worker in side)
        # The one with the least to finish.
        worker = min(
            (w for w in side if number[w.fingerprint] > 1 and fingerprint in (None, w.fingerprint)),
            key=lambda worker: (len(worker.requests), worker.worker_id),
            default=None,
        )
        if worker is None:
            return []
        self._fleet.switch(worker, role)
        self._short, self._switched_s = None, now_s
        return [SwitchRole(worker.worker_id, role)]

    def prefill_queue_s(self, num_workers: int) -> float:
        """Returns how long that many workers would compute prompts that wait, in seconds."""
        # Those that are late as well: that they are says that prefill is short.
        tokens = self._lanes.num_interactive_tokens + sum(w.backlog_tokens() for w in self._side(WorkerRole.PREFILL))
        return tokens * self._fleet.times.prefill_token_s() / max(num_workers, 1)

    def decode_use(self, num_workers: int) -> float:
        """Returns the share of the KV of that many decode workers that is used or waited for."""
        side = self._side(WorkerRole.DECODE)
        total = sum(worker.headroom.kv_total_tokens for worker in side)
        wanted = total - sum(worker.free_tokens() for worker in side) + self._handover.waiting_tokens()
        return wanted / max(total / len(side) * num_workers, 1) if side else 0.0

    def _short_side(self) -> Short | None:
        prefill, decode = (Counter(w.fingerprint for w in self._side(role)) for role in SIDES)
        both = {worker.fingerprint for worker in self._side(WorkerRole.BOTH)}
        for fingerprint in sorted((prefill.keys() | decode.keys()) - both):
            # Nobody else could do the other half for those.
            if not decode[fingerprint] and prefill[fingerprint] > 1:
                return WorkerRole.DECODE, fingerprint
            if not prefill[fingerprint] and decode[fingerprint] > 1:
                return WorkerRole.PREFILL, fingerprint
        role = self._loaded_side()
        return None if role is None else (role, None)

    def _loaded_side(self) -> WorkerRole | None:
        prefill, decode = len(self._side(WorkerRole.PREFILL)), len(self._side(WorkerRole.DECODE))
        if not prefill or not decode:
            return None
        target_s = self._settings.default_ttft_s
        is_prefill_short = self.prefill_queue_s(prefill) > PREFILL_SHORT * target_s
        is_decode_short = self.decode_use(decode) > DECODE_SHORT and self._handover.waiting_tokens() > 0
        if is_prefill_short and decode > 1 and self.decode_use(decode - 1) < DECODE_SPARE:
            return WorkerRole.PREFILL
        if is_decode_short and prefill > 1 and self.prefill_queue_s(prefill - 1) < PREFILL_SPARE * target_s:
            return WorkerRole.DECODE
        return None

    def _side(self, role: WorkerRole) -> list[WorkerState]:
        return [worker for worker in self._fleet if worker.role is role and worker.stays]
