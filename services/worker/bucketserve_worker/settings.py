"""Settings of a worker: [worker] in the file, BUCKETSERVE_WORKER_* in the environment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from bucketserve.addresses import Address, AddressError
from bucketserve.config import AddressList, ListenAddress, NamedTexts, OptionalListen, OptionalTarget, Section
from bucketserve.core.stepping import MAX_SEQUENCES

__all__ = ["WorkerSettings"]


class WorkerSettings(Section):
    """[worker]."""

    scheduler_address: AddressList = Field(
        "127.0.0.1:50052", description="host:port of the scheduler; several, separated by commas, are tried in turn"
    )
    listen: ListenAddress = Field("127.0.0.1:50054", description="host:port for WorkerService and health checks")
    address: OptionalTarget = Field("", description="host:port at which other workers reach this one; default: listen")
    metrics_listen: OptionalListen = Field("127.0.0.1:9103", description="host:port for /metrics; empty: off")
    worker_id: str = Field("", description="unique per process; default: host name and process id")
    role: Literal["both", "prefill", "decode"] = Field(
        "both", description="prefill: computes prompts and holds their KV; decode: pulls it and generates"
    )
    kv_lease_s: float = Field(
        30.0, ge=2, description="held KV is freed when no scheduler has been heard of for this long, seconds"
    )
    engine: Literal["transformers", "vllm", "fake"] = Field("transformers", description="engine adapter")
    engine_args: NamedTexts = Field(
        default_factory=dict,
        description="vllm engine: further arguments of vLLM, name=value, comma-separated, or a JSON object of texts",
    )
    model: str = Field("", description="directory of a causal LM, or hf://organisation/name; unused by the fake engine")
    model_name: str = Field("default", min_length=1, max_length=128, description="name that clients use")
    adapters_dir: str = Field(
        "",
        description="directory of LoRA adapters, each a directory as peft writes it, named as requests name it; what "
        "is put there or taken away is loaded or unloaded while the worker runs; vllm (and fake) engine",
    )
    max_adapters: int = Field(
        8, ge=1, le=512, description="adapters that may be loaded at once; the vllm engine sets memory aside for each"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="weights and KV")
    quantization: Literal["none", "int8"] = Field(
        "none", description="int8: weights of linear layers rounded to 8 bits, on CPU; faster, at a small loss"
    )
    kernels: Literal["auto", "avx512bf16", "avx512vnni", "avx512", "avx2", "baseline", "torch"] = Field(
        "auto",
        description="CPU kernels: auto, the best that this processor has and that are ready or can be compiled; an "
        "instruction set, which must be there; torch, torch's operations only, on CUDA too",
    )
    compile: bool = Field(
        True,
        description="on CUDA: at start layers are compiled and decode steps captured as graphs, up to a minute",
    )
    num_threads: int = Field(0, ge=0, description="CPU threads of the engine; 0: as torch chooses, within the quota")
    kv_budget_bytes: int = Field(0, ge=0, description="memory for KV; 0: measured at start")
    kv_budget_tokens: int = Field(0, ge=0, description="KV in tokens; 0: by bytes, or measured")
    context_tokens: int = Field(0, ge=0, description="most tokens per sequence; 0: what the model has")
    prefix_cache: bool = Field(True, description="KV of ended sequences is kept, while there is room, for like prompts")
    max_sequences: int = Field(MAX_SEQUENCES, ge=1, le=4096, description="sequences that may run at once")
    max_step_tokens: int = Field(
        0,
        ge=0,
        description="most tokens in one forward pass; bounds activation memory; 0: what takes half a second on "
        "CPU, 2,048 on CUDA",
    )
    fake_prefill_us_per_token: float = Field(50.0, ge=0, description="fake engine: prefill time per token")
    fake_decode_us_per_step: float = Field(5_000.0, ge=0, description="fake engine: time of a decode step")
    flush_ms: float = Field(20.0, ge=0, le=1000, description="tokens wait at most this to share a message")
    gateway_timeout_s: float = Field(
        2.5, gt=0, description="output for an unreachable gateway is given up after this; its requests go on elsewhere"
    )
    hang_s: float = Field(
        30.0,
        gt=0,
        description="an engine that completes no step for this long, nor for ten times its longest one, hangs: its "
        "requests go on elsewhere and the process ends",
    )
    drain_s: float = Field(25.0, ge=0, le=600, description="most time to finish on SIGTERM, seconds")
    enable_reflection: bool = Field(True, description="answer gRPC reflection")

    @field_validator("role")
    @classmethod
    def _can_be_reached(cls, value: str, info: ValidationInfo) -> str:
        listen = info.data.get("listen", "")
        if value != "both" and not info.data.get("address", "?") and listen and Address.parse(listen).is_wildcard:
            raise AddressError(f"{value} needs address where listen is every address ({listen})")
        return value
