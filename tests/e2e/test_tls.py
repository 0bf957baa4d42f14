"""A deployment behind locks: every hop is TLS on both sides, every client has a key, and nobody else gets anything."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, date, datetime
from pathlib import Path

import grpc
import httpx
import jwt
import openai
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bucketserve.client import BucketServeClient, Chunk, Finished
from bucketserve.core.errors import (
    BucketServeError,
    ForbiddenError,
    NotFoundError,
    UnauthenticatedError,
)
from bucketserve.facades import kserve_pb2, kserve_pb2_grpc, vllm_pb2, vllm_pb2_grpc
from bucketserve.job_client import JobClient
from bucketserve.rpc.channel import key_metadata, open_channel
from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.probe import check_health
from bucketserve.rpc.tls import Tls
from bucketserve.v1 import (
    common_pb2,
    delivery_pb2,
    delivery_pb2_grpc,
    inference_pb2,
    scheduler_pb2,
    scheduler_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from bucketserve_cli.stack import LocalStack
from bucketserve_gateway.keys import hash_of, new_key
from tests.certificates import Authority, Papers, replace
from tests.chaos.oracle import expected_tokens
from tests.cli import run_command
from tests.e2e.conftest import NewStack
from tests.e2e.observe import events, eventually, metric, status
from tests.e2e.test_cli import as_process
from tests.otlp import OtlpReceiver

pytestmark = pytest.mark.e2e

SECRET = "Rosebud was his sledge, and nobody is to read that in a log"
SLOW = {"BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "20000"}
KINDS = {
    "both": {"num_workers": 2},
    # As if they were on different machines: KV goes from worker to worker.
    "apart": {"roles": ("prefill", "decode"), "worker_module": "tests.chaos.worker"},
}


class Locked:
    """Papers and keys of a stack."""

    def __init__(self, folder: Path) -> None:
        self.ours = Authority(folder / "ours")
        self.papers = self.ours.issue("service")
        self.keys = {name: new_key() for name in ("acme", "other", "narrow", "jobs", "front")}
        self._file = folder / "keys.toml"
        self.write_keys()
        (folder / "orders").mkdir()
        self.environ = {
            **self.papers.environ(),
            **SLOW,
            "BUCKETSERVE_GATEWAY_KEYS_FILE": str(self._file),
            "BUCKETSERVE_API_KEY": self.keys["acme"],
            "BUCKETSERVE_TELEMETRY_LOG_LEVEL": "debug",
            "CHAOS_REMOTE": "1",
            "CHAOS_ORDERS": str(folder / "orders"),
        }

    def write_keys(self, *, without: str = "") -> None:
        more = {
            "narrow": 'tenant = "acme"\nmodels = ["large"]\nclasses = ["batch"]',
            "jobs": 'tenant = "acme"\nscopes = ["jobs"]',
            "front": 'tenant = "front"\nscopes = ["generate", "jobs", "admin"]',
        }
        tables = [
            f'[[keys]]\nname = "{name}"\nsha256 = "{hash_of(key)}"\n' + more.get(name, f'tenant = "{name}"')
            for name, key in self.keys.items()
            if name != without
        ]
        replace(self._file, "\n".join(tables).encode())

    def client(self, stack: LocalStack, name: str = "acme") -> BucketServeClient:
        key = self.keys.get(name, name)
        return BucketServeClient(stack.gateway_address, tls=Tls(ca_file=str(self.papers.ca)), api_key=key)

    def jobs(self, stack: LocalStack, name: str = "acme") -> JobClient:
        key = self.keys.get(name, name)
        return JobClient(stack.gateway_address, tls=Tls(ca_file=str(self.papers.ca)), api_key=key)


async def tokens_of(client: BucketServeClient, prompt: list[int], max_tokens: int, **more) -> list[int]:
    tokens: list[int] = []
    async for event in client.generate(token_ids=prompt, max_tokens=max_tokens, ignore_eos=True, **more):
        if isinstance(event, Chunk):
            tokens += event.token_ids
        elif isinstance(event, Finished):
            assert event.attempts == 1
    return tokens


def right(prompt: list[int], max_tokens: int) -> list[int]:
    return expected_tokens(prompt, max_tokens, 0.0, 0)


async def once(message) -> AsyncIterator:
    yield message


def assert_unsaid(stack: LocalStack, *secrets: str) -> None:
    """None of these is in any log."""
    for name, service in stack.services.items():
        log = service.log_path.read_text(errors="replace")
        assert log, name
        assert not [secret for secret in secrets if secret in log], name
        # Nor is there anything that is not in the log's form: whoever fails at a handshake can't fill a disk.
        assert not [line for line in log.splitlines() if not line.startswith("{")], name


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.mark.parametrize("kind", KINDS)
async def test_streams_jobs_and_commands_work(
    kind: str, receiver: OtlpReceiver, new_stack: NewStack, tmp_path: Path
) -> None:
    locked = Locked(tmp_path / "locked")
    traced = {"BUCKETSERVE_TELEMETRY_OTLP_ENDPOINT": receiver.endpoint}
    stack = new_stack(environ=locked.environ | traced, **KINDS[kind])
    prompts = [[5 + i, 6, 7 + i] for i in range(8)]
    async with locked.client(stack) as client:
        found = await asyncio.gather(*(tokens_of(client, prompt, 30) for prompt in prompts))
        assert found == [right(prompt, 30) for prompt in prompts]
        assert [model.name for model in await client.list_models()] == ["demo"]
        answer = await client.generate_text(SECRET, max_tokens=20)
        assert len(answer) > 10
    if kind == "apart":
        assert metric(stack, "worker-1", "bucketserve_worker_kv_transfers_total", transport="grpc") >= 9
    requests = [inference_pb2.GenerateRequest(token_ids={"ids": prompt}) for prompt in prompts]
    async with locked.jobs(stack) as jobs:
        job = await jobs.submit(requests, idempotency_key="locked")
        results = [result async for result in jobs.results(job.job_id, follow=True)]
    assert [result.error_reason for result in results] == [""] * 8

    lines = tmp_path / "job.jsonl"
    lines.write_text(json.dumps({"prompt": "once", "max_tokens": 3}))
    to_gateway = ["--address", stack.gateway_address, "--tls-ca", str(locked.papers.ca)]
    as_acme = [*to_gateway, "--api-key", locked.keys["acme"]]
    papers = ["--tls-cert", str(locked.papers.cert), "--tls-key", str(locked.papers.key)]
    said = {}
    for name, command in {
        "generate": ["generate", SECRET, "--max-tokens", "20", *as_acme],
        "no key": ["generate", SECRET, *to_gateway],
        "bench": ["bench", "--number", "2", "--workload", "alpaca", *as_acme],
        "job": ["job", "submit", str(lines), "--wait", *as_acme],
        "foreign job": ["job", "status", job.job_id, *to_gateway, "--api-key", locked.keys["other"]],
        "status": ["status", "--address", stack.scheduler_address, "--tls-ca", str(locked.papers.ca), *papers],
        "no certificate": ["status", "--address", stack.scheduler_address, "--tls-ca", str(locked.papers.ca)],
    }.items():
        said[name] = await asyncio.to_thread(run_command, *command)
    assert {name: code for name, (code, _, _) in said.items()} == {
        "generate": 0, "no key": 1, "bench": 0, "job": 0, "foreign job": 1, "status": 0, "no certificate": 1
    }  # fmt: skip
    assert said["generate"][1].strip() == answer.strip()
    assert "UNAUTHENTICATED: a key is needed" in said["no key"][2]
    assert "NOT_FOUND: no job" in said["foreign job"][2]
    assert "UNAVAILABLE" in said["no certificate"][2]
    secrets = [SECRET[:20], answer[:10], *locked.keys.values(), *map(hash_of, locked.keys.values())]
    assert_unsaid(stack, *secrets)
    await eventually(lambda: any(span.name == "bucketserve.decode" for span in receiver.spans()))
    spans = str(receiver.spans())
    assert "bucketserve.tenant" in spans
    assert not [secret for secret in secrets if secret in spans]


async def test_nobody_else_gets_anything(new_stack: NewStack, tmp_path: Path) -> None:
    locked = Locked(tmp_path / "locked")
    stack = new_stack(environ=locked.environ, **KINDS["both"])
    worker = stack.services["worker-0"].health_address
    internal = {"delivery": stack.delivery_address, "scheduler": stack.scheduler_address, "worker": worker}

    theirs = Authority(tmp_path / "theirs")
    good, old = locked.ours.issue("late").tls(), locked.ours.issue("old", is_expired=True)
    # What a process has loaded may expire while it runs.
    good._pems = good._pems._replace(cert=old.cert.read_bytes(), key=old.key.read_bytes())
    strangers: Mapping[str, Tls | None] = {
        "plain text": None,
        "no certificate": Tls(ca_file=str(locked.papers.ca)),
        "other CA": theirs.issue("rogue").tls(ca_file=locked.papers.ca),
        "expired": good,
    }
    papers, ours = locked.papers.tls(), stack.deployment
    for who, tls in strangers.items():
        for port, address in internal.items():
            assert await refusals(address, tls, ours) == {"UNAVAILABLE"}, (who, port)
    for code, caller in {
        "PERMISSION_DENIED": Deployment(ours.name, "guess"),
        # Who has certificate, name and token is one of us, and yet gets nothing that he was not given.
        "NOT_FOUND": ours,
    }.items():
        async with open_channel(worker, papers) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            request = worker_pb2.FetchKvRequest(run_id="r", secret=b"guess")
            assert await code_of(stub.FetchKv(request, metadata=caller.metadata)) == code
    # The public port is none for strangers either.
    for tls in (None, Tls(ca_file=str(theirs.ca_file))):
        async with BucketServeClient(stack.gateway_address, tls=tls, api_key=locked.keys["acme"]) as client:
            assert await refused(client, timeout_s=1.0) in ("UNAVAILABLE", "DEADLINE")
    await a_thief_changes_nothing(locked, stack)
    assert_unsaid(stack, *locked.keys.values(), ours.token)


async def a_thief_changes_nothing(locked: Locked, stack: LocalStack) -> None:
    """One of the deployment's own certificates and its token are stolen."""
    ours, papers = stack.deployment, locked.papers.tls()
    report = scheduler_pb2.WorkerReport(kv_total_tokens=10**6, kv_free_tokens=10**6, max_sequences=64)
    async with locked.client(stack) as client:
        stream = client.generate(token_ids=[8, 9], max_tokens=100, ignore_eos=True, request_id="victim")
        await anext(stream)
        async with open_channel(stack.scheduler_address, papers) as channel:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            for name in ("worker-0", "worker-1"):
                hello = scheduler_pb2.WorkerHello(worker_id=name, model="demo", context_tokens=2048, report=report)
                message = scheduler_pb2.WorkRequest(hello=hello)
                assert await code_of(stub.Work(once(message), metadata=ours.metadata)) in (
                    "PERMISSION_DENIED",
                    # So the client itself tells a write to a call that has ended.
                    "INTERNAL",
                )
        async with open_channel(stack.delivery_address, papers) as channel:
            gateway = delivery_pb2_grpc.DeliveryServiceStub(channel)
            call = gateway.Deliver(metadata=ours.metadata)
            await call.write(delivery_pb2.DeliverRequest(worker_id="rogue"))
            names = ["victim", "", "victim.1", "r"]
            injected = [delivery_pb2.TokenDelivery(run_id=name, token_ids=[1, 2, 3]) for name in names]
            await call.write(delivery_pb2.DeliverRequest(worker_id="rogue", deliveries=injected))
            answer = await call.read()
            assert list(answer.stopped_run_ids) == names
            call.cancel()
        tokens: list[int] = []
        async for event in stream:
            tokens += event.token_ids if isinstance(event, Chunk) else []
    assert tokens == right([8, 9], 100)
    assert events(stack, "scheduler", "worker.id_in_use")
    assert {worker.worker_id for worker in (await status(stack)).workers} == {"worker-0", "worker-1"}


