"""Settings of the scheduler: [scheduler] in the file, BUCKETSERVE_SCHEDULER_* in the environment."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from bucketserve.config import ListenAddress, OptionalListen, Section
from bucketserve.core.settings import CoreSettings
from bucketserve.store.url import check_store_url

__all__ = ["SchedulerSettings"]

CORE = CoreSettings()
"""What the core does by default is what is served by default, and what is simulated."""
REPORTS_IN_LEASE = 3
"""Of a worker: one report that comes late, or one that is lost with its stream, is no lost worker."""


class SchedulerSettings(Section):
    """[scheduler]."""

    listen: ListenAddress = Field("127.0.0.1:50052", description="host:port for gateways, workers and health checks")
    metrics_listen: OptionalListen = Field("127.0.0.1:9102", description="host:port for /metrics; empty: off")
    redis_url: Annotated[str, AfterValidator(check_store_url)] = Field(
        "redis://127.0.0.1:6379/0",
        repr=False,
        description="Redis or Valkey, or sentinel://host:port,host:port/service (rediss://, sentinels://: by TLS); "
        "memory:// keeps state in memory only",
    )
    scheduler_id: str = Field("", description="unique per process; default: host name and process id")
    policy: Literal["adaptive", "paper", "round-robin", "least-loaded", "least-prefill"] = Field(
        "adaptive",
        description="adaptive; for comparison Algorithm 1 of the paper, or what a load balancer does: on arrival to "
        "each worker in turn, to the one with the fewest requests, or with the fewest prompt tokens to compute",
    )
    batch_order: Literal["sjf", "ljf"] = Field(
        CORE.batch_order.value, description="order of batch-class requests in a bucket"
    )
    default_ttft_s: float = Field(
        CORE.default_ttft_s, gt=0, description="TTFT target of interactive requests that name none, seconds"
    )
    late_kv_share: float = Field(
        CORE.late_kv_share,
        gt=0,
        le=1,
        description="most of a worker's KV that late interactive requests may hold; less: more are in time under "
        "overload, and the late ones wait for minutes",
    )
    memory_reserve: float = Field(
        CORE.memory_reserve, ge=0, lt=1, description="share of a worker's free KV never planned with"
    )
    max_chunk_tokens: int = Field(
        CORE.max_chunk_tokens, ge=0, description="most prompt tokens a step beside decodes; 0: no limit"
    )
    switch_roles: bool = Field(
        CORE.switch_roles,
        description="workers of role prefill and decode change sides with the load; each side keeps one",
    )
    max_queued_requests: int = Field(CORE.max_queued_requests, ge=1, description="requests that may wait, per model")
    max_queued_tokens: int = Field(CORE.max_queued_tokens, ge=1, description="prompt tokens that may wait, per model")
    max_batch_share: float = Field(
        CORE.max_batch_share, gt=0, le=1, description="share of both that batch-class requests may hold"
    )
    max_tenant_share: float = Field(
        CORE.max_tenant_share, gt=0, le=1, description="share of both that one tenant may hold"
    )
    leader_lease_s: float = Field(2.0, gt=0.2, le=60, description="a silent leader is replaced after this, seconds")
    worker_lease_s: float = Field(5.0, gt=0.5, le=300, description="a silent worker counts as lost after this, seconds")
    worker_grace_s: float = Field(
        1.0,
        ge=0,
        le=60,
        description="a worker whose stream broke has this long to come back before it is lost, seconds",
    )
    report_interval_s: float = Field(
        0.5,
        gt=0.01,
        le=60,
        validate_default=True,
        description="most time between a worker's reports, seconds; a third of worker_lease_s or less",
    )
    gateway_lease_s: float = Field(
        10.0, ge=0, le=300, description="requests of a disconnected gateway are cancelled after this, seconds"
    )
    enable_reflection: bool = Field(True, description="answer gRPC reflection")

    @field_validator("report_interval_s")
    @classmethod
    def _renews_the_lease(cls, value: float, info: ValidationInfo) -> float:
        lease_s = info.data.get("worker_lease_s")
        if lease_s is not None and round(REPORTS_IN_LEASE * value - lease_s, 6) > 0:
            raise ValueError(
                f"only reports renew worker_lease_s ({lease_s:g}): "
                f"raise that to {REPORTS_IN_LEASE} times this, or lower this"
            )
        return value
