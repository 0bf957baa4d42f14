from __future__ import annotations

import re
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bucketserve.telemetry.metrics import MetricsEndpoint, ProcessMetrics
from bucketserve.telemetry.names import METRICS, Kind, Service


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_the_catalogue_is_consistent(metric) -> None:
    assert metric.help.endswith(".")
    assert metric.unit
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert (metric.kind is Kind.COUNTER) == metric.name.endswith("_total")
    # Ids would make the number of series grow without bound.
    assert not [label for label in metric.labels if re.search(r"(_id|request|tenant)$", label)]


@pytest.mark.parametrize("service", list(Service))
def test_every_metric_of_a_service_is_exported_over_http(service: Service) -> None:
    metrics = ProcessMetrics(service)
    with (
        MetricsEndpoint(metrics.registry, "127.0.0.1", 0) as endpoint,
        urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=5) as response,
    ):
        families = {family.name for family in text_string_to_metric_families(response.read().decode())}
    expected = {name.removesuffix("_total") for name, metric in METRICS.items() if metric.service is service}
    assert expected <= families


def test_values_are_counted_with_their_labels() -> None:
    metrics = ProcessMetrics(Service.SCHEDULER)
    metrics.count("bucketserve_scheduler_refused_total", reason="queue_tokens")
    metrics.count("bucketserve_scheduler_refused_total", 2, reason="too_large")
    metrics.set("bucketserve_scheduler_leading", 1, model="m")
    metrics.observe("bucketserve_scheduler_batch_requests", 7)
    values = metrics.values()
    assert values["bucketserve_scheduler_refused_total"] == 3
    assert values["bucketserve_scheduler_leading"] == 1
    assert values["bucketserve_scheduler_batch_requests_sum"] == 7
    with pytest.raises(KeyError):
        metrics.count("bucketserve_worker_steps_total")


def test_a_watched_gauge_is_read_whenever_somebody_asks() -> None:
    metrics, free = ProcessMetrics(Service.WORKER), [7]
    metrics.watch("bucketserve_worker_kv_free_tokens", lambda: free[0], model="m")
    assert metrics.values()["bucketserve_worker_kv_free_tokens"] == 7
    free[0] = 3
    assert metrics.values()["bucketserve_worker_kv_free_tokens"] == 3
