"""The hand-over from prefill to decode workers, as DistServe does it: decode pulls, in order, when it has room."""

from __future__ import annotations

from collections import deque

from bucketserve.core.messages import BatchPrefilled, KvPulled, PullKv, RequestFinished
from bucketserve.core.types import Request, RequestId, WorkerId, WorkerRole
from bucketserve.sim.baselines.common import Baseline, KnownWorker

__all__ = ["Disaggregated"]


class Disaggregated(Baseline):
    """Prefilled requests wait at their prefill worker until a decode worker has blocks for their prompts.

    Source: LLMServe/DistServe@82831f1: decode is first come, first served; least loaded instance; the prompt's blocks
    have to be free. The paged decode workers swap their last request out when blocks run out.
    """

    def __init__(self, decode_watermark: float) -> None:
        """decode_watermark: share of a decode worker's KV kept free at hand-over, for running sequences to grow."""
        super().__init__()
        self._watermark = decode_watermark
        self._prefilled: deque[tuple[RequestId, WorkerId]] = deque()
        self.unpulled: dict[RequestId, WorkerId] = {}
        """Requests whose KV is still with the prefill worker."""

    def on_prefilled(self, event: BatchPrefilled) -> None:
        """Queues them for decode."""
        for request_id in event.request_ids:
            self._prefilled.append((request_id, event.worker_id))
            self.unpulled[request_id] = event.worker_id

    def on_finished(self, event: RequestFinished) -> None:
        """One with a single output token never reaches decode."""
        self.unpulled.pop(event.request_id, None)

    def on_pulled(self, event: KvPulled) -> None:
        """The prefill worker's memory is free again."""
        self.unpulled.pop(event.request_id, None)

    def pull(self) -> None:
        """Moves prefilled requests, in order, while there is room for the first."""
        targets = self.of_role(WorkerRole.DECODE)
        while self._prefilled:
            request_id, source_id = self._prefilled[0]
            request = self.requests.get(request_id)
            if request is None:
                self._prefilled.popleft()
                continue
            able = [target for target in targets if self._has_room(target, request)]
            if not able:
                return
            best = max(able, key=lambda target: (target.free_tokens, target.worker_id))
            best.unaccounted_tokens += request.prompt_tokens + 1
            self._prefilled.popleft()
            # Nobody here needs to tell one life of a request from another.
            self.commands.append(
                PullKv(request_id=request_id, source_id=source_id, target_id=best.worker_id, assignment=0)
            )

    def _has_room(self, target: KnownWorker, request: Request) -> bool:
        reserve = int(self._watermark * target.headroom.kv_total_tokens) if target.headroom.num_running else 0
        return request.prompt_tokens + 1 + reserve <= target.free_tokens
