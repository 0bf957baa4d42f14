"""The Helm chart: linted, rendered over a matrix of values, validated strictly, and held against code and compose."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python.chart import Chart, lint
from helm_python.errors import HelmError

from bucketserve.addresses import Address
from bucketserve.config import TelemetrySettings, TlsSettings, load_settings
from bucketserve_gateway.names import ModelNames
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_scheduler.settings import SchedulerSettings
from bucketserve_worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "k8s" / "bucketserve"
SECTIONS = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "worker": WorkerSettings,
    "tls": TlsSettings,
    "telemetry": TelemetrySettings,
}
OLDEST, NEWEST = "1.27.0", "1.37.0"

MATRIX: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything on": {
        "jaeger": {"enabled": True},
        "gateway": {"autoscaling": {"enabled": True}, "service": {"type": "LoadBalancer", "annotations": {"a": "b"}}},
        "scheduler": {"podDisruptionBudget": {"enabled": True}},
        "model": {"name": "llama", "source": "/models/llama", "existingClaim": "models"},
        "imagePullSecrets": [{"name": "registry"}],
        "image": {"registry": "registry.example/team", "tag": "9.9"},
        "worker": {
            "resources": {"limits": {"nvidia.com/gpu": 1}},
            "device": "cuda",
            "nodeSelector": {"gpu": "yes"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "extraEnv": {"BUCKETSERVE_WORKER_MAX_STEP_TOKENS": "512", "BUCKETSERVE_WORKER_NUM_THREADS": "3"},
            "podAnnotations": {"note": "x"},
            "kvBudgetBytes": 30000000000,
        },
    },
    "everything off": {
        "redis": {"enabled": False, "url": "sentinel://me:pw@[fd00::1]:26379,b:26379/main/1?sentinel_password=x"},
        "model": {"name": "a=b, c", "source": "/models/a,b=c"},
        "networkPolicy": {"enabled": False},
        "serviceAccount": {"create": False},
        "gateway": {"podDisruptionBudget": {"enabled": False}},
        "worker": {"podDisruptionBudget": {"enabled": False}},
        "telemetry": {"otlpEndpoint": "https://collector:4317"},
    },
    "prefill and decode apart": {
        "worker": {"disaggregated": {"enabled": True, "prefillReplicas": 2, "decodeReplicas": 3}},
        "scheduler": {"extraEnv": {"BUCKETSERVE_SCHEDULER_SWITCH_ROLES": "true"}},
    },
    "locked": {
        "tls": {"existingSecret": "papers", "clientCaSecret": "clients", "metrics": "mutual"},
        "auth": {"existingSecret": "keys"},
    },
    "vllm": {
        "worker": {
            "engine": "vllm",
            "engineArgs": {"tensor_parallel_size": "2", "hf_overrides": '{"a": 1}'},
            "runtimeClassName": "nvidia",
            "sharedMemory": "8Gi",
            "strategy": "Recreate",
            "resources": {"limits": {"nvidia.com/gpu": 2, "memory": "64Gi"}},
        },
    },
    "two models": {
        "worker": {"resources": {"requests": {"cpu": "2"}}, "extraEnv": {"BUCKETSERVE_WORKER_HANG_S": "60"}},
        "pools": {
            "chat": {
                "model": {"name": "a=b, c", "source": "/models/a,b=c"},
                "engine": "vllm",
                "device": "cuda",
                "replicas": 3,
                "engineArgs": {"tensor_parallel_size": "2"},
                "runtimeClassName": "nvidia",
                "sharedMemory": "8Gi",
                "strategy": "Recreate",
                "startupSeconds": 7201,
                "resources": {"limits": {"nvidia.com/gpu": 2}},
                "nodeSelector": {"gpu": "yes"},
                "tolerations": [{"key": "gpu", "operator": "Exists"}],
                "podDisruptionBudget": {"enabled": False, "minAvailable": 0},
            },
            "small-1": {"role": "prefill", "replicas": 0},
            "small-2": {"role": "decode", "quantization": "int8", "extraEnv": {}, "kvBudgetBytes": 30000000000},
        },
        "aliases": {"latest": "a=b, c", "org/small": "demo"},
    },
    "redis without volume": {"redis": {"storage": {"enabled": False}}},
}


RELEASES = ("rel", "bucketserve", "bucketserve-gateway", "my-bucketserve-2")
"""bucketserve is the documented one: its services are called as the settings' sections are."""


