from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, Field

from bucketserve.config import NamedTexts, OptionalListen, Section, TelemetrySettings, load_settings
from bucketserve.core.errors import SettingsError
from bucketserve.store.url import check_store_url
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_scheduler.settings import SchedulerSettings
from bucketserve_worker.settings import WorkerSettings

SERVICES = {"gateway": GatewaySettings, "scheduler": SchedulerSettings, "worker": WorkerSettings}


class Part(Section):
    port: int = Field(1, ge=1)
    is_on: bool = True
    share: float = 0.5
    metrics_listen: OptionalListen = "127.0.0.1:9101"
    models: NamedTexts = Field(default_factory=dict)
    url: Annotated[str, AfterValidator(check_store_url)] = Field("redis://host", repr=False)


def load(environ=None, **more):
    return load_settings({"part": Part, "telemetry": TelemetrySettings}, environ=environ or {}, **more)


def part(environ=None, **more) -> Part:
    return load(environ, **more).sections["part"]


def problems(environ=None, **more) -> str:
    with pytest.raises(SettingsError) as caught:
        load(environ, **more)
    return "\n".join(caught.value.problems)


def test_precedence_is_flag_environment_file_default(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[part]\nport = 2\nurl = 'redis://file'\n[worker]\nunread = 1\n")
    loaded = load({"BUCKETSERVE_PART_PORT": "3"}, file=file)
    assert (loaded.sections["part"].port, loaded.sections["part"].url) == (3, "redis://file")
    loaded = load({"BUCKETSERVE_PART_PORT": "3"}, file=file, overrides={"part": {"port": 4, "url": None}})
    assert loaded.sections["part"].port == 4
    assert dict(loaded.sources) == {("part", "port"): "flag", ("part", "url"): "file"}


def test_every_problem_is_reported_at_once() -> None:
    said = problems(
        {"BUCKETSERVE_PART_PORT": "0", "BUCKETSERVE_PART_PROT": "3", "BUCKETSERVE_TELEMETRY_LOG_LEVEL": "x"}
    )
    assert len(said.splitlines()) == 3
    assert "BUCKETSERVE_PART_PORT" in said
    assert "BUCKETSERVE_PART_PROT: no such setting (from environment); port may be meant" in said
    assert "BUCKETSERVE_TELEMETRY_LOG_LEVEL" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[part", "not TOML"),
        (b"[part]\nport = 1\nport = 2", "not TOML"),
        (b"[part]\nurl = 'redis://\xff'", "not UTF-8"),
        (b"[prat]\nport = 1", r"[prat]: no such section"),
        (b"part = 1", r"a section is a table, [part]"),
        (b"[part]\nPort = 2", "[part] Port: no such setting (from file); port may be meant"),
        (b"[part]\nport = true", "a number is needed"),
        (b"[part]\nshare = nan", "finite number"),
        (b"[part]\nport = '4MiB'", "valid integer"),
    ],
)
def test_a_broken_file_says_what_is_wrong(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_bytes(content)
    assert said in problems(file=file)


def test_a_missing_file_and_a_folder_say_so(tmp_path: Path) -> None:
    assert "does not exist" in problems({"BUCKETSERVE_CONFIG": str(tmp_path / "none.toml")})
    assert "can't be read" in problems(file=tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_bytes(b"\xef\xbb\xbf[part]\nport = 7")
    assert part(file=file).port == 7


def test_an_empty_value_is_a_value() -> None:
    assert part({"BUCKETSERVE_PART_METRICS_LISTEN": ""}).metrics_listen == ""
    assert part({"BUCKETSERVE_PART_METRICS_LISTEN": " \n"}).metrics_listen == ""
    assert "BUCKETSERVE_PART_PORT" in problems({"BUCKETSERVE_PART_PORT": ""})


@pytest.mark.parametrize("name", SERVICES)
def test_empty_turns_the_metrics_of_a_service_off(name: str) -> None:
    loaded = load_settings({name: SERVICES[name]}, environ={f"BUCKETSERVE_{name.upper()}_METRICS_LISTEN": ""})
    assert loaded.sections[name].metrics_listen == ""


def test_space_around_a_value_of_the_environment_is_no_part_of_it() -> None:
    environ = {"PORT": " 7\n", "IS_ON": " false ", "URL": "redis://host:1\n", "SHARE": " 0.25"}
    read = part({f"BUCKETSERVE_PART_{name}": value for name, value in environ.items()})
    assert (read.port, read.is_on, read.url, read.share) == (7, False, "redis://host:1", 0.25)


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "on"])
def test_truth_values(text: str) -> None:
    assert part({"BUCKETSERVE_PART_IS_ON": text}).is_on is True


