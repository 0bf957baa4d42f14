"""A worker whose fake engine fails when it is ordered to: python -m tests.chaos.worker. Not a part of the product.

Orders are files in $CHAOS_ORDERS. WORKER.weights says, when it starts, which weights it serves; WORKER.order holds one
word for its next step, and is removed when it is obeyed. $CHAOS_REMOTE: as if other workers were on other machines.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bucketserve.core.errors import EngineError
from bucketserve.engine.fake import FakeEngine
from bucketserve.ports import SequenceFailure, SequenceSpec, StepOutput

__all__ = ["WEIGHTS", "FailingEngine"]

WEIGHTS = {"old": 256, "new": 251}
"""Sizes of the vocabulary: engines that differ in it have other fingerprints and say other tokens."""
HANG_S = 120.0
STALL_S = 1.0
FAILURE = "ordered by a test"


class FailingEngine(FakeEngine):
    """Looks for an order before each step."""

    orders: Path
    name: str
    refuses_kv = False

    def step(self) -> StepOutput:
        """Obeys, and steps."""
        match self._order():
            case "raise":
                raise RuntimeError(FAILURE)
            case "hang":
                time.sleep(HANG_S)
            case "stall":
                time.sleep(STALL_S)
            case "fail":
                return self._failed()
            case "refuse":
                self.refuses_kv = True
        return super().step()

    def import_kv(self, spec: SequenceSpec, generated: Sequence[int], kv: memoryview) -> None:
        """Does not take the next KV that comes, if so ordered."""
        if self.refuses_kv:
            self.refuses_kv = False
            raise EngineError(FAILURE)
        super().import_kv(spec, generated, kv)

    def _failed(self) -> StepOutput:
        """A step in which whatever runs fails, not by its own fault."""
        failed = list(self._running) or list(self._waiting)
        self.cancel(failed)
        failures = [SequenceFailure(request_id=key, message=FAILURE, is_retryable=True) for key in failed]
        return replace(super().step(), failures=tuple(failures))

    def _order(self) -> str:
        order = self.orders / f"{self.name}.order"
        try:
            word = order.read_text()
            order.unlink()
        except FileNotFoundError:
            return ""
        return word


def _engine(settings, on_progress):
    load = engines._fake(settings, on_progress)

    def failing() -> FakeEngine:
        FailingEngine.orders, FailingEngine.name = Path(os.environ["CHAOS_ORDERS"]), settings.worker_id
        weights = FailingEngine.orders / f"{settings.worker_id}.weights"
        vocab_size = WEIGHTS[weights.read_text() if weights.exists() else "old"]
        return FailingEngine(replace(load().settings, vocab_size=vocab_size))

    return failing


if __name__ == "__main__":
    from bucketserve.starting import leave_on_signal

    leave_on_signal()

    from bucketserve.process import service_main
    from bucketserve_worker import engines, kv_holder
    from bucketserve_worker.app import serve
    from bucketserve_worker.settings import WorkerSettings

    engines._LOADERS["fake"] = _engine
    if os.environ.get("CHAOS_REMOTE"):
        kv_holder.locality = lambda: ""
    sys.exit(service_main("worker", WorkerSettings, serve, lambda settings: settings.drain_s))