@cache
def render(case: str, release: str = "rel") -> list[dict[str, Any]]:
    files = Chart.load(CHART).render(MATRIX[case], name=release, namespace="ns")
    return [
        document
        for path, text in files.items()
        if path.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]


def of_kind(case: str, kind: str, release: str = "rel") -> dict[str, dict[str, Any]]:
    return {d["metadata"]["name"]: d for d in render(case, release) if d["kind"] == kind}


def workloads(case: str, release: str = "rel") -> dict[str, dict[str, Any]]:
    return {**of_kind(case, "Deployment", release), **of_kind(case, "StatefulSet", release)}


def component_of(workload: dict[str, Any]) -> str:
    return workload["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    return workload["spec"]["template"]


def container(workload: dict[str, Any]) -> dict[str, Any]:
    return pod(workload)["spec"]["containers"][0]


def environment(workload: dict[str, Any]) -> dict[str, Any]:
    return {item["name"]: item.get("value", "<field>") for item in container(workload)["env"]}


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def test_lint_finds_nothing() -> None:
    report = lint(CHART, strict=True)
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] >= 2] == []


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("case", MATRIX)
def test_manifests_are_strictly_valid(case: str, version: str) -> None:
    documents = render(case)
    assert len(documents) > 5
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize(
    "values",
    [
        {"unknown": 1},
        {"worker": {"engine": "chef"}},
        {"worker": {"device": "tpu"}},
        {"worker": {"engineArgs": {"tensor_parallel_size": 2}}},
        {"worker": {"sharedMemory": "lots"}},
        {"worker": {"strategy": "OnDelete"}},
        {"worker": {"startupSeconds": 0}},
        {"worker": {"startupSeconds": "15m"}},
        {"pools": {"chat": {"startupSeconds": 9}}},
        {"gateway": {"replicas": -1}},
        {"scheduler": {"replicas": 0}},
        {"telemetry": {"sampleRatio": 2}},
        {"redis": {"enabled": False, "url": "http://x"}},
        {"model": {"name": "", "source": "x"}},
        {"image": {"pullPolicy": "Sometimes"}},
        {"pools": {"Chat": {}}},
        {"pools": {"x" * 23: {}}},
        {"pools": {"": {}}},
        {"pools": []},
        {"pools": {"chat": {"role": "chef"}}},
        {"pools": {"chat": {"model": {"name": "chat"}}}},
        {"pools": {"chat": {"model": "chat"}}},
        {"pools": {"chat": {"engine": "chef"}}},
        {"pools": {"chat": {"replicas": -1}}},
        {"pools": {"chat": {"disaggregated": {"enabled": True}}}},
        {"pools": {"chat": {"podDisruptionBudget": {"minAvailable": 1}}}},
        {"aliases": {"": "demo"}},
        {"aliases": {"latest": ""}},
        {"aliases": ["latest"]},
        {"tls": {"enabled": True}},
        {"tls": {"peerName": ""}},
        {"tls": {"existingSecret": "papers", "metrics": "plain"}},
    ],
    ids=str,
)
def test_the_schema_refuses_wrong_values(values: dict[str, Any]) -> None:
    with pytest.raises(HelmError):
        Chart.load(CHART).validate_schema(values)