@pytest.mark.parametrize("variable", ["BUCKETSERVE_PART_Port", "BUCKETSERVE_PART_port", "BUCKETSERVE_part_PORT"])
def test_settings_are_in_capitals(variable: str) -> None:
    assert f"{variable}: write settings in capitals, BUCKETSERVE_PART_PORT" in problems({variable: "3"})


@pytest.mark.parametrize("name", ["GATEWY_LISTEN", "WORKERS_NUM_THREADS", "SHEDULER_POLICY", "TELEMTRY_LOG_LEVEL"])
def test_a_mistyped_section_is_refused(name: str) -> None:
    assert f"BUCKETSERVE_{name}: no such section" in problems({f"BUCKETSERVE_{name}": "1"})


@pytest.mark.parametrize("name", ["CACHE", "TAG", "PORT", "VERSION", "REDIS_PASSWORD"])
def test_other_variables_of_the_project_are_left_alone(name: str) -> None:
    load({f"BUCKETSERVE_{name}": "1"})


@pytest.mark.parametrize(
    ("text", "models"),
    [
        ("", {}),
        ("a=/x", {"a": "/x"}),
        (" a = /x , b=/y ", {"a": "/x", "b": "/y"}),
        ("a=/x/with,comma", {"a": "/x/with,comma"}),
        ("a=/x,1/y,b=/z", {"a": "/x,1/y", "b": "/z"}),
        ("a=/data/run=5/model", {"a": "/data/run=5/model"}),
        ("a=org/model", {"a": "org/model"}),
        ("käse=/modelle/käse", {"käse": "/modelle/käse"}),
        ('{"a=b": "/x,y=z", "c": "/d"}', {"a=b": "/x,y=z", "c": "/d"}),
    ],
)
def test_models_as_text(text: str, models: dict[str, str]) -> None:
    assert part({"BUCKETSERVE_PART_MODELS": text}).models == models


@pytest.mark.parametrize(
    "text", ["a", "=/x", "a=", "a=/x,a=/y", "{", '{"a": 1}', '{"a": "/x", "a": "/y"}', "{}x", '{"": "/x"}']
)
def test_what_names_no_models(text: str) -> None:
    assert "BUCKETSERVE_PART_MODELS" in problems({"BUCKETSERVE_PART_MODELS": text})


@pytest.mark.parametrize("table", ['{ "" = "/x" }', '{ a = "" }', "{ a = 1 }", "[]"])
def test_what_names_no_models_in_a_file(table: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(f"[part]\nmodels = {table}\n")
    assert "[part] models" in problems({"BUCKETSERVE_CONFIG": str(file)})


@given(st.dictionaries(st.text(min_size=1), st.text(min_size=1)))
def test_any_names_and_paths_can_be_said_in_the_environment(models: dict[str, str]) -> None:
    assert part({"BUCKETSERVE_PART_MODELS": json.dumps(models)}).models == models


def text_of(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "port": st.integers(1, 2**40),
        "is_on": st.booleans(),
        "share": st.floats(allow_nan=False, allow_infinity=False),
        "metrics_listen": st.sampled_from(["", "[::1]:5", "host:0"]),
        "url": st.sampled_from(["redis://u:p%2F@[::1]:1/2", "sentinel://a,[::1]:7/m", "unix:///s"]),
    },
)


@given(VALUES)
def test_a_value_means_the_same_from_everywhere(values: dict[str, object]) -> None:
    by_environment = part({f"BUCKETSERVE_PART_{name.upper()}": text_of(value) for name, value in values.items()})
    assert by_environment == part(overrides={"part": values}) == Part(**values)


LINKS = {
    # kubelet, for any service with a cluster IP
    "{0}_SERVICE_HOST": "10.96.0.7",
    "{0}_SERVICE_PORT": "50051",
    "{0}_SERVICE_PORT_GRPC": "50051",
    "{0}_SERVICE_PORT_METRICS_2": "9101",
    "{0}_PORT": "tcp://10.96.0.7:50051",
    "{0}_PORT_50051_TCP": "tcp://10.96.0.7:50051",
    "{0}_PORT_50051_TCP_PROTO": "tcp",
    "{0}_PORT_50051_TCP_PORT": "50051",
    "{0}_PORT_50051_TCP_ADDR": "10.96.0.7",
    "{0}_PORT_53_UDP": "udp://10.96.0.7:53",
    "{0}_PORT_53_UDP_ADDR": "10.96.0.7",
    # docker run --link
    "{0}_NAME": "/worker/gateway",
    "{0}_ENV_PYTHONUNBUFFERED": "1",
    "{0}_ENV_BUCKETSERVE_GATEWAY_LISTEN": "0.0.0.0:50051",
    "{0}_PORT_8000_TCP_START": "tcp://172.17.0.2:8000",
    "{0}_PORT_8000_TCP_PORT_START": "8000",
    "{0}_PORT_8000_TCP_END": "tcp://172.17.0.2:8002",
    "{0}_PORT_8000_TCP_PORT_END": "8002",
}


