"""Every policy by name: how to build it, what it asks of its workers, which layouts it is tried on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings
from bucketserve.core.types import RequestId
from bucketserve.sim.baselines.chunked import Chunked, chunked_mode
from bucketserve.sim.baselines.distserve import DISTSERVE_MODE, DistServe
from bucketserve.sim.baselines.fcfs_static import FCFS_STATIC_MODE, FcfsStatic
from bucketserve.sim.baselines.laps import Laps
from bucketserve.sim.baselines.uellm import UELLM_CONTINUOUS_MODE, UELLM_MODE, Uellm
from bucketserve.sim.cluster import WorkerGroup, aggregated, splits
from bucketserve.sim.driver import Policy
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.sequence import TABLE_MODE, WorkerMode

__all__ = [
    "POLICIES",
    "TABLE_SETTINGS",
    "PolicyContext",
    "PolicySpec",
    "as_in_the_table",
    "core_policy",
    "find_policy",
    "with_settings",
]

Layout = tuple[WorkerGroup, ...]


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy may be built from."""

    context_tokens: int
    seed: int
    true_output: Callable[[RequestId], int]
    """Only for simulated output predictors."""


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A policy that can be simulated."""

    name: str
    summary: str
    build: Callable[[PolicyContext], Policy]
    mode: WorkerMode
    layouts: Callable[[int, int], Sequence[Layout]]
    """(workers, devices per worker) -> splits into roles to choose the best of."""
    settings: CoreSettings | None = None
    """Of the production core; None for a policy that is not it."""


def core_policy(
    name: str,
    summary: str,
    settings: CoreSettings,
    layouts: Callable[[int, int], Sequence[Layout]],
    mode: WorkerMode | None = None,
) -> PolicySpec:
    """Returns the production core with the given settings as a policy."""
    return PolicySpec(
        name,
        summary,
        lambda context: SchedulerCore(settings, context.context_tokens),
        mode or WorkerMode(),
        layouts,
        settings,
    )


def with_settings(policy: PolicySpec, values: Mapping[str, str]) -> PolicySpec:
    """Returns the policy with some of the core's settings changed, given as text.

    Raises:
        SimulationError: the policy is not the core, or has no such setting, or the text is no value for it.
        SettingsError: a value is out of range.
    """
    if policy.settings is None:
        raise SimulationError(f"policy {policy.name} is not the core: it has no settings to change")
    kinds = {field.name: type(getattr(policy.settings, field.name)) for field in fields(CoreSettings)}
    changes: dict[str, Any] = {}
    for name, text in values.items():
        if name not in kinds:
            raise SimulationError(f"no setting {name!r}: one of {', '.join(kinds)}")
        try:
            changes[name] = _parse(text, kinds[name])
        except ValueError as error:
            raise SimulationError(f"setting {name}: {error}") from error
    return core_policy(
        policy.name, policy.summary, replace(policy.settings, **changes), policy.layouts, mode=policy.mode
    )


def as_in_the_table(policy: PolicySpec) -> PolicySpec:
    """Returns the policy as docs/paper shows it: rivals are simulated only so, the core by default as it is served."""
    if policy.settings is None:
        return policy
    settings = replace(policy.settings, **TABLE_SETTINGS)
    return core_policy(policy.name, policy.summary, settings, policy.layouts, mode=TABLE_MODE)


def _parse(text: str, kind: type) -> object:
    if kind is bool:
        known = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in known:
            raise ValueError(f"{text!r} is not true or false")
        return known[text.lower()]
    return kind(text)


def _aggregated_only(num_workers: int, devices: int) -> Sequence[Layout]:
    return [aggregated(num_workers, devices)]


def _splits_only(num_workers: int, devices: int) -> Sequence[Layout]:
    return splits(num_workers, devices)


def _any(num_workers: int, devices: int) -> Sequence[Layout]:
    return [aggregated(num_workers, devices), *splits(num_workers, devices)]


_CORE = CoreSettings(max_queued_requests=10_000_000, max_queued_tokens=10**12)
"""As served, but queues without bounds: a refusal would spare a policy the requests that it can't serve."""
TABLE_SETTINGS: Mapping[str, Any] = {"small_batch_tokens": 0}
"""Of the core in docs/paper, whose workers do not share steps (TABLE_MODE)."""

POLICIES: Mapping[str, PolicySpec] = {
    spec.name: spec
    for spec in (
        core_policy("adaptive", "the default: exact edges, slack order, time-aware batches", _CORE, _any),
        core_policy("paper", "Algorithm 1, earliest arrival first", _CORE.as_in_the_paper(), _any),
        PolicySpec(
            "fcfs-static",
            "static batches in order of arrival",
            lambda _: FcfsStatic(),
            FCFS_STATIC_MODE,
            _aggregated_only,
        ),
        PolicySpec(
            "chunked",
            "continuous batching, chunked prefill (Sarathi)",
            lambda _: Chunked(),
            chunked_mode(),
            _aggregated_only,
        ),
        PolicySpec("distserve", "prefill and decode apart, FCFS", lambda _: DistServe(), DISTSERVE_MODE, _splits_only),
        PolicySpec(
            "uellm",
            "UELLM with static batches",
            lambda context: Uellm(context.true_output, context.seed, is_static=True),
            UELLM_MODE,
            _aggregated_only,
        ),
        PolicySpec(
            "uellm-continuous",
            "UELLM's order with continuous batching",
            lambda context: Uellm(context.true_output, context.seed, is_static=False),
            UELLM_CONTINUOUS_MODE,
            _aggregated_only,
        ),
        PolicySpec("laps", "short and long prompts prefilled apart", lambda _: Laps(), DISTSERVE_MODE, _splits_only),
    )
}


def find_policy(name: str) -> PolicySpec:
    """Returns a policy by name.

    Raises:
        SimulationError: there is none; names those there are.
    """
    if name not in POLICIES:
        raise SimulationError(f"no policy {name!r}: one of {', '.join(POLICIES)}")
    return POLICIES[name]
