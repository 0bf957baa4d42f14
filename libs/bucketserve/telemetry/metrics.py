"""Prometheus metrics of one process: created from the catalogue, kept in a registry of their own."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from bucketserve.addresses import Address
from bucketserve.telemetry.names import METRICS, Kind, Service

__all__ = ["MetricsEndpoint", "ProcessMetrics"]


M = TypeVar("M", Counter, Gauge, Histogram)

SILENCE_S = 5.0
"""After which a connection that asks nothing is closed."""


class ProcessMetrics:
    """The metrics of one service, by the names in the catalogue. Naming one that isn't there is a KeyError."""

    def __init__(self, service: Service) -> None:
        """Creates all of the service's metrics, so that each is exported from the start."""
        self.registry = CollectorRegistry()
        # Memory, CPU time, open files: what a leak shows in.
        ProcessCollector(registry=self.registry)
        self._tasks = Gauge("process_asyncio_tasks", "Tasks of the event loop.", registry=self.registry)
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        self._children: dict[tuple[object, ...], Any] = {}
        for metric in METRICS.values():
            if metric.service is not service:
                continue
            match metric.kind:
                case Kind.COUNTER:
                    name = metric.name.removesuffix("_total")
                    self._counters[metric.name] = Counter(name, metric.help, metric.labels, registry=self.registry)
                case Kind.GAUGE:
                    self._gauges[metric.name] = Gauge(metric.name, metric.help, metric.labels, registry=self.registry)
                case Kind.HISTOGRAM:
                    self._histograms[metric.name] = Histogram(
                        metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry
                    )

    def watch_tasks(self, loop: asyncio.AbstractEventLoop) -> None:
        """Shows the number of the event loop's tasks from now on."""
        self._tasks.set_function(lambda: len(asyncio.all_tasks(loop)))

    def watch_certificate(self, ends_unix_s: Callable[[], float]) -> None:
        """Shows from now on when the process's TLS certificate ends."""
        help_text = "When the certificate that the process shows ends, in Unix time."
        gauge = Gauge("process_tls_certificate_ends_seconds", help_text, registry=self.registry)
        gauge.set_function(ends_unix_s)

    def watch(self, name: str, read: Callable[[], float], **labels: str) -> None:
        """Shows from now on in a gauge what read() returns whenever somebody asks, in another thread."""
        self._of(self._gauges, name, labels).set_function(read)

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Adds to a counter."""
        self._of(self._counters, name, labels).inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge."""
        self._of(self._gauges, name, labels).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Adds an observation to a histogram."""
        self._of(self._histograms, name, labels).observe(value)

    def _of(self, metrics: Mapping[str, M], name: str, labels: Mapping[str, str]) -> M:
        """Returns the metric with its labels; looked up once, since the library checks and locks each time."""
        if not labels:
            return metrics[name]
        key = (name, *labels.items())
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metrics[name].labels(**labels)
        return child

    def values(self) -> Mapping[str, float]:
        """Returns the samples without their labels summed by name, for tests and logs."""
        totals: dict[str, float] = {}
        for family in self.registry.collect():
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return totals


class MetricsEndpoint:
    """HTTP /metrics in a thread, so that a busy event loop does not hide the process from its monitoring."""

    def __init__(
        self, registry: CollectorRegistry, host: str, port: int, context: ssl.SSLContext | None = None
    ) -> None:
        """Listens at once; port 0 takes a free one. With a context it speaks TLS.

        Raises:
            OSError: the address can't be bound.
        """
        if Address(host, port).is_wildcard:
            # Of both families, as gRPC's servers do.
            host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
        self._server, self._thread = start_http_server(port, host, registry)
        # Each connection has a thread and a descriptor: who asks nothing may not keep them.
        handler: Any = self._server.RequestHandlerClass
        members: dict[str, Any] = {"timeout": SILENCE_S}
        if context is not None:
            members |= _tls_members(handler, context)
        # Whoever breaks off, asks nothing or shows no certificate is no fault of ours to print.
        server: Any = self._server
        server.handle_error = lambda request, address: None
        self._server.RequestHandlerClass = type("Handler", (handler,), members)
        self.port: int = self._server.server_port

    def __enter__(self) -> MetricsEndpoint:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _tls_members(handler: Any, context: ssl.SSLContext) -> dict[str, Any]:
    """Returns what makes a handler of connections one that speaks TLS: hands are shaken in the connection's thread."""

    def setup(self: Any) -> None:
        self.request.settimeout(SILENCE_S)
        self.request = context.wrap_socket(self.request, server_side=True)
        handler.setup(self)

    def finish(self: Any) -> None:
        try:
            handler.finish(self)
        finally:
            self.request.close()

    return {"setup": setup, "finish": finish}
