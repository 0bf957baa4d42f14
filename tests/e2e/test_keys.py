"""Keys in a locked deployment: what each opens, at every port of the gateway."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from pathlib import Path

import httpx
import jwt
import openai
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bucketserve.client import Finished
from bucketserve.core.errors import (
    ForbiddenError,
    NotFoundError,
    UnauthenticatedError,
)
from bucketserve.facades import kserve_pb2, kserve_pb2_grpc, vllm_pb2, vllm_pb2_grpc
from bucketserve.rpc.channel import key_metadata, open_channel
from bucketserve.rpc.probe import check_health
from bucketserve.rpc.tls import Tls
from bucketserve.v1 import (
    common_pb2,
    inference_pb2,
)
from tests.e2e.conftest import NewStack
from tests.e2e.observe import metric
from tests.e2e.test_cli import as_process
from tests.e2e.test_tls import KINDS, Locked, code_of, once, refused, right, tokens_of

pytestmark = pytest.mark.e2e


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
            found = "INTERNAL"
            # So grpc.aio's client tells a write to a call that has ended.
            while found == "INTERNAL":
                asked = once(reflection_pb2.ServerReflectionRequest(list_services=""))
                found = await code_of(stub.ServerReflectionInfo(asked, metadata=key_metadata(key)))
            assert found == code

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
