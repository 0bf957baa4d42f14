"""A whole BucketServe on this machine: embedded Valkey, scheduler, workers, gateway, each a process of its own."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from bucketserve.addresses import Address
from bucketserve.machine import num_cpus
from bucketserve.rpc.deployment import Deployment
from bucketserve.store.embedded import EmbeddedServer, ReservedPorts
from bucketserve_cli.plan import Settings, StackError, StackSpec, hold_addresses
from bucketserve_cli.pools import check_pools, sources_of
from bucketserve_cli.service_process import ServiceProcess
from bucketserve_gateway.names import ModelNames

__all__ = ["LocalStack", "StackError", "StackSpec"]

STOP_S = 30.0
HURRY_S = 2.0
POLL_S = 0.05


class LocalStack:
    """Starts everything on entering, stops it in order on leaving: gateway, workers, scheduler, Valkey."""

    def __init__(self, spec: StackSpec, on_progress: Callable[[str], None] = lambda line: None) -> None:
        """Starts nothing yet. on_progress is called with one line for each thing that happens.

        Raises:
            SettingsError: the environment or the file has a setting that is wrong, or names of models clash.
            InputError: the pools don't make a whole.
            StackError: one process's setting would be shared by several.
        """
        self.on_progress = on_progress
        self.services: dict[str, ServiceProcess] = {}
        self._ports = ReservedPorts()
        self.settings = Settings(spec, self._ports.take)
        model = self.settings.given("worker", "model") or spec.default_model
        model_name = self.settings.given("worker", "model_name") or "demo"
        self.workers = [
            {
                **given,
                "model": given.get("model") or model,
                "model_name": given.get("model_name") or model_name,
            }
            for given in spec.worker_settings
        ]
        """Settings of each worker that are given, with the model and its name filled in."""
        self.spec = replace(spec, model=self.workers[0]["model"], model_name=self.workers[0]["model_name"])
        """What was asked for, with the first worker's model and its name filled in."""
        self._flags_of_gateways = {
            "models": json.dumps(sources_of(self.workers)) if spec.model or spec.model_name or spec.pools else "",
            "aliases": json.dumps(dict(spec.aliases)) if spec.aliases else "",
        }
        self.aliases = dict(spec.aliases) or self.settings.table("gateway", "aliases")
        is_told = not self._flags_of_gateways["models"] and self.settings.given("gateway", "models")
        self.models = self.settings.table("gateway", "models") if is_told else sources_of(self.workers)
        """Where the files of each model are that is served."""
        if spec.pools:
            check_pools(self.workers)
        ModelNames(self.models, self.aliases)
        self.store: EmbeddedServer | None = None
        self._exit = contextlib.ExitStack()
        self._interrupts = 0
        self._is_interrupted = threading.Event()
        self._hurried_s: float | None = None
        self._listens: dict[str, Address] = {}
        for index in range(spec.num_gateways):
            port = spec.port if not index else 0
            self._listens[_name("gateway", index)] = self.settings.listen("gateway", "listen", port)
        for index in range(spec.num_schedulers):
            port = (spec.port + 1 if spec.port else spec.port) if not index else 0
            self._listens[_name("scheduler", index)] = self.settings.listen("scheduler", "listen", port)
        self.gateway_addresses = self._reached("gateway")
        self.scheduler_addresses = self._reached("scheduler")
        self._deliveries = [self.settings.listen("gateway", "delivery_listen") for _ in self.gateway_addresses]
        self._https = [
            self.settings.optional_listen("gateway", "http_listen", None if spec.port is None and not index else 0)
            for index in range(spec.num_gateways)
        ]
        self.delivery_addresses = [
            self.settings.given("gateway", "delivery_address") or str(listen.local()) for listen in self._deliveries
        ]
        # Another stack on this machine, or on the same Redis, is another deployment.
        port = self._listens["gateway"].port
        self.deployment = Deployment(
            self.settings.given("deployment", "name") or f"local-{port}",
            self.settings.given("deployment", "token") or secrets.token_hex(16),
            self.settings.tls(),
        )
        self.metrics_addresses: dict[str, str] = {}
        self.redis_url = ""
        """Of the store in use, once started."""

    def __enter__(self) -> LocalStack:
        """Returns once every service is SERVING.

        Raises:
            StackError: a port is in use, a service ended, it took longer than ten minutes, or interrupt() was called.
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
        self._ports.close()

    def interrupt(self) -> None:
        """Ends what is going on, sooner each time: waiting for services, then draining, then their last seconds.

        May be called by a signal handler. The first call is for whoever keeps the stack to see: is_interrupted.
        """
        self._interrupts += 1
        self._is_interrupted.set()
        if self._interrupts > 1:
            self._hurried_s = time.monotonic() if self._hurried_s is None else float("-inf")
            for service in self.services.values():
                # A service that drains is told a second time, and cuts what is left.
                service.signal(signal.SIGTERM if self._hurried_s > 0 else signal.SIGKILL)

    def wait_interrupted(self, timeout_s: float) -> bool:
        """Waits for at most timeout_s; returns whether interrupt() was called."""
        return self._is_interrupted.wait(timeout_s)

    def stop_services(self) -> None:
        """Stops all services in order; the store goes on, so that restart() finds it."""
        for kind_of in ("gateway", "worker", "scheduler"):
            stopping = [service for name, service in self.services.items() if name.startswith(kind_of)]
            for service in stopping:
                service.signal(signal.SIGTERM)
            end_s = time.monotonic() + STOP_S
            while any(service.exit_status is None for service in stopping):
                if time.monotonic() > min(end_s, (self._hurried_s or end_s) + HURRY_S):
                    break
                time.sleep(POLL_S)
            for service in stopping:
                service.wait(0)

    @property
    def gateway_address(self) -> str:
        """Address of the first gateway."""
        return self.gateway_addresses[0]

    @property
    def http_address(self) -> str:
        """Where the first gateway serves OpenAI's HTTP API; empty if it does not."""
        return self.http_addresses[0]

    @property
    def http_addresses(self) -> list[str]:
        """The same of every gateway."""
        return [str(address.local()) if address else "" for address in self._https]

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
        return self.services[name].is_serving()

    def wait_until_serving(self, timeout_s: float = 600.0) -> None:
        """Waits until every service answers SERVING, telling what it waits for.

        Raises:
            StackError: one ended, it took longer than timeout_s, or interrupt() was called.
        """
        deadline_s = time.monotonic() + timeout_s
        waiting = dict(self.services)
        told: dict[str, str] = {}
        while waiting:
            for name, service in list(waiting.items()):
                if service.is_serving():
                    self.on_progress(f"{name:<9} {service.health_address} ready")
                    del waiting[name]
                    continue
                if service.exit_status is not None:
                    raise StackError(f"{name} ended with status {service.exit_status}:\n{service.log_tail()}")
                event = str(service.last_event().get("progress", ""))
                if event and told.get(name) != event:
                    told[name] = event
                    self.on_progress(f"{name:<9} {event}")
            if time.monotonic() > deadline_s:
                raise StackError(f"not ready after {timeout_s:.0f} s: {', '.join(waiting)}")
            if self.wait_interrupted(POLL_S):
                raise StackError(f"interrupted while {', '.join(waiting) or 'nothing'} was starting")

    def _reached(self, kind: str) -> list[str]:
        return [str(address.local()) for name, address in self._listens.items() if name.startswith(kind)]

    def _start(self) -> None:
        for index in range(len(self.workers)):
            self._listens[f"worker-{index}"] = self._worker_listen(index)
        metrics = {}
        for name in self._listens:
            given = self.settings.given(name.partition("-")[0], "metrics_listen")
            if given != "":
                metrics[name] = Address.parse(given) if given else Address("127.0.0.1", self._ports.take())
        self.metrics_addresses = {name: str(address.local()) for name, address in metrics.items()}
        delivery = {f"{_name('gateway', index)} delivery": address for index, address in enumerate(self._deliveries)}
        delivery |= {f"{_name('gateway', index)} http": address for index, address in enumerate(self._https) if address}
        named = {f"{name} metrics": address for name, address in metrics.items()}
        self._exit.enter_context(hold_addresses({**self._listens, **delivery, **named}))
        self.redis_url = self.spec.redis_url or self.settings.given("scheduler", "redis_url") or self._start_store()
        self._log_dir = self.spec.log_dir or Path(
            self._exit.enter_context(tempfile.TemporaryDirectory(prefix="bucketserve-"))
        )
        for name in [name for name in self._listens if name.startswith("scheduler")]:
            self._spawn(name, {"redis_url": self.spec.redis_url}, {"redis_url": self.redis_url})
        for index in range(len(self.workers)):
            self._start_worker(index)
        for index, _ in enumerate(self.gateway_addresses):
            self._start_gateway(index)
        self.wait_until_serving()

    def _start_store(self) -> str:
        self.store = self._exit.enter_context(EmbeddedServer())
        self.on_progress(f"valkey    {self.store.url}")
        return self.store.url

    def _worker_listen(self, index: int) -> Address:
        given = self.spec.environ_of(f"worker-{index}").get("BUCKETSERVE_WORKER_LISTEN")
        return Address.parse(given) if given else self.settings.listen("worker", "listen")

    def _start_worker(self, index: int) -> None:
        threads = self.spec.threads_per_worker or max(num_cpus() // len(self.workers), 1)
        defaults = {
            "worker_id": f"worker-{index}",
            "scheduler_address": ",".join(self.scheduler_addresses),
            # Workers on one machine share its cores; each taking all of them would make all of them slow.
            "num_threads": str(threads),
        }
        self._spawn(f"worker-{index}", self.workers[index], defaults)

    def _start_gateway(self, index: int) -> None:
        flags = {
            **self._flags_of_gateways,
            "redis_url": "" if self.redis_url.startswith("memory") else self.spec.redis_url,
        }
        defaults = {
            "models": json.dumps(self.models),
            "http_listen": str(self._https[index] or ""),
            "delivery_listen": str(self._deliveries[index]),
            "delivery_address": self.delivery_addresses[index],
            "scheduler_address": ",".join(self.scheduler_addresses),
            "redis_url": "" if self.redis_url.startswith("memory") else self.redis_url,
            # Everybody is on this machine: there is no load balancer that takes its time.
            "lame_duck_s": "0.2",
        }
        self._spawn(_name("gateway", index), flags, defaults)

    def _spawn(self, name: str, flags: Mapping[str, str], defaults: Mapping[str, str]) -> None:
        """Starts a service; its addresses were decided before."""
        section = name.partition("-")[0]
        listen = self._listens[name]
        defaults = {"metrics_listen": self.metrics_addresses.get(name, ""), **defaults}
        environ = {
            **self.settings.environ("deployment", {"name": self.deployment.name, "token": self.deployment.token}, {}),
            **self.settings.environ("telemetry", {}, {"log_format": "json"}),
            **self.settings.environ(section, {"listen": str(listen), **flags}, defaults),
            **self.spec.environ_of(name),
            **self.spec.environ,
        }
        module = self.spec.worker_module if section == "worker" else f"bucketserve_{section}"
        self.services[name] = ServiceProcess(
            name,
            module,
            environ,
            str(listen.local()),
            self._log_dir,
            self.deployment.health_service,
            self.deployment.tls,
        )


def _name(kind: str, index: int) -> str:
    return f"{kind}-{index}" if index else kind