@pytest.mark.parametrize("address", ["10.96.0.7", "fd00::7"])
@pytest.mark.parametrize(
    "service", ["GATEWAY", "GATEWAY_HEADLESS", "WORKER", "SCHEDULER", "GATEWAYS", "WORKER_2", "REDIS"]
)
def test_what_is_said_about_services_is_no_setting(service: str, address: str) -> None:
    in_url = f"[{address}]" if ":" in address else address
    environ = {
        name.format(f"BUCKETSERVE_{service}"): value.replace("10.96.0.7", in_url if "://" in value else address)
        for name, value in LINKS.items()
    }
    loaded = load_settings(SERVICES, environ=environ)
    assert loaded.sources == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GATEWAY_PORT", "50051"),
        ("GATEWAY_METRICS_PORT", "9101"),
        ("GATEWAY_PORT", "http://10.0.0.1:50051"),
        ("GATEWAY_PORT_50051_TCP", "50051"),
        ("GATEWAY_SERVICE_HOST", "name"),
        ("GATEWAY_SERVICE_PORT", "http"),
        ("GATEWAY_NAME", "demo"),
        ("GATEWAY_ENV_X", "1"),
        ("GATEWAY_HOST", "10.0.0.1"),
        ("WORKER_NUM_THREAD", "1"),
    ],
)
def test_a_mistyped_setting_is_still_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match="no such setting"):
        load_settings(SERVICES, environ={f"BUCKETSERVE_{name}": value})


def test_passwords_are_masked() -> None:
    loaded = load({"BUCKETSERVE_PART_URL": "redis://me:secret@host:1"})
    shown = {field: value for section, field, value, _ in loaded.describe() if section == "part"}
    assert shown["url"] == "redis://me:***@host:1"


@pytest.mark.parametrize("service", ["gateway", "scheduler"])
@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter2@host:1",
        "me:hunter2@host:1",
        "redis://me:hun/ter2@host",
        "redis://:hunter2",
        "redis://me:hunter2@host:port",
        "redis://me:hunter2@host/zero",
        "sentinel://me:hunter2@host:1",
        "sentinel://me:hunter2@:1/master",
        "sentinel://host:1/master?password=hunter2",
        "sentinel://host:1/master?sentinel_password=hunter2&more",
        "unix://me:hunter2@path",
    ],
)
def test_a_wrong_url_of_the_store_is_refused_without_its_password(service: str, url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({service: SERVICES[service]}, environ={f"BUCKETSERVE_{service.upper()}_REDIS_URL": url})
    assert f"BUCKETSERVE_{service.upper()}_REDIS_URL" in str(caught.value)
    assert "ter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["jaeger:4317", "grpc://jaeger:4317", "http://jaeger", "http://u:hunter2@jaeger/x", "https://[::1]"]
)
def test_an_endpoint_for_traces_is_http(url: str) -> None:
    said = problems({"BUCKETSERVE_TELEMETRY_OTLP_ENDPOINT": url})
    assert "write http://host:port" in said
    assert "hunter2" not in said


def test_who_listens_everywhere_must_say_where_it_is() -> None:
    def gateway(**values: str) -> GatewaySettings:
        return GatewaySettings(**values)

    for listen in ("0.0.0.0:1", "[::]:1"):
        with pytest.raises(ValueError, match="needed where delivery_listen is every address"):
            gateway(delivery_listen=listen)
        assert gateway(delivery_listen=listen, delivery_address="[fd00::1]:1").delivery_address == "[fd00::1]:1"
        with pytest.raises(ValueError, match="where one may listen"):
            gateway(delivery_listen=listen, delivery_address=listen)
        with pytest.raises(ValueError, match="prefill needs address"):
            WorkerSettings(role="prefill", listen=listen)
        assert WorkerSettings(listen=listen).listen == listen
    assert gateway().delivery_address == ""
