"""What the gateway reports of itself: logs, metrics, spans."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from opentelemetry.trace import Span

from bucketserve.core.errors import BucketServeError
from bucketserve.rpc.convert import finish_reason_from_pb, request_class_from_pb
from bucketserve.telemetry.logs import EventLog, Repeated
from bucketserve.telemetry.metrics import ProcessMetrics
from bucketserve.telemetry.tracing import Tracing
from bucketserve.v1 import inference_pb2
from bucketserve_gateway.admission import Admission
from bucketserve_gateway.requests import OpenRequest, OpenRequests

__all__ = ["GatewayTelemetry"]


class GatewayTelemetry:
    """Observes; changes nothing but the trace context of new requests."""

    def __init__(self, log: EventLog, metrics: ProcessMetrics, tracing: Tracing) -> None:
        """Takes the process's outlets."""
        self.log = log
        self._metrics = metrics
        self._tracing = tracing
        self._scheduler_away = Repeated()
        self._quotas_uncounted = Repeated()

    def watch(self, admission: Admission, requests: OpenRequests) -> None:
        """Shows from now on what is open."""
        self._metrics.watch("bucketserve_gateway_open_calls", lambda: admission.num_calls)
        self._metrics.watch("bucketserve_gateway_held_bytes", lambda: admission.num_bytes)
        self._metrics.watch("bucketserve_gateway_open_requests", lambda: len(requests))

    def begin(self, request: inference_pb2.GenerateRequest, metadata: Mapping[str, str]) -> Span:
        """Starts a request's root span, under the caller's if it sent its context."""
        parent = self._tracing.adopt(metadata.get("traceparent", ""), metadata.get("tracestate", ""))
        span = self._tracing.start("bucketserve.generate", parent=parent, is_server=True)
        if span.is_recording():
            operation = "chat" if request.WhichOneof("input") == "chat" else "text_completion"
            span.set_attribute("gen_ai.operation.name", operation)
        return span

    @contextlib.contextmanager
    def tokenizing(self, parent: Span) -> Iterator[None]:
        """Around tokenising."""
        if not parent.is_recording():
            yield
            return
        span = self._tracing.start("bucketserve.tokenize", parent=self._tracing.context_of(parent))
        try:
            yield
        finally:
            span.end()

    def context(self, span: Span) -> tuple[str, str]:
        """Returns (traceparent, tracestate) for the queue record."""
        return self._tracing.inject(span) if span.is_recording() else ("", "")

    def opened(self, opened: OpenRequest) -> None:
        """When a request has been validated and tokenised."""
        model = opened.valid.model.card.name
        self._metrics.count("bucketserve_gateway_prompt_tokens_total", len(opened.prompt_ids), model=model)

    def resumed(self, opened: OpenRequest) -> None:
        """When a request's next attempt begins."""
        cause = "preempted" if opened.was_preempted else "lost"
        self._metrics.count("bucketserve_gateway_resumptions_total", model=opened.valid.model.card.name, cause=cause)
        log = self.log.info if opened.was_preempted else self.log.warning
        log("request.resumed", request_id=opened.label, run_id=opened.run_id, cause=cause)

    def closed(self, opened: OpenRequest, span: Span) -> None:
        """When a request is over, however it ended."""
        labels = {
            "model": opened.valid.model.card.name,
            "request_class": request_class_from_pb(opened.valid.request_class).value,
        }
        outcome = "cancelled"
        if opened.finished is not None:
            outcome = finish_reason_from_pb(opened.finished.reason).value
        elif opened.error is not None:
            outcome = opened.error.reason.lower()
        self._metrics.count("bucketserve_gateway_requests_total", 1, **labels, outcome=outcome)
        num_tokens = len(opened.tokens)
        self._metrics.count("bucketserve_gateway_output_tokens_total", num_tokens, model=labels["model"])
        ttft_ms = None
        if opened.first_token_s is not None:
            ttft_s = opened.first_token_s - opened.arrival_s
            ttft_ms = round(ttft_s * 1e3, 2)
            self._metrics.observe("bucketserve_gateway_ttft_seconds", ttft_s, **labels)
            if num_tokens > 1:
                tpot_s = (time.monotonic() - opened.first_token_s) / (num_tokens - 1)
                self._metrics.observe("bucketserve_gateway_tpot_seconds", tpot_s, **labels)
        if opened.finished is not None:
            self._metrics.observe("bucketserve_gateway_queue_seconds", opened.finished.timings.queue_ms / 1e3, **labels)
        self.log.info(
            "request.done",
            request_id=opened.label,
            run_id=opened.run_id,
            outcome=outcome,
            prompt_tokens=len(opened.prompt_ids),
            output_tokens=num_tokens,
            ttft_ms=ttft_ms,
            attempts=opened.attempt,
        )
        if span.is_recording():
            span.set_attribute("bucketserve.request_id", opened.label)
            span.set_attribute("bucketserve.run_id", opened.run_id)
            # Also for a client that named none.
            span.set_attribute("gen_ai.request.model", labels["model"])
            span.set_attribute("bucketserve.attempt", opened.attempt)
            span.set_attribute("bucketserve.request_class", labels["request_class"])
            span.set_attribute("bucketserve.tenant", opened.valid.tenant)
            span.set_attribute("gen_ai.request.max_tokens", opened.max_tokens)
            span.set_attribute("gen_ai.usage.input_tokens", len(opened.prompt_ids))
            span.set_attribute("gen_ai.usage.output_tokens", num_tokens)
            span.set_attribute("gen_ai.response.finish_reasons", [outcome])
            if ttft_ms is not None:
                span.set_attribute("bucketserve.ttft_ms", ttft_ms)

    def refused(self, model: str, request_class: str, error: BucketServeError) -> None:
        """When a request was not even opened."""
        self._metrics.count(
            "bucketserve_gateway_requests_total",
            model=model,
            request_class=request_class,
            outcome=error.reason.lower(),
        )

    def refused_at_the_door(self, reason: str) -> None:
        """When a call was refused for what the gateway itself has open, or for its key."""
        self._metrics.count("bucketserve_gateway_refused_total", reason=reason.lower())

    def keys_unusable(self, problem: str) -> None:
        """When the file of keys has changed and can't be used; the keys before stay in force."""
        self.log.error("keys.file_unusable", detail=problem)

    def quota_uncounted(self, problem: str) -> None:
        """When what tenants use can't be counted, and is let in all the same."""
        if self._quotas_uncounted.is_due(problem):
            self.log.warning("quotas.uncounted", detail=problem)

    def scheduler_state(self, is_connected: bool, detail: str) -> None:
        """When the scheduler's stream comes or goes."""
        if is_connected:
            self._scheduler_away.is_over()
            self.log.info("scheduler.connected", detail=detail)
        elif self._scheduler_away.is_due(detail):
            self.log.warning("scheduler.disconnected", detail=detail)

    def job_store_unavailable(self, detail: str) -> None:
        """When jobs can't be looked for."""
        self.log.warning("jobs.store_unavailable", detail=detail)

    def job_request_done(self, is_stored: bool, is_error: bool) -> None:
        """When a request of a batch job has ended; not stored: another runner had it by then, or the job is over."""
        outcome = "superseded" if not is_stored else "failed" if is_error else "completed"
        self._metrics.count("bucketserve_gateway_job_requests_total", outcome=outcome)

    def unexpected(self, method: str, error: BaseException) -> None:
        """When a handler fails in a way that nobody foresaw."""
        self.log.error("rpc.failed", error=error, method=method)
