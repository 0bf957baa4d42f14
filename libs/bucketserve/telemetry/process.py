"""All telemetry of one process, opened and closed together."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from bucketserve.addresses import Address
from bucketserve.core.errors import SettingsError
from bucketserve.telemetry.logs import EventLog, open_log
from bucketserve.telemetry.metrics import MetricsEndpoint, ProcessMetrics
from bucketserve.telemetry.names import Service
from bucketserve.telemetry.tracing import Tracing

__all__ = ["Telemetry", "open_telemetry"]


@dataclass(frozen=True, slots=True)
class Telemetry:
    """The outlets of one process."""

    log: EventLog
    metrics: ProcessMetrics
    tracing: Tracing


@contextlib.contextmanager
def open_telemetry(
    service: Service,
    instance_id: str,
    *,
    metrics_address: Address | None,
    otlp_endpoint: str = "",
    sample_ratio: float = 1.0,
    log_level: str = "info",
    log_format: Literal["auto", "json", "text"] = "auto",
    certificate_ends_unix_s: Callable[[], float] | None = None,
    metrics_context: ssl.SSLContext | None = None,
) -> Iterator[Telemetry]:
    """Yields the outlets; on leaving exports the last spans and stops listening.

    Raises:
        SettingsError: metrics_address can't be bound.
    """
    log = open_log(service.value, instance_id, level=log_level, style=log_format)
    metrics = ProcessMetrics(service)
    if certificate_ends_unix_s is not None:
        metrics.watch_certificate(certificate_ends_unix_s)
    with contextlib.suppress(RuntimeError):
        metrics.watch_tasks(asyncio.get_running_loop())
    tracing = Tracing(
        f"bucketserve-{service.value}", instance_id, otlp_endpoint=otlp_endpoint, sample_ratio=sample_ratio
    )
    try:
        with _endpoint(metrics, metrics_address, metrics_context):
            yield Telemetry(log, metrics, tracing)
    finally:
        tracing.shutdown()


def _endpoint(
    metrics: ProcessMetrics, address: Address | None, context: ssl.SSLContext | None
) -> contextlib.AbstractContextManager[object]:
    if address is None:
        return contextlib.nullcontext()
    try:
        return MetricsEndpoint(metrics.registry, *address, context)
    except OSError as error:
        raise SettingsError([f"metrics_listen: can't listen on {address}: {error.strerror or error}"]) from error
