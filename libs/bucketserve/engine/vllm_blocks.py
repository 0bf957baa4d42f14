"""vLLM's KV memory, as the rules that are the same for all engines count it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["KvBlocks"]


class KvBlocks:
    """vLLM's KV memory, counted in its blocks; one of them it never gives to anybody."""

    def __init__(self, scheduler: Any, cache: Any) -> None:
        """Takes the scheduler and the cache's configuration of an engine that is loaded."""
        self._manager = scheduler.kv_cache_manager
        self._pool = self._manager.block_pool
        self.total = int(cache.num_gpu_blocks) - 1
        groups = scheduler.kv_cache_config.kv_cache_groups
        if len(groups) == 1:
            self.total_tokens = self.total * int(groups[0].kv_cache_spec.block_size)
        else:
            # Layers of several kinds: how many tokens fit depends on their lengths; vLLM's figure is for long ones.
            self.total_tokens = int(cache.kv_cache_size_tokens) * self.total // (self.total + 1)

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses; what they hold may be kept for reuse."""
        return int(self._pool.get_num_free_blocks())

    def tokens_of(self, num_blocks: int) -> int:
        """Returns the tokens for which blocks suffice."""
        return num_blocks * self.total_tokens // self.total

    def taken(self, internal_ids: Iterable[str]) -> int:
        """Returns the blocks that these requests have; what they share counts once."""
        groups = (group for name in internal_ids for group in self._manager.get_block_ids(name))
        blocks = {i for group in groups for i in group}
        return sum(not self._pool.blocks[i].is_null for i in blocks)

    def missing(self, internal_id: str, num_tokens: int, num_computed: int = 0) -> int:
        """Returns the blocks that a request lacks to have KV for so many tokens; of nobody's id: all of them."""
        return int(
            self._manager.coordinator.get_num_blocks_to_allocate(
                request_id=internal_id,
                num_tokens=num_tokens,
                new_computed_blocks=self._manager.empty_kv_cache_blocks.blocks,
                num_encoder_tokens=0,
                total_computed_tokens=num_computed,
                num_local_computed_tokens=num_computed,
                num_tokens_main_model=num_tokens,
                apply_admission_cap=True,
            )
        )