def test_redis_url_is_needed_without_redis() -> None:
    with pytest.raises(HelmError, match=r"redis\.url is needed"):
        Chart.load(CHART).render({"redis": {"enabled": False}}, name="rel")


@pytest.mark.parametrize("case", MATRIX)
def test_selectors_ports_and_targets_agree(case: str) -> None:
    known = workloads(case)
    for workload in known.values():
        labels = pod(workload)["metadata"]["labels"]
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()
    pods = [(pod(w)["metadata"]["labels"], container(w)["ports"]) for w in known.values()]
    for service in of_kind(case, "Service").values():
        matching = [ports for labels, ports in pods if service["spec"]["selector"].items() <= labels.items()]
        # Several workloads may stand behind one service if they are the same to its clients.
        assert matching
        assert all(ports == matching[0] for ports in matching)
        offered = {port["name"]: port["containerPort"] for port in matching[0]}
        for port in service["spec"]["ports"]:
            assert offered[port["targetPort"]] == port["port"]
    for budget in of_kind(case, "PodDisruptionBudget").values():
        assert any(budget["spec"]["selector"]["matchLabels"].items() <= labels.items() for labels, _ in pods)
    for scaler in of_kind(case, "HorizontalPodAutoscaler").values():
        assert scaler["spec"]["scaleTargetRef"]["name"] in known
    for policy in of_kind(case, "NetworkPolicy").values():
        selected = policy["spec"]["podSelector"]["matchLabels"]
        ports = next(ports for labels, ports in pods if selected.items() <= labels.items())
        allowed = {p["port"] for rule in policy["spec"]["ingress"] for p in rule["ports"]}
        assert allowed == {port["containerPort"] for port in ports}
        for rule in policy["spec"]["ingress"]:
            for source in rule.get("from", ()):
                wanted = source.get("podSelector", {}).get("matchLabels", {})
                assert any(wanted.items() <= labels.items() for labels, _ in pods)


@pytest.mark.parametrize("case", MATRIX)
def test_only_the_public_api_is_open_to_everybody(case: str) -> None:
    policies = of_kind(case, "NetworkPolicy")
    open_ports = {
        port["port"]
        for policy in policies.values()
        for rule in policy["spec"]["ingress"]
        if not rule.get("from")
        for port in rule["ports"]
    }
    assert open_ports == ({50051, 8000} if policies else set())
    assert not policies or policies.keys() == workloads_by_component(case)
    for service in of_kind(case, "Service").values():
        if service["spec"].get("type", "ClusterIP") != "ClusterIP":
            assert [port["port"] for port in service["spec"]["ports"]] == [50051, 8000]


def workloads_by_component(case: str) -> set[str]:
    return {f"rel-bucketserve-{component_of(workload)}" for workload in workloads(case).values()}


