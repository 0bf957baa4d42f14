"""A deployment behind locks: every hop is TLS on both sides, every client has a key, and nobody else gets anything."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, date, datetime
from pathlib import Path

import grpc
import httpx
import pytest

from bucketserve.client import BucketServeClient, Chunk, Finished
from bucketserve.core.errors import BucketServeError
from bucketserve.job_client import JobClient
from bucketserve.rpc.channel import open_channel
from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.tls import Tls
from bucketserve.v1 import (
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
        # Streams may say so of a write to a call that has ended: the client itself, not who refused it.
        return codes - {"INTERNAL"} | {caught.value.code().name}


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