async def refusals(address: str, tls: Tls | None, ours: Deployment) -> set[str]:
    """Codes that everything gives that could be asked at an internal port, with the right name and token."""
    report = scheduler_pb2.WorkerReport(kv_total_tokens=10**6, kv_free_tokens=10**6, max_sequences=64)
    hello = scheduler_pb2.WorkerHello(worker_id="rogue", model="demo", context_tokens=2048, report=report)
    delivery = delivery_pb2.TokenDelivery(run_id="r", token_ids=[1])
    async with open_channel(address, tls, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        scheduler = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        gateway, worker = delivery_pb2_grpc.DeliveryServiceStub(channel), worker_pb2_grpc.WorkerServiceStub(channel)
        calls = [
            scheduler.Work(once(scheduler_pb2.WorkRequest(hello=hello)), metadata=ours.metadata),
            scheduler.Submit(once(scheduler_pb2.SubmitRequest(hello={"gateway_id": "rogue"})), metadata=ours.metadata),
            gateway.Deliver(
                once(delivery_pb2.DeliverRequest(worker_id="worker-0", deliveries=[delivery])), metadata=ours.metadata
            ),
            worker.FetchKv(worker_pb2.FetchKvRequest(run_id="r"), metadata=ours.metadata),
        ]
        codes = {await code_of(call) for call in calls}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await scheduler.GetStatus(scheduler_pb2.GetStatusRequest())
        return codes | {caught.value.code().name}


async def code_of(call) -> str:
    try:
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            await call
        else:
            async for _ in call:
                pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def refused(client: BucketServeClient, **more) -> str:
    """Reason of the refusal of a request."""
    with pytest.raises(BucketServeError) as caught:
        await tokens_of(client, [3, 4], 20, **more)
    return caught.value.reason


async def test_a_key_opens_what_it_is_for_until_it_is_taken_away(new_stack: NewStack, tmp_path: Path) -> None:
    locked = Locked(tmp_path / "locked")
    signer = ec.generate_private_key(ec.SECP256R1())
    signers = jwt.get_algorithm_by_name("ES256").to_jwk(signer.public_key(), as_dict=True)
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [{**signers, "kid": "one"}]}))
    provider = {"JWKS": tmp_path / "jwks.json", "JWT_ISSUER": "id", "JWT_AUDIENCE": "us", "JWT_TENANT_CLAIM": "org"}
    tokens = {f"BUCKETSERVE_GATEWAY_{name}": str(value) for name, value in provider.items()}
    stack = new_stack(environ=locked.environ | tokens, num_gateways=2, **KINDS["both"])
    address, ca = stack.gateway_address, Tls(ca_file=str(locked.papers.ca))
    reasons = {}
    for who, more in {
        "nobody": {}, "x" * 43: {}, "jobs": {}, "narrow": {}, "acme": {"tenant": "other"}, "other": {"tenant": "acme"}
    }.items():  # fmt: skip
        async with locked.client(stack, "" if who == "nobody" else who) as client:
            reasons[who] = await refused(client, **more)
    assert reasons == {
        "nobody": "UNAUTHENTICATED", "x" * 43: "UNAUTHENTICATED", "jobs": "FORBIDDEN", "narrow": "FORBIDDEN",
        "acme": "FORBIDDEN", "other": "FORBIDDEN",
    }  # fmt: skip
    assert metric(stack, "gateway", "bucketserve_gateway_refused_total", reason="unauthenticated") == 2
    assert metric(stack, "gateway", "bucketserve_gateway_refused_total", reason="forbidden") == 4
    async with locked.client(stack, "narrow") as client:
        assert await client.list_models() == []
        with pytest.raises(ForbiddenError):
            await client.tokenize("x", model="demo")
    async with locked.client(stack, "") as client:
        for call in (client.list_models, lambda: client.tokenize("x")):
            with pytest.raises(UnauthenticatedError):
                await call()
    # Whoever stands between tenants and gateway speaks for them.
    async with locked.client(stack, "front") as client:
        assert await tokens_of(client, [3, 4], 5, tenant="acme") == right([3, 4], 5)

    requests = [inference_pb2.GenerateRequest(prompt="once", stopping=common_pb2.StoppingParams(max_tokens=3))]
    async with locked.jobs(stack, "jobs") as mine, locked.jobs(stack, "other") as stranger:
        job = await mine.submit(requests, idempotency_key="one")
        twin = await stranger.submit(requests, idempotency_key="one")
        assert twin.job_id != job.job_id
        for ask in (stranger.get, stranger.cancel):
            with pytest.raises(NotFoundError):
                await ask(job.job_id)
        with pytest.raises(NotFoundError):
            _ = [result async for result in stranger.results(job.job_id)]
        with pytest.raises(ForbiddenError):
            await stranger.get(job.job_id, tenant="acme")
        assert len([result async for result in mine.results(job.job_id, follow=True)]) == 1
        assert len([result async for result in stranger.results(twin.job_id, follow=True)]) == 1
    for name in ("narrow", ""):
        async with locked.jobs(stack, name) as jobs:
            with pytest.raises((ForbiddenError, UnauthenticatedError)):
                await jobs.submit(requests)

    # A token of the provider is as good as a key; its tenant sees what the tenant's keys see.
    claims = {"iss": "id", "aud": "us", "exp": time.time() + 600, "org": "acme", "scope": "jobs"}
    async with locked.jobs(stack, jwt.encode(claims, signer, "ES256", headers={"kid": "one"})) as jobs:
        assert (await jobs.get(job.job_id)).num_done == 1
    async with locked.jobs(stack, jwt.encode({**claims, "aud": "them"}, signer, "ES256")) as jobs:
        with pytest.raises(UnauthenticatedError):
            await jobs.get(job.job_id)

    # The other protocols at this port ask for the same keys.
    tensor = kserve_pb2.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"once")
    asked = kserve_pb2.ModelInferRequest(model_name="demo", inputs=[tensor])
    async with open_channel(address, ca) as channel:
        kserve, engine = kserve_pb2_grpc.GRPCInferenceServiceStub(channel), vllm_pb2_grpc.VllmEngineStub(channel)
        keys = {"": "", **locked.keys}
        said = []
        for ask, message in (
            (kserve.ModelInfer, asked),
            (kserve.ModelMetadata, kserve_pb2.ModelMetadataRequest(name="demo")),
            (kserve.ModelMetadata, kserve_pb2.ModelMetadataRequest()),
            (kserve.ModelConfig, kserve_pb2.ModelConfigRequest(name="demo")),
            (engine.GetModelInfo, vllm_pb2.GetModelInfoRequest()),
        ):
            said.append({who: await code_of(ask(message, metadata=key_metadata(key))) for who, key in keys.items()})
        ready = kserve_pb2.ModelReadyRequest(name="demo")
        for who, is_ready in (("narrow", False), ("acme", True)):
            assert (await kserve.ModelReady(ready, metadata=key_metadata(keys[who]))).ready is is_ready
    of_model = {
        "": "UNAUTHENTICATED", "jobs": "OK", "narrow": "PERMISSION_DENIED", "acme": "OK", "other": "OK", "front": "OK",
    }  # fmt: skip
    assert said == [{**of_model, "jobs": "PERMISSION_DENIED"}, *[of_model] * 4]

    # Health is for everybody; what there is to call is not told.
    assert await asyncio.to_thread(check_health, address, tls=ca) == "SERVING"
    async with open_channel(address, ca) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        for key, code in (("", "UNAUTHENTICATED"), (locked.keys["acme"], "UNIMPLEMENTED")):
            asked = once(reflection_pb2.ServerReflectionRequest(list_services=""))
            assert await code_of(stub.ServerReflectionInfo(asked, metadata=key_metadata(key))) == code

    async with locked.client(stack, "other") as client:
        stream = client.generate(token_ids=[3, 4], max_tokens=100, ignore_eos=True)
        await anext(stream)
        locked.write_keys(without="other")
        assert await refused(client) == "UNAUTHENTICATED"
        # What runs, runs to its end.
        assert [event.reason async for event in stream if isinstance(event, Finished)] == [
            common_pb2.FINISH_REASON_LENGTH
        ]
    async with locked.client(stack) as client:
        assert await tokens_of(client, [3, 4], 5) == right([3, 4], 5)


