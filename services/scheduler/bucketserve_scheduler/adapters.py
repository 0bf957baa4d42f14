"""The concrete core and stores that settings name: the one line to touch for a further one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import BatchOrder, CoreSettings, EdgeRule, QueueOrder
from bucketserve.ports import QueueStore
from bucketserve.store.memory import MemoryStore
from bucketserve.store.redis import RedisStore, connect
from bucketserve_scheduler.settings import SchedulerSettings

__all__ = ["core_settings", "new_core", "stores"]


def new_core(settings: SchedulerSettings, context_tokens: int) -> SchedulerCore:
    """Returns a core for one model."""
    return SchedulerCore(core_settings(settings), context_tokens)


def core_settings(settings: SchedulerSettings) -> CoreSettings:
    """Returns the core's part of the settings. Policy `paper` is Algorithm 1 in order of arrival, for comparison."""
    is_paper = settings.policy == "paper"
    return CoreSettings(
        edges=EdgeRule(settings.policy),
        queue_order=QueueOrder.FCFS if is_paper else QueueOrder.SLACK,
        is_time_aware=not is_paper,
        batch_order=BatchOrder(settings.batch_order),
        default_ttft_s=settings.default_ttft_s,
        deferred_share=settings.deferred_share,
        memory_reserve=settings.memory_reserve,
        max_chunk_tokens=settings.max_chunk_tokens,
        small_batch_tokens=0 if is_paper else settings.small_batch_tokens,
        switch_roles=settings.switch_roles,
        choose_layout=settings.choose_layout,
        layout_window_s=settings.layout_window_s,
        layout_retry_s=settings.layout_retry_s,
        default_tpot_s=settings.default_tpot_s,
        max_queued_requests=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        max_batch_share=settings.max_batch_share,
        max_tenant_share=settings.max_tenant_share,
    )


async def stores(url: str, deployment: str, stack: AsyncExitStack) -> Callable[[str], QueueStore]:
    """Returns a function that gives a model's store; connections close with the stack.

    Raises:
        SettingsError: the URL names no store that we know.
    """
    if url.startswith("memory://"):
        return lambda model: MemoryStore()
    client = connect(url)
    stack.push_async_callback(client.aclose)
    return lambda model: RedisStore(client, model, deployment)
