"""What of vLLM the adapter uses, as it is in the version installed; `python -m tests.unit.engine.vllm_api` writes it.

vllm_api.json holds it for the pinned version, so that tests without vLLM can hold the adapter's sources against it.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from pathlib import Path

RECORD = Path(__file__).with_suffix(".json")
CALLABLES = {
    "vllm.sampling_params": "SamplingParams",
    "vllm.engine.arg_utils": "EngineArgs.add_cli_args EngineArgs.from_cli_args EngineArgs.create_engine_config",
    "vllm.utils.argparse_utils": "FlexibleArgumentParser",
    "vllm.platforms": "current_platform.is_cpu",
    "vllm.v1.engine.llm_engine": "LLMEngine.from_vllm_config LLMEngine.add_request LLMEngine.step "
    "LLMEngine.abort_request LLMEngine.collective_rpc LLMEngine.add_lora LLMEngine.remove_lora",
    "vllm.lora.request": "LoRARequest",
    "vllm.v1.engine.core_client": "InprocClient.shutdown",
    "vllm.v1.core.sched.scheduler": "Scheduler.schedule Scheduler.update_from_output "
    "Scheduler._reserve_prefill_lookahead Scheduler.has_finished_requests",
    "vllm.v1.core.sched.async_scheduler": "AsyncScheduler.schedule AsyncScheduler.update_from_output",
    "vllm.v1.core.block_pool": "BlockPool.get_num_free_blocks BlockPool.evict_blocks",
    "vllm.v1.core.kv_cache_manager": "KVCacheManager.get_block_ids",
    "vllm.v1.worker.gpu_model_runner": "GPUModelRunner._zero_block_ids",
    "vllm.exceptions": "VLLMValidationError",
    "vllm.v1.core.kv_cache_coordinator": "KVCacheCoordinator.get_num_blocks_to_allocate "
    "KVCacheCoordinator.cache_blocks",
    "vllm.v1.sample.logits_processor": "LogitsProcessor.apply LogitsProcessor.update_state "
    "LogitsProcessor.is_argmax_invariant",
    "vllm.v1.sample.logits_processor.builtin": "process_dict_updates",
}
FIELDS = {
    "vllm.engine.arg_utils": "EngineArgs",
    "vllm.outputs": "RequestOutput CompletionOutput",
    "vllm.logprobs": "Logprob",
    "vllm.v1.outputs": "ModelRunnerOutput",
    "vllm.v1.core.sched.output": "SchedulerOutput",
    "vllm.config.cache": "CacheConfig",
    "vllm.config.kv_transfer": "KVTransferConfig",
    "vllm.sampling_params": "RequestOutputKind",
    "vllm.v1.request": "RequestStatus",
}
"""Data: the names of what its constructor takes, or of an enumeration's members."""
ATTRIBUTES = {
    "vllm.v1.core.sched.scheduler.Scheduler": "requests waiting max_num_scheduled_tokens "
    "need_mamba_block_aligned_split kv_cache_manager kv_cache_config finished_recving_kv_req_ids",
    "vllm.v1.core.kv_cache_manager.KVCacheManager": "block_pool coordinator empty_kv_cache_blocks",
    "vllm.v1.request.Request": "request_id num_computed_tokens num_prompt_tokens num_tokens "
    "num_output_tokens output_token_ids sampling_params status",
    "vllm.v1.engine.llm_engine.LLMEngine": "engine_core model_executor vllm_config",
    "vllm.v1.engine.core_client.InprocClient": "engine_core",
    "vllm.v1.engine.core.EngineCore": "scheduler",
}
"""What a class has or its __init__ sets."""


def api() -> dict[str, object]:
    """Returns version, signatures, fields and attributes, of vLLM as it is installed."""
    found: dict[str, object] = {"version": importlib.import_module("vllm").__version__}
    for module, names in CALLABLES.items():
        for name in names.split():
            owner: object = importlib.import_module(module)
            for part in name.split("."):
                owner = getattr(owner, part)
            found[f"{module}.{name}()"] = _parameters(owner)
    for module, names in FIELDS.items():
        for name in names.split():
            kind = getattr(importlib.import_module(module), name)
            found[f"{module}.{name}"] = _fields(kind)
    for path, names in ATTRIBUTES.items():
        module, _, name = path.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        source = inspect.getsource(kind.__init__)
        missing = [each for each in names.split() if not (hasattr(kind, each) or f"self.{each}" in source)]
        found[path] = {"has": names.split(), "lacks": missing}
    return found


def _parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def _fields(kind: type) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return sorted(each.name for each in dataclasses.fields(kind))
    members = getattr(kind, "__members__", None)
    return sorted(members) if members else _parameters(kind)


if __name__ == "__main__":
    RECORD.write_text(json.dumps(api(), indent=1) + "\n")
