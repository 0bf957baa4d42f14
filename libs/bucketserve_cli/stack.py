"""A whole BucketServe on this machine: embedded Valkey, scheduler, workers, gateway, each a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import grpc

from bucketserve.rpc.probe import check_health
from bucketserve.store.embedded import EmbeddedServer, ReservedPorts

__all__ = ["LocalStack", "ServiceProcess", "StackError", "StackSpec"]

STOP_S = 30.0
KILL_S = 5.0


class StackError(Exception):
    """A service did not come up; says where its log is and how it ended."""


@dataclass(frozen=True, kw_only=True)
class StackSpec:
    """What to start."""

    model: str
    """Directory or hub id."""
    model_name: str = "demo"
    num_workers: int = 1
    roles: tuple[str, ...] = ()
    """Role of each worker, in place of num_workers of role both."""
    num_schedulers: int = 1
    """One leads, the others stand by."""
    num_gateways: int = 1
    engine: str = "transformers"
    port: int = 0
    """Port of the public API, and the next one for the first scheduler; 0: any free ones."""
    redis_url: str = ""
    """Empty: an embedded server of our own."""
    log_dir: Path | None = None
    """Where logs go; None: a temporary folder."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Settings for all services, BUCKETSERVE_*."""
    worker_environ: tuple[Mapping[str, str], ...] = ()
    """Further settings for each worker, by position."""

    @property
    def worker_roles(self) -> tuple[str, ...]:
        """Role of each worker."""
        return self.roles or ("both",) * self.num_workers


