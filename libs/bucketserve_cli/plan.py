"""What a local stack is told to be, and what follows for the settings and addresses of its processes.

Flags win over the environment and the file, these over the launcher's own choices.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bucketserve.addresses import Address
from bucketserve.config import DeploymentSettings, Loaded, TelemetrySettings, TlsSettings, load_settings, section_of
from bucketserve.process import tls_of
from bucketserve.rpc.tls import Tls
from bucketserve_cli.pools import PER_PROCESS, Pool
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_scheduler.settings import SchedulerSettings
from bucketserve_worker.settings import WorkerSettings

__all__ = ["Settings", "StackError", "StackSpec", "hold_addresses"]


class StackError(Exception):
    """A service did not come up; says where its log is and how it ended."""


@dataclass(frozen=True, kw_only=True)
class StackSpec:
    """What to start."""

    model: str = ""
    """Directory or hf://organisation/name; empty: as the worker's settings say, else default_model."""
    default_model: str = ""
    model_name: str = ""
    """Empty: as the worker's settings say, else demo."""
    num_workers: int = 1
    roles: tuple[str, ...] = ()
    """Role of each worker, in place of num_workers of role both."""
    pools: tuple[Pool, ...] = ()
    """In place of all above, for several models or kinds of workers."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names of models; empty: as the gateway's settings say."""
    num_schedulers: int = 1
    """One leads, the others stand by."""
    num_gateways: int = 1
    engine: str = ""
    """Empty: as the worker's settings say."""
    engine_args: Mapping[str, str] = field(default_factory=dict)
    """Of the vllm engine; empty: as the worker's settings say."""
    port: int | None = 0
    """Port of the public API, and the next one for the first scheduler; 0: any free ones; None: as settings say."""
    threads_per_worker: int = 0
    """Where settings say nothing; 0: the machine's cores are shared out."""
    redis_url: str = ""
    """Empty: as the scheduler's settings say, else an embedded server of our own."""
    log_dir: Path | None = None
    """Where logs go; None: a temporary folder."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Settings for all services, BUCKETSERVE_*; they win over the environment."""
    worker_environ: tuple[Mapping[str, str], ...] = ()
    """Further settings for each worker, by position."""
    gateway_environ: tuple[Mapping[str, str], ...] = ()
    scheduler_environ: tuple[Mapping[str, str], ...] = ()
    worker_module: str = "bucketserve_worker"
    """What each worker runs; another one for tests whose engine has to fail."""

    def environ_of(self, name: str) -> Mapping[str, str]:
        """Returns the further settings for the service of that name, such as worker-1 or gateway."""
        kind, _, index = name.partition("-")
        of_kind = {"worker": self.worker_environ, "gateway": self.gateway_environ, "scheduler": self.scheduler_environ}
        return dict(enumerate(of_kind[kind])).get(int(index or 0), {})

    @property
    def worker_settings(self) -> tuple[Mapping[str, str], ...]:
        """Settings of each worker that are given here, as text; what is empty is as the environment and file say."""
        if self.pools:
            return tuple(pool.settings for pool in self.pools for _ in range(pool.num_workers))
        all_have = {
            "model": self.model,
            "model_name": self.model_name,
            "engine": self.engine,
            "engine_args": json.dumps(dict(self.engine_args)) if self.engine_args else "",
        }
        return tuple({**all_have, "role": role} for role in self.roles or ("",) * self.num_workers)

    @property
    def worker_roles(self) -> tuple[str, ...]:
        """Role of each worker; empty: as the worker's settings say."""
        return tuple(worker.get("role", "") for worker in self.worker_settings)


