"""A sequence in a simulated worker, and what a worker is made of."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from bucketserve.core.pace import MOST_LENT
from bucketserve.core.preemption import SPARE_SHARE
from bucketserve.core.stepping import MAX_SEQUENCES, STEP_TOKENS
from bucketserve.core.types import BatchId, RequestId, StepSample, WorkerId, WorkerRole
from bucketserve.sim.latency import CostMode, StepLatency

__all__ = ["TABLE_MODE", "Discipline", "KvPolicy", "SimSequence", "StepOutcome", "WorkerMode", "WorkerSpec"]


class Discipline(enum.Enum):
    """When sequences join and leave."""

    CONTINUOUS = "continuous"
    """At every step."""
    STATIC = "static"
    """A batch runs until its longest member is done; finished members hold their slots."""


class KvPolicy(enum.Enum):
    """How KV memory is given out."""

    RESERVED = "reserved"
    """Prompt and all output that the request may generate, when it is assigned."""
    GROWING = "growing"
    """As it grows; when it runs out, some go back to the scheduler, as at the engines that serve (core.preemption)."""
    PAGED_RECOMPUTE = "paged-recompute"
    """As it grows; when it runs out, the last sequence is evicted and its context computed again (vLLM)."""
    PAGED_SWAP = "paged-swap"
    """As it grows; when it runs out, the last sequence waits in host memory (DistServe). The copy is free here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerMode:
    """How a policy wants its workers' own loops to be. The production core wants the defaults."""

    discipline: Discipline = Discipline.CONTINUOUS
    kv: KvPolicy = KvPolicy.GROWING
    max_sequences: int = MAX_SEQUENCES
    max_step_tokens: int = STEP_TOKENS
    """Most tokens of any kind in one step."""
    shares_steps: bool = True
    """Whether the first prompt in order gets only half of a step while others wait, as at the workers that serve."""
    most_lent: float = MOST_LENT
    """TPOT targets that a step beside decodes may take (core.pace); 0 for steps that know no targets."""
    kv_watermark: float = SPARE_SHARE
    """Paged: share of KV kept free when a prompt is let in, so that running sequences may grow."""
    urgency: Callable[[SimSequence, float], float] | None = None
    """(sequence, now) -> the least goes first among prompts, the greatest is evicted first. None: order of arrival."""


TABLE_MODE = WorkerMode(kv=KvPolicy.RESERVED, max_sequences=256, max_step_tokens=8192, shares_steps=False, most_lent=0)
"""Workers of docs/paper, ours and those of the rivals: one device's limits for all, prompts in order as in the paper.

How KV is given out is each policy's own. The one place where what is simulated there differs from what is served, with
TABLE_SETTINGS (sim/policies.py).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """One simulated worker."""

    worker_id: WorkerId
    role: WorkerRole
    latency: StepLatency
    kv_total_tokens: int
    cost: CostMode
    mode: WorkerMode


@dataclass(slots=True)
class SimSequence:
    """A request at a worker. `output_tokens` is the truth that no policy sees."""

    request_id: RequestId
    prompt_tokens: int
    output_tokens: int
    max_new_tokens: int
    batch_id: BatchId
    assignment: int
    """Of the order that brought it to its worker."""
    hands_over: bool = False
    """Whether its worker prefilled when it came: its KV waits there once its prompt is computed."""
    max_chunk_tokens: int = 0
    due_s: float = 0.0
    """When its first token is due; far away for batch class."""
    tpot_slo_s: float = inf
    is_batch: bool = False
    num_preemptions: int = 0
    """Of the attempts before this one."""
    block_hashes: tuple[int, ...] = ()
    num_reused: int = 0
    """Prompt tokens that its worker's prefix cache had."""
    holds_blocks: bool = False
    """Whether its blocks are noted in its worker's prefix cache as held."""
    first_token_s: float = 0.0
    num_evictions: int = 0
    num_to_compute: int = 0
    """Tokens whose KV has to be computed before it can decode: the prompt, after an eviction also its output so far."""
    num_computed: int = 0
    num_generated: int = 0
    kv_tokens: int = 0
    """What it holds or has reserved at its worker."""
    finish_count: int = 0
    """The worker's decode count at which its last token comes."""
    join_count: int = 0
    """The worker's decode count when it began to decode there, less what it had generated before."""

    @property
    def most_tokens(self) -> int:
        """Prompt and all that it may generate."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def context_tokens(self) -> int:
        """Tokens that it attends to at its next decode step."""
        return self.prompt_tokens + self.num_generated

    @property
    def remaining(self) -> int:
        """Tokens still to compute before decoding."""
        return self.num_to_compute - self.num_computed


@dataclass(slots=True)
class StepOutcome:
    """What the steps up to now brought."""

    prefilled: list[SimSequence] = field(default_factory=list)
    """They just produced their very first token."""
    finished: list[SimSequence] = field(default_factory=list)
    """Complete or cancelled."""
    preempted: list[SimSequence] = field(default_factory=list)
    """Let go, by the worker itself or since the scheduler asked for it."""
    samples: list[StepSample] = field(default_factory=list)