class ServiceProcess:
    """One child process with its log file."""

    def __init__(self, name: str, module: str, environ: Mapping[str, str], health_address: str, log_dir: Path) -> None:
        """Starts it. It has a session of its own, so that Ctrl-C reaches us alone and we stop it in order."""
        self.name = name
        self.health_address = health_address
        self.log_path = log_dir / f"{name}.log"
        self._again = (name, module, environ, health_address, log_dir)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                env={**os.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.poll()

    def last_event(self) -> Mapping[str, object]:
        """Returns the last JSON line of its log, empty if there is none."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            lines = self.log_path.read_bytes()[-8192:].splitlines()
            event = json.loads(lines[-1])
            if isinstance(event, dict):
                return event
        return {}

    def log_tail(self, num_lines: int = 15) -> str:
        """Returns the end of its log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, if it still runs."""
        if self.exit_status is None:
            self._process.send_signal(number)

    def again(self) -> ServiceProcess:
        """Returns a new process started the same way; its log goes on in the same file."""
        return ServiceProcess(*self._again)

    def wait(self, timeout_s: float) -> int:
        """Waits for its end; kills it when that takes longer than timeout_s. Returns the exit status."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(KILL_S)


class LocalStack:
    """Starts everything on entering, stops it in order on leaving: gateway, workers, scheduler, Valkey."""

    def __init__(self, spec: StackSpec, on_progress: Callable[[str], None] = lambda line: None) -> None:
        """Starts nothing yet. on_progress is called with one line for each thing that happens."""
        self.spec = spec
        self.on_progress = on_progress
        self.services: dict[str, ServiceProcess] = {}
        self._exit = contextlib.ExitStack()
        # Also while a service is away: it comes back to where it was.
        self._ports = ReservedPorts()
        first, second = (spec.port, spec.port + 1) if spec.port else (0, 0)
        self.gateway_addresses = self._addresses(spec.num_gateways, first)
        self.scheduler_addresses = self._addresses(spec.num_schedulers, second)
        self.delivery_addresses = self._addresses(spec.num_gateways)
        self.metrics_addresses: dict[str, str] = {}
        self.redis_url = ""
        """Of the store in use, once started."""

    def __enter__(self) -> LocalStack:
        """Returns once every service is SERVING.

        Raises:
            StackError: a service ended, or took longer than ten minutes.
        """
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops everything; what doesn't end within its drain time is killed."""
        self.stop_services()
        self._exit.close()
        self._ports.close()

    def stop_services(self) -> None:
        """Stops all services in order; the store goes on, so that restart() finds it."""
        for kind_of in ("gateway", "worker", "scheduler"):
            stopping = [service for name, service in self.services.items() if name.startswith(kind_of)]
            for service in stopping:
                service.signal(signal.SIGTERM)
            for service in stopping:
                service.wait(STOP_S)

    @property
    def gateway_address(self) -> str:
        """Address of the first gateway."""
        return self.gateway_addresses[0]

    @property
    def delivery_address(self) -> str:
        """Where workers reach the first gateway."""
        return self.delivery_addresses[0]

    @property
    def scheduler_address(self) -> str:
        """Address of the first scheduler."""
        return self.scheduler_addresses[0]

    def _addresses(self, number: int, first_port: int = 0) -> list[str]:
        """Returns addresses of our own; the first at that port, unless it is 0."""
        return [f"127.0.0.1:{(not index and first_port) or self._ports.take()}" for index in range(number)]

    def worker_names(self) -> list[str]:
        """Returns the names of the workers' services."""
        return [name for name in self.services if name.startswith("worker")]

    def restart(self, name: str) -> ServiceProcess:
        """Starts a service that has ended again, as it was: same addresses, same settings. Does not wait for it."""
        service = self.services[name].again()
        self.services[name] = service
        return service

    def is_serving(self, name: str) -> bool:
        """Whether a service answers SERVING."""
        return _is_serving(self.services[name].health_address)

    def _start_worker(self, index: int, role: str) -> ServiceProcess:
        name = f"worker-{index}"
        extra = self.spec.worker_environ[index] if index < len(self.spec.worker_environ) else {}
        listen = f"127.0.0.1:{self._ports.take()}"
        environ = {
            "BUCKETSERVE_WORKER_LISTEN": listen,
            "BUCKETSERVE_WORKER_WORKER_ID": name,
            "BUCKETSERVE_WORKER_SCHEDULER_ADDRESS": ",".join(self.scheduler_addresses),
            "BUCKETSERVE_WORKER_MODEL": self.spec.model,
            "BUCKETSERVE_WORKER_MODEL_NAME": self.spec.model_name,
            "BUCKETSERVE_WORKER_ENGINE": self.spec.engine,
            "BUCKETSERVE_WORKER_ROLE": role,
            # Workers on one machine share its cores; each taking all of them would make all of them slow.
            "BUCKETSERVE_WORKER_NUM_THREADS": str(max((os.cpu_count() or 1) // len(self.spec.worker_roles), 1)),
            **extra,
        }
        return self._spawn(name, "bucketserve_worker", environ, listen)

    def _start(self) -> None:
        redis_url = self.spec.redis_url
        if not redis_url:
            server = self._exit.enter_context(EmbeddedServer())
            redis_url = server.url
            self.on_progress(f"valkey    {redis_url}")
        self.redis_url = redis_url
        self._log_dir = self.spec.log_dir or Path(
            self._exit.enter_context(tempfile.TemporaryDirectory(prefix="bucketserve-"))
        )
        self._log_dir.mkdir(parents=True, exist_ok=True)
        for index, address in enumerate(self.scheduler_addresses):
            self._spawn(
                f"scheduler-{index}" if index else "scheduler",
                "bucketserve_scheduler",
                {"BUCKETSERVE_SCHEDULER_LISTEN": address, "BUCKETSERVE_SCHEDULER_REDIS_URL": redis_url},
                address,
            )
        for index, role in enumerate(self.spec.worker_roles):
            self._start_worker(index, role)
        for index, (address, delivery) in enumerate(zip(self.gateway_addresses, self.delivery_addresses, strict=True)):
            self._spawn(
                f"gateway-{index}" if index else "gateway",
                "bucketserve_gateway",
                {
                    "BUCKETSERVE_GATEWAY_LISTEN": address,
                    "BUCKETSERVE_GATEWAY_DELIVERY_LISTEN": delivery,
                    "BUCKETSERVE_GATEWAY_DELIVERY_ADDRESS": delivery,
                    "BUCKETSERVE_GATEWAY_SCHEDULER_ADDRESS": ",".join(self.scheduler_addresses),
                    "BUCKETSERVE_GATEWAY_REDIS_URL": "" if redis_url.startswith("memory") else redis_url,
                    # Everybody is on this machine: there is no load balancer that takes its time.
                    "BUCKETSERVE_GATEWAY_LAME_DUCK_S": "0.2",
                    "BUCKETSERVE_GATEWAY_MODELS": f"{self.spec.model_name}={self.spec.model}",
                },
                address,
            )
        self.wait_until_serving()

    def _spawn(self, name: str, module: str, environ: Mapping[str, str], health_address: str) -> ServiceProcess:
        metrics = f"127.0.0.1:{self._ports.take()}"
        section = module.removeprefix("bucketserve_").upper()
        self.metrics_addresses[name] = metrics
        service = ServiceProcess(
            name,
            module,
            {
                "BUCKETSERVE_TELEMETRY_LOG_FORMAT": "json",
                f"BUCKETSERVE_{section}_METRICS_LISTEN": metrics,
                **environ,
                **self.spec.environ,
            },
            health_address,
            self._log_dir,
        )
        self.services[name] = service
        return service

    def wait_until_serving(self, timeout_s: float = 600.0) -> None:
        """Waits until every service answers SERVING, telling what it waits for.

        Raises:
            StackError: one ended, or it took longer than timeout_s.
        """
        deadline_s = time.monotonic() + timeout_s
        waiting = dict(self.services)
        told: dict[str, str] = {}
        while waiting:
            for name, service in list(waiting.items()):
                if service.exit_status is not None:
                    raise StackError(f"{name} ended with status {service.exit_status}:\n{service.log_tail()}")
                if _is_serving(service.health_address):
                    self.on_progress(f"{name:<9} {service.health_address} ready")
                    del waiting[name]
                    continue
                event = str(service.last_event().get("progress", ""))
                if event and told.get(name) != event:
                    told[name] = event
                    self.on_progress(f"{name:<9} {event}")
            if time.monotonic() > deadline_s:
                raise StackError(f"not ready after {timeout_s:.0f} s: {', '.join(waiting)}")
            time.sleep(0.05)


def _is_serving(address: str) -> bool:
    try:
        return check_health(address, timeout_s=1.0) == "SERVING"
    except grpc.RpcError:
        return False