class Settings:
    """The settings that the processes will read, before the launcher adds its own."""

    def __init__(self, spec: StackSpec, free_port: Callable[[], int]) -> None:
        """Reads environment and file; free_port() returns a port for what nobody gave one.

        Raises:
            SettingsError: a setting is wrong.
        """
        self._free_port = free_port
        self._counts = {
            "gateway": spec.num_gateways,
            "scheduler": spec.num_schedulers,
            "worker": len(spec.worker_settings),
        }
        self._loaded: Loaded = load_settings(
            {
                "gateway": GatewaySettings,
                "scheduler": SchedulerSettings,
                "worker": WorkerSettings,
                "deployment": DeploymentSettings,
                "tls": TlsSettings,
                "telemetry": TelemetrySettings,
            },
            environ={**os.environ, **spec.environ},
        )
        for section, name in self._loaded.sources:
            count = self._counts.get(section, 1)
            if count > 1 and name in PER_PROCESS and self.given(section, name):
                raise StackError(
                    f"{_variable(section, name)} is set, but {count} {section}s can't share it; unset it or start one"
                )

    def given(self, section: str, name: str) -> str | None:
        """Returns a value that was set, as it is after reading; None if nobody set it."""
        if (section, name) not in self._loaded.sources:
            return None
        return str(getattr(self._loaded.sections[section], name))

    def value(self, section: str, name: str) -> str:
        """Returns the value in force, the service's own default included."""
        return str(getattr(self._loaded.sections[section], name))

    def table(self, section: str, name: str) -> dict[str, str]:
        """Returns a setting that is a table, as it is in force."""
        return dict(getattr(self._loaded.sections[section], name))

    def listen(self, section: str, name: str, port: int | None = 0) -> Address:
        """Returns where a process is to listen: as set, else on this machine at `port`, 0 for any free one."""
        if port:
            return Address("127.0.0.1", port)
        given = self.value(section, name) if port is None else self.given(section, name)
        return Address.parse(given) if given else Address("127.0.0.1", self._free_port())

    def optional_listen(self, section: str, name: str, port: int | None = 0) -> Address | None:
        """Returns the same where an empty setting means that nobody is to listen: None."""
        return None if self.given(section, name) == "" else self.listen(section, name, port)

    def tls(self) -> Tls | None:
        """Returns how the processes speak to each other; None: in plain text.

        Raises:
            SettingsError: [tls] can't be used.
        """
        return tls_of(section_of(self._loaded, "tls", TlsSettings))

    def environ(self, section: str, flags: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
        """Returns a process's variables beside those it inherits: flags, and defaults for what nobody set.

        Empty flags were not given.
        """
        values = {name: value for name, value in defaults.items() if self.given(section, name) is None}
        values |= {name: value for name, value in flags.items() if value}
        return {_variable(section, name): value for name, value in values.items()}


def _variable(section: str, name: str) -> str:
    return f"BUCKETSERVE_{section}_{name}".upper()


def hold_addresses(addresses: Mapping[str, Address]) -> contextlib.ExitStack:
    """Checks that all addresses are free, and keeps other launchers from them until the returned stack is closed.

    Raises:
        StackError: one is in use or can't be had; names it and says what to do.
    """
    held = contextlib.ExitStack()
    try:
        for name, address in addresses.items():
            held.enter_context(_reserved(address.port, name))
            _try_to_bind(address, name)
    except BaseException:
        held.close()
        raise
    return held


@contextlib.contextmanager
def _reserved(port: int, name: str) -> Iterator[None]:
    """Keeps a second launcher from a port on which nobody listens yet; the kernel forgets it with this process."""
    with socket.socket(socket.AF_UNIX) as lock:
        if sys.platform == "linux":
            try:
                lock.bind(f"\0bucketserve-port-{port}")
            except OSError:
                raise StackError(_taken(port, name, "another local stack of BucketServe")) from None
        yield


def _try_to_bind(address: Address, name: str) -> None:
    try:
        for family, _, _, _, at in socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            with socket.socket(family, socket.SOCK_STREAM) as tried:
                # As gRPC does: connections that are ending don't count.
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(at)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StackError(_taken(address.port, name, "another program")) from None
        raise StackError(f"{name} can't listen on {address}: {error.strerror}") from None


def _taken(port: int, name: str, who: str) -> str:
    return (
        f"port {port} ({name}) is in use by {who}; stop that, or choose another port "
        "(--port for gateway and scheduler, the setting for anything else)"
    )
