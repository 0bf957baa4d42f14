"""Makes the concrete core and stores that settings name: the one place to touch for a further one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import fields
from functools import cache
from typing import NamedTuple

from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import BatchOrder, CoreSettings, Placement
from bucketserve.ports import QueueStore
from bucketserve.store.memory import MemoryStore
from bucketserve.store.redis import RedisStore, connect
from bucketserve.store.roster import Roster
from bucketserve_scheduler.settings import SchedulerSettings

__all__ = ["Stores", "core_settings", "new_core", "stores"]


def new_core(settings: SchedulerSettings, context_tokens: int) -> SchedulerCore:
    """Returns a core for one model."""
    return SchedulerCore(core_settings(settings), context_tokens)


def core_settings(settings: SchedulerSettings) -> CoreSettings:
    """Returns the core's part of the settings. All policies but `adaptive` are for comparison."""
    named = {
        field.name: getattr(settings, field.name) for field in fields(CoreSettings) if hasattr(settings, field.name)
    }
    chosen = CoreSettings(**{**named, "batch_order": BatchOrder(settings.batch_order)})
    match settings.policy:
        case "adaptive":
            return chosen
        case "paper":
            return chosen.as_in_the_paper()
        case placement:
            return chosen.as_a_load_balancer(Placement(placement))


class Stores(NamedTuple):
    """What is kept in the store that the URL names."""

    of_model: Callable[[str], QueueStore]
    """Gives a model's store."""
    roster: Roster | None
    """None: no other scheduler can be there."""


async def stores(url: str, deployment: str, stack: AsyncExitStack) -> Stores:
    """Connections close with the stack.

    Raises:
        SettingsError: the URL names no store that we know.
    """
    if url.startswith("memory://"):
        # A model's is always the same one: it outlives what it serves, as Redis does.
        return Stores(cache(lambda model: MemoryStore()), None)
    client = connect(url)
    stack.push_async_callback(client.aclose)
    return Stores(lambda model: RedisStore(client, model, deployment), Roster(client, deployment))
