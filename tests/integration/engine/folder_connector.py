"""A KV connector of vLLM's that goes by kv_transfer_params as NIXL's does, with a folder for a network.

Like there: prompts whose KV another engine fetches stay in memory until it has come there, blocks are named, loading
goes on between steps, and what can't be fetched is a failed receive. No part of the product.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorTransferResults,
)
from vllm.v1.request import RequestStatus


@dataclass
class Orders(KVConnectorMetadata):
    """What the scheduler's side tells the worker's."""

    saves: dict[str, list[int]] = field(default_factory=dict)
    """Blocks to put into the folder."""
    loads: dict[str, tuple[str, list[int], int]] = field(default_factory=dict)
    """Names there; blocks here; how many of the first ones are not wanted."""
    refusals: list[str] = field(default_factory=list)
    """What nobody wants any more."""


class FolderConnector(KVConnectorBase_V1):
    """kv_connector_extra_config: the folder, and what of it is not as usual.

    wait_s: after which loads fail; fails_every: of so many loads one fails anyway; lease_s: after which what nobody has
    fetched is let go (NIXL's is 30 s; usually none here, for no test is to depend on time).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        extra = self._kv_transfer_config.kv_connector_extra_config
        self._folder, self._wait_s = Path(extra["folder"]), float(extra.get("wait_s", 20.0))
        self._lease_s = float(extra.get("lease_s", "inf"))
        self._fails_every, self._num_loads = int(extra.get("fails_every", 0)), 0
        self._orders = Orders()
        self._saved: dict[str, tuple[Path, float]] = {}
        self._loading: dict[str, tuple[str, list[int], int, float]] = {}

    # --- the scheduler's side ----------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        params = request.kv_transfer_params or {}
        number = len(request.prompt_token_ids) - num_computed_tokens if params.get("do_remote_prefill") else 0
        return (number, True) if number > 0 else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        params = request.kv_transfer_params or {}
        if not params.get("do_remote_prefill"):
            return
        params["do_remote_prefill"] = False
        name = params["remote_request_id"]
        if not num_external_tokens:
            self._orders.refusals.append(name)
            return
        size = self._vllm_config.cache_config.block_size
        (here,) = blocks.get_block_ids()
        wanted = len(params["remote_block_ids"])
        num_here = (len(request.prompt_token_ids) - num_external_tokens) // size
        self._orders.loads[request.request_id] = (name, here[num_here:wanted], num_here)

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        orders, self._orders = self._orders, Orders()
        return orders

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        params = request.kv_transfer_params or {}
        if params.get("do_remote_prefill"):
            params["do_remote_prefill"] = False
            self._orders.refusals.append(params["remote_request_id"])
            return False, None
        if not params.get("do_remote_decode") or request.status != RequestStatus.FINISHED_LENGTH_CAPPED:
            return False, None
        self._orders.saves[request.request_id] = list(block_ids)
        return True, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_request_id": request.request_id,
            "remote_block_ids": list(block_ids),
        }

    # --- the worker's side -------------------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        orders = self._get_connector_metadata()
        assert isinstance(orders, Orders)
        layers = self._layers()
        for request_id, blocks in orders.saves.items():
            path = self._folder / request_id
            self._saved[request_id] = path, time.monotonic() + self._lease_s
            torch.save({name: layer[blocks].clone() for name, layer in layers.items()}, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        for name in orders.refusals:
            (self._folder / name).unlink(missing_ok=True)
        for request_id, load in orders.loads.items():
            self._loading[request_id] = (*load, time.monotonic() + self._wait_s)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    def get_transfer_results(self, finished_req_ids: Iterable[str]) -> KVConnectorTransferResults:
        results = KVConnectorTransferResults()
        for request_id, (path, until_s) in list(self._saved.items()):
            if time.monotonic() > until_s:
                path.unlink(missing_ok=True)
            if not path.exists():
                del self._saved[request_id]
                results.finished_sending.add(request_id)
        for request_id, (name, blocks, num_skipped, until_s) in list(self._loading.items()):
            path = self._folder / name
            if path.exists() and self._fails():
                path.unlink()
                results.failed_recving.add(request_id)
            elif path.exists():
                for layer, found in torch.load(path).items():
                    self._layers()[layer][blocks] = found[num_skipped : num_skipped + len(blocks)]
                path.unlink()
            elif time.monotonic() < until_s:
                continue
            else:
                results.failed_recving.add(request_id)
            del self._loading[request_id]
            results.finished_recving.add(request_id)
        return results

    def _fails(self) -> bool:
        self._num_loads += 1
        return bool(self._fails_every) and not self._num_loads % self._fails_every

    def _layers(self) -> dict[str, torch.Tensor]:
        context = self._vllm_config.compilation_config.static_forward_context
        return {name: layer.kv_cache for name, layer in context.items() if getattr(layer, "kv_cache", None) is not None}