async def test_the_http_port_asks_for_the_same_keys(new_stack: NewStack, tmp_path: Path) -> None:
    locked = Locked(tmp_path / "locked")
    stack = new_stack(environ=locked.environ, **KINDS["both"])
    trust = ssl.create_default_context(cafile=str(locked.papers.ca))
    body = {"model": "demo", "prompt": [3, 4], "max_tokens": 5, "ignore_eos": True}

    async def ask(who: str, **more: object) -> tuple[int, str | None]:
        headers = {"authorization": f"Bearer {locked.keys.get(who, who)}"} if who else {}
        headers |= {"x-llm-d-inference-fairness-id": str(more.pop("tenant"))} if "tenant" in more else {}
        answer = await client.post("/v1/completions", json=body | more, headers=headers)
        return answer.status_code, (answer.json().get("error") or {}).get("code")

    async with httpx.AsyncClient(base_url=f"https://{stack.http_address}", verify=trust, timeout=60) as client:
        nobody, forbidden = (401, "invalid_api_key"), (403, "forbidden")
        assert {who: await ask(who) for who in ("", "x" * 43, "jobs", "narrow", "acme")} == {
            "": nobody, "x" * 43: nobody, "jobs": forbidden, "narrow": forbidden, "acme": (200, None)
        }  # fmt: skip
        assert await ask("acme", tenant="other") == forbidden
        assert await ask("front", tenant="other") == (200, None)
        key = {"authorization": f"Bearer {locked.keys['narrow']}"}
        assert (await client.get("/v1/models", headers=key)).json()["data"] == []
        assert [(await client.get(path)).status_code for path in ("/v1/models", "/v1/models/demo")] == [401, 401]
        assert [(await client.get("/v1/models/demo", headers=key)).status_code] == [403]
        assert (await client.get("/health")).status_code == 200
    async with openai.AsyncOpenAI(
        base_url=f"https://{stack.http_address}/v1",
        api_key=locked.keys["acme"],
        http_client=httpx.AsyncClient(verify=trust),
    ) as sdk:
        stream = await sdk.completions.create(model="demo", prompt="once", max_tokens=4, stream=True)
        assert [chunk.choices[0].finish_reason async for chunk in stream][-1] == "length"
    # Plain text, and a certificate that nobody vouches for, get no further than the handshake.
    for base_url, verify in ((f"http://{stack.http_address}", True), (f"https://{stack.http_address}", True)):
        async with httpx.AsyncClient(base_url=base_url, verify=verify) as stranger:
            with pytest.raises(httpx.TransportError):
                await stranger.get("/health")


