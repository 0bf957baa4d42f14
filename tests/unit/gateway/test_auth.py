"""Keys: what the file may hold, whom they stand for, what they open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection_pb2

from bucketserve.core.errors import ForbiddenError, SettingsError, UnauthenticatedError
from bucketserve.v1 import common_pb2, inference_pb2, job_pb2
from bucketserve_gateway.auth import Identity, Keys
from bucketserve_gateway.keys import hash_of, new_key
from bucketserve_gateway.names import ModelNames

KEY = "bs-" + "a1B2" * 10
GOOD = f'[[keys]]\nname = "a"\nsha256 = "{hash_of(KEY)}"\ntenant = "acme"\n'
Generate = inference_pb2.GenerateRequest
NAMES = ModelNames(["demo"], {"latest": "demo", "newest": "demo"})


def keys(folder: Path, content: str, **more) -> Keys:
    path = folder / "keys.toml"
    path.write_text(content, encoding="utf-8")
    return Keys(str(path), **more)


def identity(folder: Path, content: str = "", **more) -> Identity:
    return keys(folder, GOOD + content, **more).identify({"authorization": f"Bearer {KEY}"})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", r"one or more tables \[\[keys\]\]"),
        ("keys = []", r"one or more tables \[\[keys\]\]"),
        ("[keys]\na = 1", r"write \[\[keys\]\], not \[keys\]"),
        (GOOD + "[more]\n", r"one or more tables \[\[keys\]\]"),
        ("[[keys", "is not TOML"),
        ("[[keys]]\n", r"keys\[0\].name: Field required"),
        (GOOD.replace(hash_of(KEY), KEY), r"keys\[0\].sha256: String should match"),
        (GOOD.replace("acme", ""), r"keys\[0\].tenant: String should have at least 1"),
        (GOOD.replace("acme", "x" * 65), r"keys\[0\].tenant: String should have at most 64"),
        (GOOD.replace('"acme"', "1"), r"keys\[0\].tenant: Input should be a valid string"),
        (GOOD + "models = []\n", r"keys\[0\].models: name at least one"),
        (GOOD + 'models = "demo"\n', r"keys\[0\].models: Input should be a valid tuple"),
        (GOOD + 'classes = ["interactive", "urgent"]\n', r"keys\[0\].classes.1: Input should be 'interactive' or"),
        (GOOD + 'scopes = ["generate", "generate"]\n', r"keys\[0\].scopes: name at least one, and each once"),
        (GOOD + 'scope = ["jobs"]\n', r"keys\[0\].scope: Extra inputs are not permitted"),
        (GOOD + GOOD, "name 'a' is there twice"),
        (GOOD + GOOD.replace('"a"', '"b"'), "sha256 '[0-9a-f]+' is there twice"),
    ],
)
def test_what_is_wrong_with_the_file_is_said_with_its_place(content: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=problem) as caught:
        keys(tmp_path, content)
    assert str(tmp_path / "keys.toml") in str(caught.value)
    # Somebody may have put the key itself where its hash belongs.
    assert KEY not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        Keys(str(tmp_path / "none"))
    (tmp_path / "odd").write_bytes(b"\xff\xfe\0")
    with pytest.raises(SettingsError, match="is not TOML"):
        Keys(str(tmp_path / "odd"))


@pytest.mark.parametrize(
    "header",
    [
        None, "", "Bearer", "Bearer ", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}",
        f"Bearer {KEY} {KEY}", f"Bearer {hash_of(KEY)}", "Bearer " + "x" * 100_000, "Bearer \ud800", "Bearer \0",
    ],
)  # fmt: skip
def test_whoever_has_no_key_is_nobody(header: str | None, tmp_path: Path) -> None:
    refused: list[str] = []
    known = keys(tmp_path, GOOD, on_refused=refused.append)
    with pytest.raises(UnauthenticatedError) as caught:
        known.identify({} if header is None else {"authorization": header})
    assert refused == ["UNAUTHENTICATED"]
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_key_stands_for_its_tenant(scheme: str, tmp_path: Path) -> None:
    assert keys(tmp_path, GOOD).identify({"authorization": f"{scheme} {KEY}"}).tenant == "acme"


def test_the_file_is_read_again_when_it_changes_and_kept_in_mind_when_it_is_wrong(tmp_path: Path) -> None:
    problems: list[str] = []
    known = keys(tmp_path, GOOD, on_problem=problems.append)
    header = {"authorization": f"Bearer {KEY}"}
    path, new = tmp_path / "keys.toml", tmp_path / "new"
    for wrong in ("", GOOD + "x"):
        new.write_text(wrong)
        os.replace(new, path)
        assert known.identify(header).tenant == "acme"
        assert known.identify(header).tenant == "acme"
    assert len(problems) == 2
    new.write_text(GOOD.replace("acme", "other"))
    os.replace(new, path)
    assert known.identify(header).tenant == "other"
    path.unlink()
    assert known.identify(header).tenant == "other"
    new.write_text(GOOD.replace(hash_of(KEY), hash_of(new_key())))
    os.replace(new, path)
    with pytest.raises(UnauthenticatedError):
        known.identify(header)


def submit(**named) -> job_pb2.SubmitJobRequest:
    return job_pb2.SubmitJobRequest(**named)


BATCH = common_pb2.REQUEST_CLASS_BATCH
PERMITTED: list[tuple[str, Message]] = [
    ("", Generate(model="any", request_class=BATCH)),
    ("", Generate(tenant="acme")),
    ("", submit(header=job_pb2.JobHeader())),
    ("", job_pb2.GetJobRequest(job_id="x")),
    ("", reflection_pb2.ServerReflectionRequest(list_services="")),
    ('models = ["demo"]', Generate(model="demo")),
    # The one that is served.
    ('models = ["demo"]', Generate()),
    ('models = ["demo"]', submit(request=Generate(model="demo"))),
    # By an alias, in the request, in the key, and in both.
    ('models = ["demo"]', Generate(model="latest")),
    ('models = ["demo"]', submit(request=Generate(model="latest"))),
    ('models = ["demo"]', inference_pb2.TokenizeRequest(model="latest")),
    ('models = ["demo"]', inference_pb2.GetModelRequest(name="latest")),
    ('models = ["latest"]', Generate(model="demo")),
    ('models = ["latest"]', Generate()),
    ('models = ["latest"]', Generate(model="newest")),
    ('models = ["demo"]', inference_pb2.ListModelsRequest()),
    ('classes = ["interactive"]', Generate()),
    ('classes = ["batch"]', Generate(request_class=BATCH)),
    ('classes = ["batch"]', submit(request=Generate())),
    ('scopes = ["generate"]', inference_pb2.TokenizeRequest(prompt="x")),
    ('scopes = ["jobs"]', job_pb2.CancelJobRequest(tenant="acme")),
    ('scopes = ["jobs"]', inference_pb2.GetModelRequest(name="demo")),
    ('scopes = ["generate", "admin"]', Generate(tenant="else")),
    ('scopes = ["jobs", "admin"]', job_pb2.GetJobRequest(tenant="else")),
]
FORBIDDEN: list[tuple[str, Message, str]] = [
    ("", Generate(tenant="else"), "another tenant than 'else'"),
    ("", submit(header=job_pb2.JobHeader(tenant="else")), "another tenant"),
    ("", submit(request=Generate(tenant="else")), "another tenant"),
    ("", job_pb2.GetJobRequest(tenant="else"), "another tenant"),
    ("", job_pb2.FetchJobResultsRequest(tenant="default"), "another tenant"),
    ("", job_pb2.CancelJobRequest(tenant="ACME"), "another tenant"),
    ('models = ["demo"]', Generate(model="big"), "not for model 'big'"),
    ('models = ["big"]', Generate(), "not for model ''"),
    ('models = ["big"]', Generate(model="latest"), "not for model 'latest'"),
    # No name of a model: it stands for none.
    ('models = [""]', Generate(), "not for model ''"),
    ('models = ["demo"]', inference_pb2.TokenizeRequest(model="big"), "not for model"),
    ('models = ["demo"]', inference_pb2.GetModelRequest(name="big"), "not for model"),
    ('models = ["demo"]', submit(request=Generate(model="big")), "not for model"),
    ('classes = ["batch"]', Generate(), "class interactive"),
    ('classes = ["batch"]', Generate(request_class=7), "class interactive"),
    ('classes = ["interactive"]', Generate(request_class=BATCH), "class batch"),
    ('classes = ["interactive"]', submit(request=Generate()), "class batch"),
    ('scopes = ["jobs"]', Generate(), "no scope 'generate'"),
    ('scopes = ["jobs"]', inference_pb2.TokenizeRequest(), "no scope 'generate'"),
    ('scopes = ["generate"]', submit(), "no scope 'jobs'"),
    ('scopes = ["generate"]', job_pb2.GetJobRequest(), "no scope 'jobs'"),
    ('scopes = ["admin"]', Generate(), "no scope 'generate'"),
    ("", common_pb2.SamplingParams(), "no key is for bucketserve.v1.SamplingParams"),
]


@pytest.mark.parametrize(("key", "message"), PERMITTED)
def test_what_a_key_is_for_passes_as_its_tenants(key: str, message: Message, tmp_path: Path) -> None:
    sent = type(message).FromString(message.SerializeToString())
    identity(tmp_path, key, names=NAMES).permit(sent)
    inner = getattr(sent, sent.WhichOneof("message")) if isinstance(sent, job_pb2.SubmitJobRequest) else sent
    named = getattr(message, "tenant", "") or "acme"
    assert getattr(inner, "tenant", "acme") == named


@pytest.mark.parametrize(("key", "message", "why"), FORBIDDEN)
def test_what_a_key_is_not_for_is_refused(key: str, message: Message, why: str, tmp_path: Path) -> None:
    refused: list[str] = []
    who = identity(tmp_path, key, names=NAMES, on_refused=refused.append)
    with pytest.raises(ForbiddenError, match=why):
        who.permit(type(message).FromString(message.SerializeToString()))
    assert refused == ["FORBIDDEN"]


def test_every_message_of_the_public_api_has_a_rule(tmp_path: Path) -> None:
    services = [*inference_pb2.DESCRIPTOR.services_by_name.values(), *job_pb2.DESCRIPTOR.services_by_name.values()]
    assert len(services) == 2
    for method in (method for service in services for method in service.methods):
        identity(tmp_path).permit(method.input_type._concrete_class())


def test_models_that_a_key_is_not_for_are_not_shown(tmp_path: Path) -> None:
    both = inference_pb2.ListModelsResponse(models=[{"name": "demo"}, {"name": "big"}])
    for name in ("demo", "latest"):
        who = identity(tmp_path, f'models = ["{name}"]', names=NAMES)
        assert [model.name for model in who.shown(both).models] == ["demo"]
    assert identity(tmp_path).shown(both) == both


def test_without_a_file_everybody_may_do_everything_and_names_his_tenant() -> None:
    who = Keys("").identify({})
    for tenant in ("", "acme"):
        message = Generate(tenant=tenant, model="any")
        who.permit(message)
        assert message.tenant == tenant
