from __future__ import annotations

import pytest

from bucketserve.telemetry.tracing import Tracing
from tests.otlp import OtlpReceiver


def test_context_survives_the_queue_record_and_spans_reach_the_receiver() -> None:
    with OtlpReceiver() as receiver:
        gateway = Tracing("bucketserve-gateway", "g1", otlp_endpoint=receiver.endpoint)
        worker = Tracing("bucketserve-worker", "w1", otlp_endpoint=receiver.endpoint)
        root = gateway.start("bucketserve.generate", is_server=True)
        traceparent, tracestate = gateway.inject(root)
        parent = worker.extract(traceparent, tracestate)
        worker.record("bucketserve.prefill", 1_000_000, 2_000_000, parent=parent, attributes={"n": 3}, links=[parent])
        root.end()
        gateway.shutdown()
        worker.shutdown()
        spans = {span.name: span for span in receiver.spans()}
    generate, prefill = spans["bucketserve.generate"], spans["bucketserve.prefill"]
    assert prefill.trace_id == generate.trace_id
    assert prefill.parent_id == generate.span_id
    assert (prefill.start_ns, prefill.end_ns) == (1_000_000_000, 2_000_000_000)
    assert prefill.attributes == {"n": 3}
    assert prefill.links == (generate.trace_id,)
    assert (generate.service, generate.instance) == ("bucketserve-gateway", "g1")


def test_without_endpoint_nothing_is_sampled() -> None:
    tracing = Tracing("bucketserve-gateway", "g1")
    span = tracing.start("bucketserve.generate")
    assert not span.is_recording()
    assert tracing.record("bucketserve.queue", 0, 1) is None
    tracing.shutdown()


def test_an_unsampled_parent_is_respected() -> None:
    with OtlpReceiver() as receiver:
        tracing = Tracing("bucketserve-gateway", "g1", otlp_endpoint=receiver.endpoint)
        parent = tracing.extract("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
        span = tracing.start("bucketserve.generate", parent=parent)
        assert not span.is_recording()
        span.end()
        tracing.shutdown()
        assert receiver.spans() == []


def test_malformed_context_is_no_parent() -> None:
    assert Tracing.extract("") is None
    assert Tracing.extract("00-zz-zz-01") is None


@pytest.mark.parametrize("trace_id", ["0" * 31 + "1", "f" * 32, "4bf92f3577b34da6a3ce929d0e0e4736"])
def test_a_client_decides_neither_by_its_flag_nor_by_its_trace_id_what_is_recorded(trace_id: str) -> None:
    wanted = f"00-{trace_id}-00f067aa0ba902b7-01"
    with OtlpReceiver() as receiver:
        for ratio, fewest, most in ((0.0, 0, 0), (0.5, 300, 700), (1.0, 1000, 1000)):
            tracing = Tracing("gateway", "g", otlp_endpoint=receiver.endpoint, sample_ratio=ratio)
            try:
                spans = [tracing.start("bucketserve.generate", parent=tracing.adopt(wanted)) for _ in range(1000)]
                # The chance that one in two is outside is less than 1e-36.
                assert fewest <= sum(span.is_recording() for span in spans) <= most
                assert {f"{span.get_span_context().trace_id:032x}" for span in spans} == {trace_id}
            finally:
                tracing.shutdown()


def test_who_follows_the_gateway_records_what_it_does() -> None:
    with OtlpReceiver() as receiver:
        tracing = Tracing("worker", "w", otlp_endpoint=receiver.endpoint, sample_ratio=0.0)
        parent = tracing.extract("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
        assert tracing.start("bucketserve.generate", parent=parent).is_recording()
        tracing.shutdown()