def test_the_demo_shows_its_key(tmp_path: Path) -> None:
    locked = Locked(tmp_path / "locked")
    status, out, err = as_process("demo", "--workers", "1", **locked.environ)
    assert (status, err) == (0, "")
    assert "12 of 12 requests" in out
    status, _, err = as_process("demo", "--workers", "1", **{**locked.environ, "BUCKETSERVE_API_KEY": ""})
    assert status == 1
    assert re.fullmatch(r"error: [^\n]*a key is needed[^\n]*\n", err)


async def test_metrics_of_all_are_shown_to_our_certificates_alone(new_stack: NewStack, tmp_path: Path) -> None:
    locked, theirs = Locked(tmp_path / "locked"), Authority(tmp_path / "theirs")
    stack = new_stack(environ=locked.environ | {"BUCKETSERVE_TLS_METRICS": "mutual"})

    async def shown(address: str, context: ssl.SSLContext | None) -> bool:
        scheme = "http" if context is None else "https"
        try:
            async with httpx.AsyncClient(verify=context or False, timeout=10) as client:
                answer = await client.get(f"{scheme}://{address}/metrics")
        except (httpx.TransportError, ssl.SSLError):
            # The latter while reading: in TLS 1.3 a client hears last of its certificate's refusal.
            return False
        return "process_tls_certificate_ends_seconds" in answer.text

    papers, stranger = locked.papers, theirs.issue("stranger")
    ours, nobody, rogue = (ssl.create_default_context(cafile=str(papers.ca)) for _ in range(3))
    ours.load_cert_chain(papers.cert, papers.key)
    rogue.load_cert_chain(stranger.cert, stranger.key)
    assert set(stack.metrics_addresses) == {"gateway", "scheduler", "worker-0"}
    for address in stack.metrics_addresses.values():
        wary = ssl.create_default_context(cafile=str(theirs.ca_file))
        wary.load_cert_chain(papers.cert, papers.key)
        assert [await shown(address, each) for each in (ours, nobody, rogue, wary, None)] == [True] + [False] * 4
    async with locked.client(stack) as client:
        assert await tokens_of(client, [3, 4], 5) == right([3, 4], 5)
    assert_unsaid(stack)


