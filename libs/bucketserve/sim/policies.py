"""Every policy by name. A new rival is a file of its own in sim/baselines and a line in RIVALS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from bucketserve.core.messages import Decision, Event, RequestSubmitted
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings, Placement
from bucketserve.sim.baselines import chunked, chunked_edf, distserve, fcfs_static, laps, lmetric, qoserve, uellm
from bucketserve.sim.driver import Policy
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.policy_spec import Layout, PolicySpec, either, together
from bucketserve.sim.sequence import TABLE_MODE, WorkerMode

__all__ = [
    "POLICIES",
    "RIVALS",
    "TABLE_SETTINGS",
    "as_in_the_table",
    "blind",
    "core_policy",
    "find_policy",
    "with_settings",
]

RIVALS: Sequence[Callable[[], PolicySpec]] = (
    chunked.rival,
    chunked_edf.rival,
    qoserve.rival,
    lmetric.rival,
    laps.rival,
    distserve.rival,
    uellm.rival,
    uellm.continuous,
    fcfs_static.rival,
)
"""Each with its authors' step size; `PolicySpec.sized` has it with another."""


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
    if settings.is_time_aware:
        # Where no steps are shared, batches sized by time are better one after the other; Algorithm 1's are not.
        settings = replace(settings, fill_tokens=1)
    return core_policy(
        policy.name, policy.summary, settings, policy.layouts, mode=replace(TABLE_MODE, kv=policy.mode.kv)
    )


def blind(policy: PolicySpec) -> PolicySpec:
    """Returns the policy without block hashes: what placement by prefix is compared with."""
    return replace(policy, name=f"{policy.name}-blind", build=lambda context: _Blind(policy.build(context)))


class _Blind:
    """Hands on everything but hashes."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def step(self, events: Sequence[Event], now_s: float) -> Decision:
        return self._policy.step([_without_hashes(event) for event in events], now_s)


def _without_hashes(event: Event) -> Event:
    if isinstance(event, RequestSubmitted):
        return RequestSubmitted(replace(event.request, block_hashes=()))
    return event


def _parse(text: str, kind: type) -> object:
    if kind is bool:
        known = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in known:
            raise ValueError(f"{text!r} is not true or false")
        return known[text.lower()]
    return kind(text)


_CORE = CoreSettings(max_queued_requests=10_000_000, max_queued_tokens=10**12)
"""As served, but queues without bounds: a refusal would spare a policy the requests that it can't serve."""
TABLE_SETTINGS: Mapping[str, Any] = {"small_batch_tokens": 0, "late_kv_share": 0.1}
"""Of the core in docs/paper, whose workers do not share steps (TABLE_MODE), and which judges at 80% within SLO: those
that are late are lost there."""


def _algorithm_1(chunk_tokens: int = _CORE.max_chunk_tokens) -> PolicySpec:
    """Algorithm 1 with chunks of that many prompt tokens beside running decodes."""
    settings = replace(_CORE.as_in_the_paper(), max_chunk_tokens=chunk_tokens)
    spec = core_policy("paper", "Algorithm 1, earliest arrival first", settings, either)
    return replace(spec, sized=_algorithm_1)


def _load_balancer(placement: Placement, summary: str, mode: WorkerMode | None = None) -> PolicySpec:
    """Routing on arrival to the workers that serve; with a step size, to workers whose loop is vLLM's."""
    spec = core_policy(placement.value, summary, _CORE.as_a_load_balancer(placement), together, mode)
    return replace(spec, sized=lambda tokens: _load_balancer(placement, summary, chunked.chunked_mode(tokens)))


POLICIES: Mapping[str, PolicySpec] = {
    spec.name: spec
    for spec in (
        core_policy("adaptive", "what is served: exact edges, slack order, time-aware batches", _CORE, either),
        _algorithm_1(),
        _load_balancer(Placement.ROUND_ROBIN, "a load balancer: on arrival, to each worker in turn"),
        _load_balancer(Placement.LEAST_LOADED, "a load balancer: on arrival, to the worker with the fewest requests"),
        _load_balancer(Placement.LEAST_PREFILL, "a router: on arrival, to the worker with the least to prefill"),
        *(rival() for rival in RIVALS),
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
