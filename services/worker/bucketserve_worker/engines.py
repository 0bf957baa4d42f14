"""The engines that settings name: the one place to touch for a further one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bucketserve.core.errors import SettingsError
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.ports import Engine
from bucketserve_worker.settings import WorkerSettings

__all__ = ["engine_loader"]

NO_MODEL = "[worker] model: name a directory or hf://organisation/name (BUCKETSERVE_WORKER_MODEL)"


def engine_loader(settings: WorkerSettings, on_progress: Callable[[str], None]) -> Callable[[], Engine]:
    """Returns the function that loads the engine; it runs in the engine's thread and may take minutes.

    Raises:
        SettingsError: the engine can't do what the settings say, or needs one more.
    """
    if settings.engine_args and settings.engine != "vllm":
        raise SettingsError([f"[worker] engine_args: they are vLLM's; the engine is {settings.engine}"])
    if settings.adapters_dir:
        if settings.engine == "transformers":
            raise SettingsError(["[worker] adapters_dir: the transformers engine serves no adapters; choose vllm"])
        if not Path(settings.adapters_dir).is_dir():
            raise SettingsError([f"[worker] adapters_dir: {settings.adapters_dir} is no directory"])
    return _LOADERS[settings.engine](settings, on_progress)


def _fake(settings: WorkerSettings, on_progress: Callable[[str], None]) -> Callable[[], Engine]:
    defaults = FakeSettings()
    fake = FakeSettings(
        kv_total_tokens=settings.kv_budget_tokens or defaults.kv_total_tokens,
        context_tokens=settings.context_tokens or defaults.context_tokens,
        max_sequences=settings.max_sequences,
        max_step_tokens=settings.max_step_tokens or defaults.max_step_tokens,
        step_s=settings.fake_decode_us_per_step / 1e6,
        prefill_s_per_token=settings.fake_prefill_us_per_token / 1e6,
        max_adapters=settings.max_adapters if settings.adapters_dir else 0,
    )
    return lambda: FakeEngine(fake)


def _transformers(settings: WorkerSettings, on_progress: Callable[[str], None]) -> Callable[[], Engine]:
    if not settings.model:
        raise SettingsError([NO_MODEL])

    def load() -> Engine:
        # Only here: a worker with another engine needs no torch.
        from bucketserve.engine.loader import LoadSettings, load_engine

        return load_engine(
            LoadSettings(
                model=settings.model,
                device=settings.device,
                dtype=settings.dtype,
                quantization=settings.quantization,
                kernels=settings.kernels,
                compile=settings.compile,
                prefix_cache=settings.prefix_cache,
                num_threads=settings.num_threads,
                kv_budget_bytes=settings.kv_budget_bytes,
                kv_budget_tokens=settings.kv_budget_tokens,
                context_tokens=settings.context_tokens,
                max_sequences=settings.max_sequences,
                max_step_tokens=settings.max_step_tokens,
            ),
            on_progress,
        )

    return load


def _vllm(settings: WorkerSettings, on_progress: Callable[[str], None]) -> Callable[[], Engine]:
    problems = []
    if not settings.model:
        problems.append(NO_MODEL)
    named = {name.strip().lstrip("-").replace("-", "_") for name in settings.engine_args}
    if settings.role != "both" and "kv_transfer_config" not in named:
        problems.append(
            f"[worker] role: vLLM hands KV over by a connector only; set both, not {settings.role}, or engine_args "
            "kv_transfer_config"
        )
    if settings.quantization != "none":
        problems.append(
            f"[worker] quantization: {settings.quantization} is of the transformers engine; for vllm choose another "
            "model, or engine_args quantization=NAME"
        )
    if settings.kernels != "auto":
        problems.append("[worker] kernels: they are of the transformers engine; leave it at auto for vllm")
    if problems:
        raise SettingsError(problems)

    def load() -> Engine:
        from bucketserve.engine.vllm_loader import VllmSettings, load_vllm

        return load_vllm(
            VllmSettings(
                model=settings.model,
                device=settings.device,
                dtype=settings.dtype,
                prefix_cache=settings.prefix_cache,
                num_threads=settings.num_threads,
                kv_budget_bytes=settings.kv_budget_bytes,
                kv_budget_tokens=settings.kv_budget_tokens,
                context_tokens=settings.context_tokens,
                max_sequences=settings.max_sequences,
                max_step_tokens=settings.max_step_tokens,
                max_adapters=settings.max_adapters if settings.adapters_dir else 0,
                engine_args=settings.engine_args,
            ),
            on_progress,
        )

    return load


_LOADERS = {"fake": _fake, "transformers": _transformers, "vllm": _vllm}
