"""Targets of simulated interactive requests: the same for every policy."""

from __future__ import annotations

from dataclasses import dataclass

from bucketserve.core.types import Request, RequestClass, RequestId
from bucketserve.sim.latency import DeviceModel
from bucketserve.sim.workload import SimRequest, core_hashes

__all__ = ["Slo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What each request wants, and what the policy is told of it.

    TTFT <= ttft_fixed_s + ttft_factor x the request's prefill alone on one device; mean time per further token <=
    tpot_s.
    """

    ttft_fixed_s: float = 0.25
    ttft_factor: float = 3.0
    tpot_s: float = 0.1
    rejects_early: bool = False
    """Requests ask to be refused at once when their TTFT can't be met."""

    def ttft_s(self, device: DeviceModel, prompt_tokens: int) -> float:
        """Returns a prompt's target, in seconds."""
        return self.ttft_fixed_s + self.ttft_factor * device.latency[min(device.latency)].prefill_s(prompt_tokens)

    def request(self, request_id: RequestId, drawn: SimRequest, ttft_s: float) -> Request:
        """Returns the request as the policy sees it: a limit instead of the true output. Batch class has no targets."""
        is_batch = drawn.request_class is RequestClass.BATCH
        return Request(
            request_id=request_id,
            prompt_tokens=drawn.prompt_tokens,
            max_new_tokens=drawn.max_new_tokens,
            arrival_s=drawn.arrival_s,
            request_class=drawn.request_class,
            ttft_slo_s=None if is_batch else ttft_s,
            tpot_slo_s=None if is_batch else self.tpot_s,
            block_hashes=core_hashes(drawn.block_hashes),
            reject_if_unattainable=self.rejects_early and not is_batch,
        )