@pytest.mark.parametrize("case", MATRIX)
def test_our_pods_are_safe_and_probed_where_they_listen(case: str) -> None:
    for name, workload in workloads(case).items():
        spec = pod(workload)["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert container(workload)["securityContext"]["readOnlyRootFilesystem"] is True
        component = name.removeprefix("rel-bucketserve-")
        if component not in SECTIONS:
            continue
        env = environment(workload)
        port = int(env[f"BUCKETSERVE_{component.upper()}_LISTEN"].rpartition(":")[2])
        for probe in ("readinessProbe", "startupProbe"):
            probed = container(workload)[probe]
            if "tls" in MATRIX[case]:
                # The kubelet's own speaks no TLS.
                assert probed["exec"]["command"] == ["python", "-m", "bucketserve.probe", f"127.0.0.1:{port}"]
            else:
                assert probed["grpc"]["port"] == port
        # A scheduler has nothing to drain: what waits is in Redis.
        drain_s = 0.0 if component == "scheduler" else float(env[f"BUCKETSERVE_{component.upper()}_DRAIN_S"])
        drain_s += float(env.get(f"BUCKETSERVE_{component.upper()}_LAME_DUCK_S", 0))
        assert spec["terminationGracePeriodSeconds"] > drain_s + 5


def service_links(case: str, release: str, address: str) -> dict[str, str]:
    """What a kubelet would tell pods about every service of the release that has an address (the documented forms)."""
    links = {}
    for name, service in of_kind(case, "Service", release).items():
        if service["spec"].get("clusterIP") == "None":
            continue
        known = name.upper().replace("-", "_")
        ports = service["spec"]["ports"]
        links[f"{known}_SERVICE_HOST"] = address
        links[f"{known}_SERVICE_PORT"] = str(ports[0]["port"])
        at = f"[{address}]" if ":" in address else address
        links[f"{known}_PORT"] = f"tcp://{at}:{ports[0]['port']}"
        for port in ports:
            links[f"{known}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = str(port["port"])
            prefix = f"{known}_PORT_{port['port']}_TCP"
            links |= {
                prefix: f"tcp://{at}:{port['port']}",
                f"{prefix}_PROTO": "tcp",
                f"{prefix}_PORT": str(port["port"]),
                f"{prefix}_ADDR": address,
            }
    return links


@pytest.mark.parametrize("pod_ip", ["10.244.1.7", "fd00:10:244::7"])
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("case", MATRIX)
def test_every_pod_s_environment_starts_its_service(case: str, release: str, pod_ip: str) -> None:
    links = service_links(case, release, pod_ip)
    assert links
    found = set()
    for workload in workloads(case, release).values():
        # Another's chart may switch them on again, or an older kubelet ignore it: settings bear them too.
        assert pod(workload)["spec"]["enableServiceLinks"] is False
        component = component_of(workload)
        if component not in SECTIONS:
            continue
        found.add(component)
        names = [item["name"] for item in container(workload)["env"]]
        assert len(names) == len(set(names))
        environ = links | {
            name: value.replace("<field>", "pod-1").replace("$(POD_IP)", pod_ip)
            for name, value in environment(workload).items()
        }
        loaded = load_settings({name: SECTIONS[name] for name in (component, "tls", "telemetry")}, environ=environ)
        settings = loaded.sections[component]
        for field in ("listen", "http_listen", "delivery_listen", "metrics_listen"):
            if hasattr(settings, field):
                assert Address.parse(getattr(settings, field)).is_wildcard
        for field in ("address", "delivery_address"):
            if hasattr(settings, field):
                assert Address.parse(getattr(settings, field)).host == pod_ip
        if component == "gateway":
            model = {"name": "demo", "source": "/models/demo"} | MATRIX[case].get("model", {})
            of_pools = [pool.get("model", model) for pool in MATRIX[case].get("pools", {"": {}}).values()]
            assert settings.models == {each["name"]: each["source"] for each in of_pools}
            assert settings.aliases == MATRIX[case].get("aliases", {})
            ModelNames(settings.models, settings.aliases)
    assert found == {"gateway", "scheduler", "worker"}


def test_extra_variables_win_over_the_chart_s_own() -> None:
    env = environment(workloads("everything on")["rel-bucketserve-worker"])
    assert (env["BUCKETSERVE_WORKER_NUM_THREADS"], env["BUCKETSERVE_WORKER_MAX_STEP_TOKENS"]) == ("3", "512")


def test_compose_and_chart_run_the_same_images_with_the_same_ports() -> None:
    charted = workloads("defaults")
    services = compose()
    for component in ("gateway", "scheduler", "worker"):
        in_chart = charted[f"rel-bucketserve-{component}"]
        in_compose = services["worker-a" if component == "worker" else component]
        image = in_compose["image"].replace("${BUCKETSERVE_TAG:-0.1.0}", "0.1.0")
        assert container(in_chart)["image"] == image
        here, there = environment(in_chart), in_compose["environment"]
        for name in set(here) & set(there):
            if name.endswith("LISTEN"):
                assert here[name] == there[name]
            if name.endswith("ADDRESS") and "SCHEDULER" not in name:
                assert here[name].rpartition(":")[2] == there[name].rpartition(":")[2]
    assert container(charted["rel-bucketserve-redis"])["image"] == services["redis"]["image"]


def test_version_is_the_distribution_s() -> None:
    import bucketserve

    assert Chart.load(CHART).metadata["appVersion"] == bucketserve.__version__
    assert f"BUCKETSERVE_TAG={bucketserve.__version__}" in (ROOT / ".env").read_text()


def test_gateways_and_workers_know_every_scheduler() -> None:
    charted = workloads("defaults")
    scheduler = charted["rel-bucketserve-scheduler"]
    assert (scheduler["kind"], scheduler["spec"]["replicas"]) == ("StatefulSet", 2)
    service = of_kind("defaults", "Service")[scheduler["spec"]["serviceName"]]["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    name = scheduler["metadata"]["name"]
    wanted = ",".join(f"{name}-{i}.{name}:50052" for i in range(2))
    for component in ("gateway", "worker"):
        values = environment(charted[f"rel-bucketserve-{component}"])
        assert values[f"BUCKETSERVE_{component.upper()}_SCHEDULER_ADDRESS"] == wanted


def test_papers_and_keys_are_secrets_by_reference_which_those_who_need_them_mount() -> None:
    for workload in workloads("locked").values():
        component = component_of(workload)
        if component not in SECTIONS:
            continue
        secrets = {v["name"]: v["secret"]["secretName"] for v in pod(workload)["spec"]["volumes"] if "secret" in v}
        of_gateway = {"client-ca": "clients", "keys": "keys"} if component == "gateway" else {}
        assert secrets == {"tls": "papers", **of_gateway}
        folders = {m["mountPath"]: m for m in container(workload)["volumeMounts"] if m["name"] in secrets}
        # A single file (subPath) would stay as it was when the secret changes.
        assert all(mount["readOnly"] and "subPath" not in mount for mount in folders.values())
        tls = load_settings({"tls": TlsSettings}, environ=environment(workload)).sections["tls"]
        assert (tls.peer_name, tls.metrics) == ("bucketserve", "mutual")
        files = {str(getattr(tls, f"{kind}_file")) for kind in ("ca", "cert", "key", "client_ca")} - {""}
        if component == "gateway":
            files.add(environment(workload)["BUCKETSERVE_GATEWAY_KEYS_FILE"])
        assert {str(Path(file).parent) for file in files} == folders.keys()
    assert "tls" not in str(workloads("defaults"))
    with pytest.raises(HelmError, match=r"tls\.clientCaSecret and tls\.metrics need"):
        Chart.load(CHART).render({"tls": {"clientCaSecret": "x"}}, name="rel")


def test_prometheus_is_told_how_metrics_are_served() -> None:
    def endpoint(tls: dict[str, str]) -> dict[str, Any]:
        files = Chart.load(CHART).render({"tls": tls, "serviceMonitor": {"enabled": True}}, name="rel")
        (text,) = [text for path, text in files.items() if path.endswith("/servicemonitor.yaml")]
        (found,) = yaml.safe_load(text)["spec"]["endpoints"]
        return found

    plain = {"port": "metrics", "interval": "15s"}
    assert endpoint({}) == endpoint({"existingSecret": "papers"}) == plain
    ca, cert, key = ({"name": "papers", "key": name} for name in ("ca.crt", "tls.crt", "tls.key"))
    tls = {"serverName": "bucketserve", "ca": {"secret": ca}}
    assert endpoint({"existingSecret": "papers", "metrics": "tls"}) == {**plain, "scheme": "https", "tlsConfig": tls}
    mutual = endpoint({"existingSecret": "papers", "metrics": "mutual"})
    assert mutual["tlsConfig"] == {**tls, "cert": {"secret": cert}, "keySecret": key}
