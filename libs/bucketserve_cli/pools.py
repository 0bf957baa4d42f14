"""Pools of a local stack: each some workers with the same settings, and what of these the gateways need to know."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bucketserve.config import load_settings, named_texts
from bucketserve.core.errors import SettingsError
from bucketserve_cli.terminal import InputError
from bucketserve_worker.settings import WorkerSettings

__all__ = ["PER_PROCESS", "Pool", "check_pools", "parse_pool", "pool_lines", "pools_of", "roles_of", "sources_of"]

MAX_WORKERS = 64
PER_PROCESS = {"listen", "http_listen", "delivery_listen", "delivery_address", "address", "metrics_listen", "worker_id",
               "gateway_id", "scheduler_id"}  # fmt: skip
"""Fields of which two processes can't have the same value, unless it is empty."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers with the same settings."""

    num_workers: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of [worker], as text; what is not named is as the environment and the file say."""


def parse_pool(text: str) -> Pool:
    """Returns the pool that name=value,name=value or a JSON object describes: workers, and settings of [worker].

    Raises:
        InputError: it describes none; says everything that is wrong with it.
    """
    try:
        if not text.strip():
            raise ValueError("it describes nothing")
        settings = dict(named_texts(text))
    except ValueError as error:
        raise InputError(f"--pool {text!r}: {error}") from None
    if bad := [name for name, value in settings.items() if not isinstance(value, str)]:
        raise InputError(f"--pool {text!r}: the value of {bad[0]!r} must be a text")
    number = settings.pop("workers", "1").strip()
    if not (number.isascii() and number.isdecimal() and len(number) < 10 and 1 <= int(number) <= MAX_WORKERS):
        raise InputError(f"--pool {text!r}: workers is a number from 1 to {MAX_WORKERS}")
    if own := sorted(PER_PROCESS & settings.keys()):
        raise InputError(f"--pool {text!r}: {own[0]} is for a single process, and can't be for a pool")
    try:
        load_settings({"worker": WorkerSettings}, environ={}, overrides={"worker": settings})
    except SettingsError as error:
        raise InputError(f"--pool {text!r}: {'; '.join(error.problems)}") from None
    return Pool(int(number), settings)


def pools_of(texts: Sequence[str], others: Mapping[str, object]) -> tuple[Pool, ...]:
    """Returns the pools that texts describe.

    Args:
        texts: one for each pool.
        others: values of the options that say the same of a single pool.

    Raises:
        InputError: one describes none, or other options are given as well.
    """
    if texts and (given := [option for option, value in others.items() if value]):
        raise InputError(f"{given[0]} and --pool can't be given together: say it of each pool")
    return tuple(parse_pool(text) for text in texts)


def roles_of(roles: str) -> tuple[str, ...]:
    """Returns the role of each worker of a text such as prefill,decode.

    Raises:
        InputError: one is none, or they are no whole.
    """
    names = tuple(name.strip() for name in roles.split(",") if name.strip())
    if unknown := [name for name in names if name not in ("both", "prefill", "decode")]:
        raise InputError(f"--roles {unknown[0]!r}: a role is both, prefill or decode")
    if names and "both" not in names and not {"prefill", "decode"} <= set(names):
        raise InputError("--roles: prefill workers need a decode worker, and the other way round")
    return names


def sources_of(workers: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Returns where each model's files are, by its name, as the workers' settings have it.

    Raises:
        InputError: a model's name stands for two of them.
    """
    sources: dict[str, str] = {}
    for worker in workers:
        name, source = worker["model_name"], worker["model"]
        if sources.setdefault(name, source) != source:
            raise InputError(f"pools of model {name!r} are of {sources[name]!r} and of {source!r}; it is one model")
    return sources


def check_pools(workers: Sequence[Mapping[str, str]]) -> None:
    """Checks that every model has workers that can serve it together.

    Raises:
        InputError: one has prefill workers only, or decode workers only.
    """
    for name in sources_of(workers):
        roles = {worker.get("role") or "both" for worker in workers if worker["model_name"] == name}
        if "both" not in roles and not {"prefill", "decode"} <= roles:
            raise InputError(f"model {name!r}: prefill workers need a decode worker, and the other way round")


def pool_lines(workers: Iterable[Mapping[str, str]]) -> list[str]:
    """Returns a line for each pool: the model, how many workers, and their settings."""
    numbers: dict[str, int] = {}
    kinds: dict[str, Mapping[str, str]] = {}
    for worker in workers:
        key = json.dumps(dict(worker), sort_keys=True)
        kinds.setdefault(key, worker)
        numbers[key] = numbers.get(key, 0) + 1
    lines = []
    for key, worker in kinds.items():
        more = [f"{name} {value}" for name, value in worker.items() if value and name not in ("model_name", "model")]
        number = f"{numbers[key]} worker{'s' if numbers[key] > 1 else ''}"
        lines.append(f"pool   {worker['model_name']}: {', '.join([number, *more])}")
    return lines