async def test_certificates_of_all_are_replaced_under_load(new_stack: NewStack, tmp_path: Path) -> None:
    locked, new = Locked(tmp_path / "locked"), Authority(tmp_path / "new")
    stack = new_stack(environ=locked.environ, **KINDS["apart"])
    papers, fresh = locked.papers, new.issue("service", until=date(2222, 2, 2))

    async def load(client: BucketServeClient, seconds: float) -> int:
        number, end_s = 0, asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end_s:
            prompt = [5 + number, 6]
            tokens: list[int] = []
            async for event in client.generate(token_ids=prompt, max_tokens=20, ignore_eos=True):
                tokens += event.token_ids if isinstance(event, Chunk) else []
            assert tokens == right(prompt, 20)
            number += 1
        return number

    async with locked.client(stack) as client:
        loads = [asyncio.create_task(load(client, 6)) for _ in range(4)]
        # Trusted first, then used, then alone. Every process reads the same files here.
        replace(papers.ca, papers.ca.read_bytes() + new.ca_file.read_bytes())
        await asyncio.sleep(1)
        replace(papers.cert, fresh.cert.read_bytes())
        replace(papers.key, fresh.key.read_bytes())
        await asyncio.sleep(1)
        for name in ("worker-1", "scheduler", "worker-0"):
            stack.services[name].signal(signal.SIGTERM)
            assert await asyncio.to_thread(stack.services[name].wait, 20) == 0
            stack.restart(name)
            await eventually(lambda name=name: stack.is_serving(name))
        replace(papers.ca, new.ca_file.read_bytes())
        numbers = await asyncio.gather(*loads)
        assert min(numbers) > 0
    async with BucketServeClient(
        stack.gateway_address, tls=Tls(ca_file=str(new.ca_file)), api_key=locked.keys["acme"]
    ) as client:
        assert await load(client, 0.5) > 0
    async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=str(new.ca_file))) as client:
        assert (await client.get(f"https://{stack.http_address}/health")).status_code == 200
    for name in stack.services:
        ends = metric(stack, name, "process_tls_certificate_ends_seconds")
        assert datetime.fromtimestamp(ends, UTC).date() == date(2222, 2, 2)
    # What was ours is not any more.
    former = Papers(locked.ours.ca_file, papers.cert, papers.key)
    assert former.ca.read_bytes() == new.ca_file.read_bytes()
    stale = locked.ours.issue("stale").tls(ca_file=new.ca_file)
    assert await refusals(stack.scheduler_address, stale, stack.deployment) == {"UNAVAILABLE"}
