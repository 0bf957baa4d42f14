"""Settings of the scheduling core, range-checked."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from bucketserve.core.errors import SettingsError

__all__ = ["BatchOrder", "CoreSettings", "EdgeRule", "Placement", "QueueOrder"]


class EdgeRule(enum.Enum):
    """How bucket edges are chosen."""

    ADAPTIVE = "adaptive"
    """Exact dynamic programme over a decayed histogram of arriving lengths (core/adaptive.py)."""
    PAPER = "paper"
    """Algorithm 1 of arXiv 2507.17120 (core/paper.py)."""
    NONE = "none"
    """One bucket."""


class QueueOrder(enum.Enum):
    """Order of waiting requests."""

    SLACK = "slack"
    """Least slack and cost first; what can't meet its target any more is deferred (core/order.py, core/lanes.py)."""
    FCFS = "fcfs"
    """By arrival, whatever the class."""


class BatchOrder(enum.Enum):
    """Order of batch-class requests inside a bucket."""

    SJF = "sjf"
    """Shortest first: requests per second."""
    LJF = "ljf"
    """Longest first: tokens per second."""


class Placement(enum.Enum):
    """When a request goes to a worker, and to which."""

    LATE = "late"
    """When a worker has room for it: to one with little to do, or that knows how it begins."""
    ROUND_ROBIN = "round-robin"
    """On arrival, to each in turn (core/routing.py)."""
    LEAST_LOADED = "least-loaded"
    """On arrival, to the one with the fewest open requests."""
    LEAST_PREFILL = "least-prefill"
    """On arrival, to the one with the fewest prompt tokens to compute: a router that knows more than connections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """What can be chosen. Times are seconds, lengths tokens.

    Raises:
        SettingsError: with every value that is out of range.
    """

    edges: EdgeRule = EdgeRule.ADAPTIVE
    placement: Placement = Placement.LATE

    output_quantile: float = 0.6
    """Requests count with this quantile of what outputs like theirs were, where KV grows as it is used."""
    memory_reserve: float = 0.03
    """Share of a worker's free KV that is never planned with (paper, formula 5): more than an engine keeps for growth
    (core/preemption.py), so that what is sent begins at once."""
    max_batch_tokens: int = 2048
    """Most prompt tokens in a batch, or a worker's step if that computes fewer: what is not sent yet can
    still be overtaken."""
    small_batch_tokens: int = 1024
    """A batch of up to so many prompt tokens goes to a worker that has a long prompt to do, where a short one would be
    late if it waited. For engines that share their steps (core/stepping.py); 0: no."""
    max_chunk_tokens: int = 0
    """Most prompt tokens per step beside running decodes, unless a TPOT target asks for fewer; 0: no limit."""

    is_time_aware: bool = True
    """Batches end where a larger one would miss its tightest TTFT, or a running decode's TPOT."""
    fill_tokens: int = 2048
    """A worker is given the next batch when fewer prompt tokens are left there than these, or than its step computes:
    they share a step."""
    min_batch_tokens: int = 256
    """Prompt tokens up to which a step takes hardly longer, since reading the weights takes most of the time. A batch
    is not divided among idle workers below it."""

    queue_order: QueueOrder = QueueOrder.SLACK
    cost_weight: float = 2.0
    """How much later a request counts per second of delay that it means to all others that wait."""
    deferred_share: float = 0.02
    """Share of dispatched tokens owed to deferred requests while others wait as well: enough that they go on, and no
    more, since each of their steps makes others late."""
    late_kv_share: float = 1.0
    """Most of a worker's KV that late interactive requests may hold. Less means that more are in time under overload,
    and that the late ones wait for minutes."""
    batch_order: BatchOrder = BatchOrder.SJF
    default_ttft_s: float = 2.0
    """Target of interactive requests that name none."""
    batch_patience_s: float = 600.0
    """A batch-class request comes before interactive ones that arrive this much later."""

    switch_roles: bool = False
    """Workers of role prefill and decode change sides with the load (core/roles.py)."""

    max_queued_requests: int = 100_000
    max_queued_tokens: int = 50_000_000
    max_batch_share: float = 0.9
    """Most of both that batch-class requests may hold: under overload they give way first."""
    max_tenant_share: float = 1.0
    """Most of both that one tenant may hold."""

    def as_in_the_paper(self) -> CoreSettings:
        """Returns the same with Algorithm 1 in order of arrival: what the paper describes."""
        return replace(
            self, edges=EdgeRule.PAPER, queue_order=QueueOrder.FCFS, is_time_aware=False, small_batch_tokens=0
        )

    def as_a_load_balancer(self, placement: Placement) -> CoreSettings:
        """Returns the same with a placement on arrival, in order of arrival."""
        return replace(self, placement=placement, edges=EdgeRule.NONE, queue_order=QueueOrder.FCFS)

    def __post_init__(self) -> None:
        """Checks the ranges."""
        problems = [
            f"{name} = {getattr(self, name)}: must be {rule}"
            for name, rule, is_good in (
                ("output_quantile", "in (0, 1)", 0 < self.output_quantile < 1),
                ("memory_reserve", "in [0, 1)", 0 <= self.memory_reserve < 1),
                ("max_batch_tokens", "at least 1", self.max_batch_tokens >= 1),
                ("small_batch_tokens", "at least 0", self.small_batch_tokens >= 0),
                ("max_chunk_tokens", "at least 0", self.max_chunk_tokens >= 0),
                ("fill_tokens", "at least 1", self.fill_tokens >= 1),
                ("min_batch_tokens", "at least 1", self.min_batch_tokens >= 1),
                ("cost_weight", "at least 0", self.cost_weight >= 0),
                ("deferred_share", "in (0, 1)", 0 < self.deferred_share < 1),
                ("late_kv_share", "in (0, 1]", 0 < self.late_kv_share <= 1),
                ("default_ttft_s", "positive", self.default_ttft_s > 0),
                ("batch_patience_s", "at least 0", self.batch_patience_s >= 0),
                ("max_queued_requests", "at least 1", self.max_queued_requests >= 1),
                ("max_queued_tokens", "at least 1", self.max_queued_tokens >= 1),
                ("max_batch_share", "in (0, 1]", 0 < self.max_batch_share <= 1),
                ("max_tenant_share", "in (0, 1]", 0 < self.max_tenant_share <= 1),
            )
            if not is_good
        ]
        if problems:
            raise SettingsError(problems)
