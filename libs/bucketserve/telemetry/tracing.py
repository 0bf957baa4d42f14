"""OpenTelemetry traces without globals: one provider per process, W3C context in and out of queue records.

Spans that end in another task, or are known only afterwards (queue, batch, prefill, decode), are recorded with explicit
start and end times; nothing keeps a span open across the queue.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from bucketserve.telemetry.spans import SPANS

__all__ = ["Tracing"]

Attributes = Mapping[str, str | int] | Mapping[str, str | int | float | bool | Sequence[str]]

_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """The tracer of one process. Without an endpoint nothing is recorded, and spans cost next to nothing."""

    def __init__(
        self, service_name: str, instance_id: str, *, otlp_endpoint: str = "", sample_ratio: float = 1.0
    ) -> None:
        """Exports over OTLP gRPC to otlp_endpoint (http://host:4317), in batches, from a thread."""
        self.is_enabled = bool(otlp_endpoint)
        self._sample_ratio = sample_ratio
        sampler = ParentBased(TraceIdRatioBased(sample_ratio))
        resource = Resource.create({"service.name": service_name, "service.instance.id": instance_id})
        self._provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
        if self.is_enabled:
            exporter = OTLPSpanExporter(endpoint=otlp_endpoint, insecure=otlp_endpoint.startswith("http://"))
            self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("bucketserve")

    def start(
        self, name: str, *, parent: Context | None = None, start_unix_us: int | None = None, is_server: bool = False
    ) -> Span:
        """Returns a started span; the caller ends it. Name must be in the catalogue."""
        if not self.is_enabled:
            return INVALID_SPAN
        return self._tracer.start_span(
            SPANS[name].name,
            context=parent if parent is not None else Context(),
            kind=SpanKind.SERVER if is_server else SpanKind.INTERNAL,
            start_time=None if start_unix_us is None else start_unix_us * 1000,
        )

    def record(
        self,
        name: str,
        start_unix_us: int,
        end_unix_us: int,
        *,
        parent: Context | None = None,
        attributes: Attributes | None = None,
        links: Sequence[Context] = (),
        error: str = "",
    ) -> Span | None:
        """Records a span that is already over; None if tracing is off."""
        if not self.is_enabled:
            return None
        span = self._tracer.start_span(
            SPANS[name].name,
            context=parent if parent is not None else Context(),
            start_time=start_unix_us * 1000,
            attributes=dict(attributes or {}),
            links=[Link(get_current_span(context).get_span_context()) for context in links],
        )
        if error:
            span.set_attribute("error.type", error)
        span.end(max(end_unix_us, start_unix_us) * 1000)
        return span

    def shutdown(self) -> None:
        """Exports what is left and stops; waits for at most a few seconds."""
        self._provider.shutdown()

    @staticmethod
    def inject(span: Span) -> tuple[str, str]:
        """Returns (traceparent, tracestate) of a span; empty strings if it has no valid context."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(span, Context()))
        return carrier.get("traceparent", ""), carrier.get("tracestate", "")

    @staticmethod
    def extract(traceparent: str, tracestate: str = "") -> Context | None:
        """Returns the context to use as a parent; None if there is none or it is malformed."""
        if not traceparent:
            return None
        context = _PROPAGATOR.extract({"traceparent": traceparent, "tracestate": tracestate}, Context())
        return context if get_current_span(context).get_span_context().is_valid else None

    def adopt(self, traceparent: str, tracestate: str = "") -> Context | None:
        """Returns a client's context to use as a parent, as extract does.

        What a client wants recorded is recorded as often as sample_ratio says, whatever trace id it has chosen: our
        storage is not its to fill. What it doesn't want recorded isn't.
        """
        context = self.extract(traceparent, tracestate)
        if context is None or random.random() < self._sample_ratio:
            return context
        theirs = get_current_span(context).get_span_context()
        ours = SpanContext(theirs.trace_id, theirs.span_id, True, TraceFlags(TraceFlags.DEFAULT), theirs.trace_state)
        return set_span_in_context(NonRecordingSpan(ours), Context())

    @staticmethod
    def context_of(span: Span) -> Context:
        """Returns a context with that span, to be a parent."""
        return set_span_in_context(span, Context())
