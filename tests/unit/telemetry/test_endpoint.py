"""The metrics endpoint keeps no connection that asks nothing."""

from __future__ import annotations

import socket
import urllib.request

import pytest

from bucketserve.telemetry import metrics
from bucketserve.telemetry.metrics import MetricsEndpoint, ProcessMetrics
from bucketserve.telemetry.names import Service


def test_silent_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SILENCE_S", 0.2)
    with MetricsEndpoint(ProcessMetrics(Service.GATEWAY).registry, "127.0.0.1", 0) as endpoint:
        silent = [socket.create_connection(("127.0.0.1", endpoint.port), timeout=10) for _ in range(20)]
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=10) as response:
            assert b"bucketserve_gateway_open_calls" in response.read()
        for each in silent:
            # Closed by the other side.
            assert each.recv(1) == b""
            each.close()
