"""How a service process starts and ends: event loop, signals, exit status. Knows no service."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import secrets
import signal
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import TypeVar

import uvloop

from bucketserve.config import (
    DeploymentSettings,
    Section,
    TelemetrySettings,
    TlsSettings,
    load_settings,
    section_of,
)
from bucketserve.core.errors import ModelLoadError, SettingsError
from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.tls import Tls
from bucketserve.starting import STOP_SIGNALS

__all__ = [
    "EXIT_FAILED",
    "EXIT_MISCONFIGURED",
    "default_instance_id",
    "keep_loaded",
    "run_service",
    "service_main",
    "tls_of",
    "unless_stopped",
]

S = TypeVar("S", bound=Section)
T = TypeVar("T")

EXIT_FAILED = 1
EXIT_MISCONFIGURED = 2
END_S = 20.0
"""For what comes after draining: last messages, leases given back, spans exported, the interpreter's own end."""
YOUNG_OBJECTS = 5000
"""The garbage collector looks through new objects when there are so many more; requests under way are hundreds each."""


def default_instance_id(kind: str) -> str:
    """Returns an id that is unique per process: kind-host-random. In containers every process has the same number."""
    return f"{kind}-{socket.gethostname()}-{secrets.token_hex(4)}"


def keep_loaded() -> None:
    """Lets the garbage collector pass over what is there by now, modules and models.

    A gateway would spend a tenth of a request's time on looking through all of it again and again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


async def unless_stopped(stop: asyncio.Event, starting: Awaitable[T]) -> T:
    """Returns what `starting` returns. If `stop` is set first, the process ends with status 0, without waiting for it.

    A thread that loads a model can't be interrupted, and who hasn't served anybody has nothing to put in order.
    """
    stopped = asyncio.ensure_future(stop.wait())
    loading = asyncio.ensure_future(starting)
    await asyncio.wait([stopped, loading], return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    stopped.cancel()
    return loading.result()


def service_main(
    section: str,
    model: type[S],
    serve: Callable[[S, Deployment, TelemetrySettings, asyncio.Event], Awaitable[None]],
    drain_s: Callable[[S], float],
) -> int:
    """Reads a service's settings from the environment and its file, runs it, returns the exit status.

    drain_s: what the settings allow it for finishing what it has, seconds.
    """
    try:
        sections: dict[str, type[Section]] = {
            section: model,
            "deployment": DeploymentSettings,
            "tls": TlsSettings,
            "telemetry": TelemetrySettings,
        }
        loaded = load_settings(sections, environ=os.environ)
        named = section_of(loaded, "deployment", DeploymentSettings)
        deployment = Deployment(named.name, named.token, tls_of(section_of(loaded, "tls", TlsSettings)))
        if deployment.tls is not None:
            deployment.tls.check_service()
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISCONFIGURED
    settings = section_of(loaded, section, model)
    telemetry = section_of(loaded, "telemetry", TelemetrySettings)
    return run_service(lambda stop: serve(settings, deployment, telemetry, stop), drain_s(settings))


def tls_of(settings: TlsSettings) -> Tls | None:
    """Returns what [tls] says; None if it says nothing.

    Raises:
        SettingsError: it can't be used.
    """
    if not any(settings.model_dump().values()):
        return None
    if not settings.ca_file:
        raise SettingsError(["[tls] ca_file: needed with any other setting of [tls]; it names who is trusted"])
    return Tls(**settings.model_dump())


def run_service(main: Callable[[asyncio.Event], Awaitable[None]], drain_s: float) -> int:
    """Runs main(stop) to its end and returns the process's exit status.

    A signal to stop sets `stop`: main drains and returns. A second one cancels main. Whatever main waits for, the
    process ends within drain_s + END_S. Settings or a model that can't be used end the process with a message that says
    what to do, not with a traceback.
    """
    try:
        uvloop.run(_with_signals(main, drain_s))
    except asyncio.CancelledError:
        return EXIT_FAILED
    except (SettingsError, ModelLoadError) as error:
        _tell(error)
        return EXIT_MISCONFIGURED
    except ExceptionGroup as group:
        expected, unexpected = group.split((SettingsError, ModelLoadError))
        if unexpected is not None or expected is None:
            raise
        for problem in expected.exceptions:
            _tell(problem)
        return EXIT_MISCONFIGURED
    return 0


def _tell(error: Exception) -> None:
    """Prints it as the last line, and lets go of what its frames hold.

    A server of gRPC that went with the interpreter would write lines of its own after it.
    """
    print(f"error: {error}", file=sys.stderr)
    traceback.clear_frames(error.__traceback__)


async def _with_signals(main: Callable[[asyncio.Event], Awaitable[None]], drain_s: float) -> None:
    stop = asyncio.Event()
    task = asyncio.ensure_future(main(stop))
    loop = asyncio.get_running_loop()

    def end() -> None:
        if stop.is_set():
            task.cancel()
        stop.set()

    def on_signal(*_: object) -> None:
        _end_within(END_S if stop.is_set() else drain_s + END_S)
        if not loop.is_closed():
            loop.call_soon_threadsafe(end)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            # Not loop.add_signal_handler: a loop that hangs would never hear of it.
            signal.signal(number, on_signal)
    await task


def _end_within(limit_s: float) -> None:
    """Has the kernel end the process, after it has said where each of its threads is, if it still runs by then.

    Whoever told it to stop may be gone, and with it whoever would kill what does not.
    """
    faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
