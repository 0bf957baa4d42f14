"""The Helm chart: roles, engines and pools of several models."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from helm_python.chart import Chart
from helm_python.errors import HelmError

from bucketserve.config import TelemetrySettings, load_settings
from bucketserve_worker.settings import WorkerSettings
from tests.deploy.test_chart import (
    CHART,
    MATRIX,
    component_of,
    container,
    environment,
    of_kind,
    pod,
    workloads,
)


def test_prefill_and_decode_have_workloads_of_their_own_that_select_only_their_pods() -> None:
    found = workloads("prefill and decode apart")
    workers = {name: workload for name, workload in found.items() if "-worker" in name}
    roles = {environment(workload)["BUCKETSERVE_WORKER_ROLE"]: workload for workload in workers.values()}
    assert {role: workload["spec"]["replicas"] for role, workload in roles.items()} == {"prefill": 2, "decode": 3}
    selectors = [workload["spec"]["selector"]["matchLabels"] for workload in roles.values()]
    assert selectors[0] != selectors[1]
    for role, workload in roles.items():
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert labels["bucketserve.dev/role"] == role
    both = [workload for name, workload in workloads("defaults").items() if "-worker" in name]
    assert [environment(workload)["BUCKETSERVE_WORKER_ROLE"] for workload in both] == ["both"]


def test_vllm_has_its_image_its_arguments_and_what_gpus_need() -> None:
    (workload,) = (w for w in workloads("vllm").values() if component_of(w) == "worker")
    spec = pod(workload)["spec"]
    assert container(workload)["image"] == "bucketserve-worker-vllm:0.1.0"
    assert (workload["spec"]["strategy"], spec["runtimeClassName"]) == ({"type": "Recreate"}, "nvidia")
    assert container(workload)["resources"]["limits"]["nvidia.com/gpu"] == 2
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in container(workload)["volumeMounts"]
    settings = load_settings({"worker": WorkerSettings, "telemetry": TelemetrySettings}, environ=settings_of(workload))
    worker = settings.sections["worker"]
    assert (worker.engine, worker.role) == ("vllm", "both")
    assert worker.engine_args == MATRIX["vllm"]["worker"]["engineArgs"]
    (other,) = (w for w in workloads("defaults").values() if component_of(w) == "worker")
    assert container(other)["image"] == "bucketserve-worker:0.1.0"
    assert not {"strategy", "runtimeClassName"} & {*other["spec"], *pod(other)["spec"]}
    assert [volume["name"] for volume in pod(other)["spec"]["volumes"]] == ["tmp"]


def test_pools_have_workloads_and_budgets_of_their_own() -> None:
    found = {
        name.rpartition("-worker-")[2]: each for name, each in workloads("two models").items() if "-worker" in name
    }
    assert found.keys() == {"chat", "small-1", "small-2"}
    assert {name: each["spec"]["replicas"] for name, each in found.items()} == {"chat": 3, "small-1": 0, "small-2": 2}
    images = {name: container(each)["image"] for name, each in found.items()}
    assert images == {
        "chat": "bucketserve-worker-vllm:0.1.0",
        "small-1": "bucketserve-worker:0.1.0",
        "small-2": "bucketserve-worker:0.1.0",
    }
    loaded = {
        name: load_settings({"worker": WorkerSettings}, environ=settings_of(each)) for name, each in found.items()
    }
    workers = {name: each.sections["worker"] for name, each in loaded.items()}
    kinds = {name: (w.model_name, w.model, w.role, w.engine, w.device, w.quantization) for name, w in workers.items()}
    assert kinds == {
        "chat": ("a=b, c", "/models/a,b=c", "both", "vllm", "cuda", "none"),
        "small-1": ("demo", "/models/demo", "prefill", "transformers", "auto", "none"),
        "small-2": ("demo", "/models/demo", "decode", "transformers", "auto", "int8"),
    }
    # What a pool names is its own as a whole; what it does not name is as worker says.
    assert {name: w.hang_s for name, w in workers.items()} == {"chat": 60, "small-1": 60, "small-2": 30}
    assert container(found["chat"])["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    assert container(found["small-1"])["resources"]["requests"]["cpu"] == "2"
    spec = pod(found["chat"])["spec"]
    assert (spec["nodeSelector"], spec["tolerations"][0]["key"], spec["runtimeClassName"]) == (
        {"gpu": "yes"}, "gpu", "nvidia",
    )  # fmt: skip
    assert "nodeSelector" not in pod(found["small-1"])["spec"]
    for name, each in found.items():
        labels = pod(each)["metadata"]["labels"]
        selector = each["spec"]["selector"]["matchLabels"]
        assert selector.items() <= labels.items()
        # A role may change; a selector can't.
        assert "bucketserve.dev/role" not in selector
        assert selector["bucketserve.dev/pool"] == name
    budgets = of_kind("two models", "PodDisruptionBudget")
    of_pools = {name: each["spec"] for name, each in budgets.items() if "-worker" in name}
    assert of_pools.keys() == {"rel-bucketserve-worker-small-1", "rel-bucketserve-worker-small-2"}
    for name, each in of_pools.items():
        assert each["selector"]["matchLabels"]["bucketserve.dev/pool"] == name.rpartition("-worker-")[2]
    # A budget of the only pool is of all workers, as it was before there were pools.
    (one,) = (each for name, each in of_kind("defaults", "PodDisruptionBudget").items() if "-worker" in name)
    assert one["spec"]["selector"]["matchLabels"].keys() == {
        "app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component",
    }  # fmt: skip


def test_a_worker_has_as_long_to_load_as_its_pool_says() -> None:
    def seconds(case: str) -> dict[str, int]:
        probes = {name: container(each)["startupProbe"] for name, each in workloads(case).items() if "-worker" in name}
        return {
            name.rpartition("-worker")[2]: probe["periodSeconds"] * probe["failureThreshold"]
            for name, probe in probes.items()
        }

    assert seconds("defaults") == {"": 900}
    # No less than was said.
    assert seconds("two models") == {"-chat": 7210, "-small-1": 900, "-small-2": 900}
    # Checked by a command, with TLS.
    assert seconds("locked") == {"": 900}


MODEL_A = {"model": {"name": "a", "source": "/models/a"}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"pools": {"x": MODEL_A, "y": {"model": {"name": "a", "source": "/b"}}}}, "pools of model a have two sources"),
        (
            {"pools": {"x": {**MODEL_A, "role": "prefill"}, "y": {"role": "both"}}},
            "model a: prefill pools need a decode",
        ),
        ({"pools": {"x": {"role": "decode"}}}, "model demo: prefill pools need a decode pool"),
        (
            {"pools": {"x": {"engine": "vllm", "role": "prefill"}, "y": {}}},
            "pools.x: engine vllm hands KV over by a connector only",
        ),
        ({"pools": {"x": {"engineArgs": {"a": "b"}}}}, "pools.x.engineArgs are vLLM's"),
        ({"pools": {"x": {}}, "worker": {"disaggregated": {"enabled": True}}}, "beside pools: say the role of each"),
        ({"aliases": {"demo": "demo"}}, "aliases: demo is a model's own name"),
        ({"aliases": {"a": "b", "b": "demo"}}, "aliases: a is for b, which is no model"),
        ({"pools": {"x": MODEL_A}, "aliases": {"new": "demo"}}, "aliases: new is for demo, which is no model"),
    ],
)
def test_pools_and_aliases_that_are_no_whole_are_refused(values: dict[str, Any], said: str) -> None:
    Chart.load(CHART).validate_schema(values)
    with pytest.raises(HelmError, match=said):
        Chart.load(CHART).render(values, name="rel")


def settings_of(workload: dict[str, Any]) -> dict[str, str]:
    return {name: value.replace("$(POD_IP)", "10.0.0.1") for name, value in environment(workload).items()}


@pytest.mark.parametrize(
    ("worker", "said"),
    [
        ({"engine": "vllm", "disaggregated": {"enabled": True}}, "set engineArgs.kv_transfer_config"),
        ({"engineArgs": {"block_size": "32"}}, "set worker.engine to vllm"),
    ],
)
def test_what_vllm_can_not_do_is_refused(worker: dict[str, Any], said: str) -> None:
    with pytest.raises(HelmError, match=said):
        Chart.load(CHART).render({"worker": worker}, name="rel")


def test_connectors_of_vllm_reach_each_other() -> None:
    transfer = {"engineArgs": {"kv_transfer_config": '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'}}
    apart = {"engine": "vllm", "disaggregated": {"enabled": True}}
    pools = {role: {"role": role, "engine": "vllm", **transfer} for role in ("prefill", "decode")}
    for values in ({"worker": {**apart, **transfer}}, {"pools": pools}, {}):
        files = Chart.load(CHART).render({**values, "networkPolicy": {"enabled": True}}, name="rel")
        documents = [d for p, t in files.items() if p.endswith(".yaml") for d in yaml.safe_load_all(t) if d]
        (policy,) = (d for d in documents if d["kind"] == "NetworkPolicy" and d["metadata"]["name"].endswith("worker"))
        to_workers, metrics = policy["spec"]["ingress"]
        assert metrics["ports"] == [{"protocol": "TCP", "port": 9103}]
        workers = [d for d in documents if d["kind"] == "Deployment" and component_of(d) == "worker"]
        hosts = {settings_of(each).get("VLLM_NIXL_SIDE_CHANNEL_HOST") for each in workers}
        if values:
            # They choose some of their ports as they run.
            assert "ports" not in to_workers
            assert hosts == {"10.0.0.1"}
        else:
            assert to_workers["ports"] == [{"protocol": "TCP", "port": 50054}]
            assert hosts == {None}
        (source,) = to_workers["from"]
        assert source["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "worker"
