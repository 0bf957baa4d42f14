"""OpenAI's files and batches through real processes, by OpenAI's own client and by bare HTTP."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import httpx
import openai
import pytest
from openai.types import Batch

from bucketserve.core.errors import NotFoundError
from bucketserve.job_client import JobClient
from bucketserve.store.redis import connect
from bucketserve_cli.stack import LocalStack
from bucketserve_gateway.keys import hash_of, new_key
from tests.certificates import replace
from tests.e2e.batch_client import ENDED, chat_line, ended, jsonl, nothing_is_held, rows, send_in, start, text_line
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, metric
from tests.e2e.openai_client import CHAT, TEXT, sdk
from tests.e2e.test_stack import SLOW

pytestmark = pytest.mark.e2e


@pytest.mark.stack(num_gateways=2)
async def test_a_batch_from_its_file_to_its_output(stack: LocalStack) -> None:
    lines = [chat_line(f"c{i}", n=1 + i % 2, max_tokens=1 + i % 7) for i in range(300)]
    # What can't be served is an answer like any other, and so is what only the tokenizer finds too long.
    lines[7]["body"]["audio"] = {}
    lines[8]["body"]["stream"] = True
    lines[9]["body"]["max_tokens"] = 5000
    content = jsonl(*lines)
    async with sdk(stack, tenant="acme") as client, sdk(stack, tenant="acme", gateway=1) as other:
        file = await send_in(client, content, "folder/../in.jsonl")
        assert (file.object, file.purpose, file.filename, file.bytes) == ("file", "batch", "in.jsonl", len(content))
        assert file.expires_at == file.created_at + 86_400
        # Any gateway has it.
        assert await other.files.retrieve(file.id) == file
        assert (await other.files.content(file.id)).content == content
        metadata = {"job": "nightly", "größe": "groß"}
        batch = await other.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata=metadata
        )
        assert (batch.object, batch.endpoint, batch.completion_window) == ("batch", CHAT, "24h")
        assert batch.status == "in_progress"
        assert batch.expires_at == batch.created_at + 86_400
        assert batch.request_counts is not None
        assert batch.request_counts.total == 300
        # It has what it needs of its file.
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await other.files.retrieve(file.id)
        done = await ended(client, batch.id)
        assert done.status == "completed"
        assert done.request_counts is not None
        assert done.request_counts.model_dump() == {"total": 300, "completed": 297, "failed": 3}
        assert (done.metadata, done.input_file_id, done.errors) == (metadata, file.id, None)
        assert done.in_progress_at and done.completed_at and done.finalizing_at
        assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
        answers = await rows(client, done.output_file_id)
        assert [row["custom_id"] for row in answers] == [f"c{i}" for i in range(300) if i not in (7, 8, 9)]
        assert len({row["id"] for row in answers}) == 297
        for row in answers:
            number, response = int(row["custom_id"][1:]), row["response"]
            assert (row["error"], response["status_code"]) == (None, 200)
            assert response["request_id"]
            body = openai.types.chat.ChatCompletion.model_validate(response["body"])
            assert len(body.choices) == 1 + number % 2
            assert body.usage is not None
            assert body.usage.completion_tokens == (1 + number % 7) * len(body.choices)
        # What a batch generates is what anybody else gets with the seed that it fixed.
        direct = await client.post(
            "/chat/completions", body={**lines[4]["body"], "seed": 5}, cast_to=openai.types.chat.ChatCompletion
        )
        assert direct.choices[0].message.content == answers[4]["response"]["body"]["choices"][0]["message"]["content"]
        errors = await rows(client, done.error_file_id)
        assert [(row["custom_id"], row["response"]["status_code"]) for row in errors] == [
            ("c7", 400),
            ("c8", 400),
            ("c9", 400),
        ]
        assert [row["response"]["body"]["error"]["param"] for row in errors] == ["audio", "stream", "max_tokens"]
        # Outputs are files like others.
        output = await other.files.retrieve(done.output_file_id or "")
        assert output.purpose == "batch_output"
        assert (await other.files.delete(output.id)).deleted
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                await call(output.id)
        assert len(await rows(client, done.error_file_id)) == 3
        # Nothing of it is left in the store.
        store = connect(stack.redis_url)
        assert await store.hlen(f"bs:{{{batch.id}}}:result") == 3
        assert not await store.exists(f"bs:{{{batch.id}}}:item")
        await store.aclose()


def test_the_client_without_asyncio(stack: LocalStack, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    # Lines may end as they do elsewhere, and may be empty.
    path.write_bytes(
        b"\xef\xbb\xbf" + jsonl(text_line("a", echo=True), text_line("b", logprobs=2)).replace(b"\n", b"\r\n\n")
    )
    with openai.OpenAI(base_url=f"http://{stack.http_address}/v1", api_key="-", max_retries=0) as client:
        with path.open("rb") as source:
            file = client.files.create(
                file=source, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
            )
        assert (file.filename, file.expires_at) == ("requests.jsonl", file.created_at + 3600)
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint=TEXT,
            completion_window="24h",
            output_expires_after={"anchor": "created_at", "seconds": 7200},
        )
        while client.batches.retrieve(batch.id).status not in ENDED:
            pass
        done = client.batches.retrieve(batch.id)
        assert (done.status, done.error_file_id) == ("completed", None)
        text = client.files.content(done.output_file_id or "").text
        first, second = (json.loads(line) for line in text.splitlines())
        assert first["response"]["body"]["object"] == "text_completion"
        assert len(second["response"]["body"]["choices"][0]["logprobs"]["tokens"]) == 5
        assert next(iter(client.batches.list(limit=1))).id == batch.id
        client.files.content(file.id).write_to_file(tmp_path / "again.jsonl")
        assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


async def test_what_a_file_has_that_is_no_batch_is_said_line_by_line(stack: LocalStack) -> None:
    good = chat_line("good")
    wrong: list[tuple[bytes, str, str | None]] = [
        (b"hello", "invalid_json_line", None),
        (b"[]", "invalid_json_line", None),
        (b'{"custom_id": "x"', "invalid_json_line", None),
        (jsonl(good).replace(b"5", b"NaN").strip(), "invalid_json_line", None),
        (jsonl(good).replace(b"good", b"\\ud800").strip(), "invalid_json_line", None),
        (b"\xff\xfe\x00\x01", "invalid_json_line", None),
        (b"[" * 50_000, "invalid_json_line", None),
        (json.dumps({**good, "custom_id": None}).encode(), "missing_required_parameter", "custom_id"),
        (json.dumps({**good, "custom_id": ""}).encode(), "invalid_custom_id", "custom_id"),
        (json.dumps({**good, "custom_id": 5}).encode(), "invalid_type", "custom_id"),
        (json.dumps({**good, "custom_id": "x" * 513}).encode(), "invalid_custom_id", "custom_id"),
        (json.dumps({**good, "method": "GET"}).encode(), "invalid_method", "method"),
        (json.dumps({**good, "url": TEXT}).encode(), "invalid_url", "url"),
        (json.dumps({**good, "body": []}).encode(), "invalid_type", "body"),
        (json.dumps({**good, "priority": 1}).encode(), "unknown_parameter", "priority"),
        (
            json.dumps({key: good[key] for key in ("custom_id", "method", "url")}).encode(),
            "missing_required_parameter",
            "body",
        ),
        (json.dumps(chat_line("other", model="nobody")).encode(), "model_not_found", "body.model"),
        (json.dumps(good).encode(), "duplicate_custom_id", "custom_id"),
    ]
    content = jsonl(good) + b"\n".join(line for line, _, _ in wrong)
    async with sdk(stack, tenant="lines") as client:
        batch = await start(client, content)
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
        assert batch.failed_at and not batch.in_progress_at
        assert batch.errors is not None
        assert [(error.line, error.code, error.param) for error in batch.errors.data or []] == [
            (number, code, param) for number, (_, code, param) in enumerate(wrong, 2)
        ]
        assert await client.batches.retrieve(batch.id) == batch
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel(batch.id)
        for content, code in (
            (b"\n \n\r\n", "empty_file"),
            (b'{"custom_id": "' + b"x" * 13_000_000, "line_too_long"),
            (b"\x1f\x8b\x08\x00" + bytes(range(256)) * 100, "invalid_json_line"),
            (b"\n" * 100_001, "too_many_lines"),
        ):
            batch = await start(client, content)
            assert batch.errors is not None
            assert (batch.errors.data or [])[-1].code == code
        # As many as anybody reads.
        batch = await start(client, b"{}\n" * 10_000)
        assert batch.errors is not None
        assert len(batch.errors.data or []) == 50
        for name, value in (
            ("input_file_id", "file-unknown"),
            ("input_file_id", 5),
            ("endpoint", "/v1/embeddings"),
            ("completion_window", "1h"),
            ("metadata", {"a": 1}),
            ("metadata", {str(i): "" for i in range(17)}),
            ("output_expires_after", {"anchor": "created_at", "seconds": 1}),
            ("surprise", 1),
        ):
            body = {"input_file_id": batch.input_file_id, "endpoint": CHAT, "completion_window": "24h", name: value}
            with pytest.raises(openai.BadRequestError) as caught:
                await client.post("/batches", body=body, cast_to=Batch)
            assert (caught.value.param or "").startswith(name)


async def test_files_and_batches_are_their_tenants_alone(new_stack: NewStack, tmp_path: Path) -> None:
    keys = {name: new_key() for name in ("acme", "other", "prompts", "walled")}
    more = {"prompts": 'scopes = ["generate"]\n', "walled": 'models = ["elsewhere"]\n'}
    tables = [
        f'[[keys]]\nname = "{name}"\nsha256 = "{hash_of(key)}"\ntenant = "{name}"\n{more.get(name, "")}'
        for name, key in keys.items()
    ]
    file_of_keys = tmp_path / "keys.toml"
    replace(file_of_keys, "\n".join(tables).encode())
    environ = {"BUCKETSERVE_GATEWAY_KEYS_FILE": str(file_of_keys), "BUCKETSERVE_API_KEY": keys["acme"]}
    stack = new_stack(environ=environ)
    async with sdk(stack, key=keys["acme"]) as owner, sdk(stack, key=keys["other"]) as stranger:
        file = await send_in(owner, jsonl(chat_line("a"), chat_line("b", n=0)))
        batch = await owner.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        done = await ended(owner, batch.id)
        ids = [file.id, done.output_file_id or "", done.error_file_id or ""]
        for file_id in (*ids, "file-", "file-" + "0" * 32, "x" * 10_000, "..%2f..%2fetc%2fpasswd", "%00", "%ff"):
            for call in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
                with pytest.raises(openai.NotFoundError) as caught:
                    await call(file_id)
                assert file_id in ids or caught.value.code in ("not_found", "unknown_url")
        with pytest.raises(openai.BadRequestError) as refused:
            await stranger.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert refused.value.code == "file_not_found"
        for call in (stranger.batches.retrieve, stranger.batches.cancel):
            for batch_id in (batch.id, "batch_", "batch_" + "0" * 32):
                with pytest.raises(openai.NotFoundError):
                    await call(batch_id)
        assert [each.id async for each in stranger.files.list()] == []
        assert [each.id async for each in stranger.batches.list()] == []
        assert {each.id async for each in owner.files.list()} == set(ids)
        # Nobody gets into another's by naming him, and nobody without the scope.
        for key, tenant in ((keys["other"], "acme"), (keys["prompts"], "")):
            async with sdk(stack, tenant=tenant, key=key) as client:
                for call in (client.files.list, client.batches.list):
                    with pytest.raises(openai.PermissionDeniedError):
                        await call()
                with pytest.raises(openai.PermissionDeniedError):
                    await send_in(client, b"{}\n")
        async with sdk(stack, key="bsk_nobody") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.files.list()
        async with sdk(stack, key=keys["walled"]) as client:
            walled = await start(client, jsonl(chat_line("a")))
            assert walled.errors is not None
            assert [(error.code, error.line) for error in walled.errors.data or []] == [("forbidden", 1)]
    # The native API knows nothing of batches.
    async with JobClient(stack.gateway_address, api_key=keys["acme"]) as jobs:
        for call in (jobs.get, jobs.cancel):
            with pytest.raises(NotFoundError):
                await call(batch.id)
    text = "".join(service.log_path.read_text() for service in stack.services.values())
    assert "Tell me of" not in text


@pytest.mark.stack(environ={**SLOW, "BUCKETSERVE_GATEWAY_JOB_CONCURRENCY": "8"})
async def test_a_cancelled_batch_keeps_what_is_there_and_says_what_is_not(stack: LocalStack) -> None:
    async with sdk(stack, tenant="canceller") as client:
        batch = await start(client, jsonl(*(chat_line(f"c{i}", max_tokens=50) for i in range(700))))
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(f"file-{batch.id.removeprefix('batch_')}-output")
        await eventually(lambda: metric(stack, "gateway", "bucketserve_gateway_job_requests_total") >= 8)
        cancelled = await client.batches.cancel(batch.id)
        assert cancelled.status == "cancelling"
        assert cancelled.cancelling_at and not cancelled.cancelled_at
        done = await ended(client, batch.id)
        assert done.status == "cancelled"
        assert done.cancelled_at and not done.completed_at
        assert (await client.batches.cancel(batch.id)).status == "cancelled"
        outputs, errors = await rows(client, done.output_file_id), await rows(client, done.error_file_id)
        assert done.request_counts is not None
        counts = done.request_counts
        assert (counts.total, counts.completed, counts.failed) == (700, len(outputs), len(errors))
        assert 8 <= len(outputs) < 700
        assert {row["custom_id"] for row in (*outputs, *errors)} == {f"c{i}" for i in range(700)}
        assert {(row["response"], row["error"]["code"]) for row in errors} == {(None, "batch_cancelled")}
        await eventually(lambda: metric(stack, "gateway", "bucketserve_gateway_open_requests") == 0)


@pytest.mark.stack(environ={**SLOW, "BUCKETSERVE_GATEWAY_JOB_CONCURRENCY": "8"})
async def test_a_batch_expires_with_its_window(stack: LocalStack) -> None:
    async with sdk(stack, tenant="late") as client:
        batch = await start(client, jsonl(*(chat_line(f"c{i}", max_tokens=50) for i in range(300))))
        await eventually(lambda: metric(stack, "gateway", "bucketserve_gateway_job_requests_total") >= 8)
        store = connect(stack.redis_url)
        # As if it were tomorrow.
        now_us = int((await store.time())[0]) * 1_000_000
        await store.hset(f"bs:{{{batch.id}}}:meta", "until", str(now_us))
        await store.aclose()
        done = await ended(client, batch.id)
        assert done.status == "expired"
        assert done.expired_at and done.finalizing_at and not done.completed_at
        outputs, errors = await rows(client, done.output_file_id), await rows(client, done.error_file_id)
        assert len(outputs) + len(errors) == 300
        assert {(row["response"], row["error"]["code"]) for row in errors} == {(None, "batch_expired")}


async def test_a_batch_survives_its_gateways(new_stack: NewStack) -> None:
    stack = new_stack(
        num_gateways=2,
        environ={**SLOW, "BUCKETSERVE_GATEWAY_JOB_LEASE_S": "2", "BUCKETSERVE_GATEWAY_JOB_CONCURRENCY": "16"},
    )
    number = 150
    async with sdk(stack, tenant="t", gateway=0) as client:
        batch = await start(client, jsonl(*(text_line(f"c{i}", max_tokens=20) for i in range(number))), TEXT)
    await eventually(lambda: metric(stack, "gateway", "bucketserve_gateway_job_requests_total") >= 4)
    stack.services["gateway"].signal(signal.SIGKILL)
    stack.services["gateway"].wait(5)
    async with sdk(stack, tenant="t", gateway=1) as client:
        assert (await client.batches.retrieve(batch.id)).status == "in_progress"
        done = await ended(client, batch.id)
        assert done.status == "completed"
        found = await rows(client, done.output_file_id)
    # Every line has one answer, and those that were run again are as they would have been.
    assert [row["custom_id"] for row in found] == [f"c{i}" for i in range(number)]
    assert {row["response"]["body"]["usage"]["completion_tokens"] for row in found} == {20}


async def test_what_tenants_store_is_bounded_with_their_jobs(new_stack: NewStack) -> None:
    stack = new_stack(
        environ={
            "BUCKETSERVE_GATEWAY_MAX_TENANT_JOB_BYTES": "200000",
            "BUCKETSERVE_GATEWAY_MAX_ALL_JOB_BYTES": "300000",
            "BUCKETSERVE_GATEWAY_MAX_JOB_BYTES": "150000",
            "BUCKETSERVE_GATEWAY_MAX_JOB_REQUESTS": "20",
        }
    )
    async with sdk(stack, tenant="a") as client, sdk(stack, tenant="b") as other:
        with pytest.raises(openai.APIStatusError) as caught:
            await send_in(client, b"x" * 160_000)
        assert caught.value.status_code == 413
        large = await send_in(client, b"x" * 140_000)
        # The next one does not fit beside it, neither the bytes nor, however small they are, the number of files.
        with pytest.raises(openai.RateLimitError) as full:
            await send_in(client, b"x" * 60_000)
        assert full.value.code == "jobs_of_tenant"
        with pytest.raises(openai.RateLimitError):
            for _ in range(100):
                await send_in(client, b"{}\n")
        kept = [file.id async for file in client.files.list()]
        assert 2 <= len(kept) < 5
        with pytest.raises(openai.RateLimitError) as full:
            await send_in(other, b"x" * 140_000)
        assert full.value.code == "jobs_of_store"
        for file_id in kept:
            await client.files.delete(file_id)
        assert large.id in kept
        # A batch takes room for its lines and for what they may become.
        batch = await start(client, jsonl(*(chat_line(f"c{i}") for i in range(20))))
        assert (await ended(client, batch.id)).status == "completed"
        with pytest.raises(openai.RateLimitError):
            await start(client, jsonl(chat_line("c", n=100, max_tokens=2000)))
        assert [each.id async for each in client.batches.list()] == [batch.id]
        too_many = await start(client, jsonl(*(chat_line(f"c{i}") for i in range(21))))
        assert too_many.errors is not None
        assert [error.code for error in too_many.errors.data or []] == ["too_many_lines"]


async def test_without_redis_they_are_unavailable(new_stack: NewStack) -> None:
    stack = new_stack(redis_url="memory://")
    async with sdk(stack) as client:
        for call in (client.files.list, client.batches.list, lambda: client.files.retrieve("file-x")):
            with pytest.raises(openai.InternalServerError) as caught:
                await call()
            assert caught.value.code == "no_job_store"
        with pytest.raises(openai.InternalServerError):
            await send_in(client, b"{}\n")


@pytest.mark.stack()
async def test_a_file_that_goes_while_it_is_read_makes_no_batch_and_no_whole_download(stack: LocalStack) -> None:
    async with sdk(stack, tenant="going") as client:
        file = await send_in(client, jsonl(*(chat_line(f"c{i}") for i in range(2000))))
        store = connect(stack.redis_url)
        # As a deletion by another gateway looks to who is in the middle of it.
        await store.hdel(f"bs:{{{file.id}}}:piece", "2")
        await store.aclose()
        with pytest.raises(openai.NotFoundError):
            await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert [each.id async for each in client.batches.list()] == []
        with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):
            await client.files.content(file.id)
        await client.files.delete(file.id)
    await nothing_is_held(stack, "going")


async def test_with_keys_nothing_of_a_batch_can_be_read_in_redis(new_stack: NewStack, tmp_path: Path) -> None:
    keys = tmp_path / "job-keys"
    keys.write_text("ab" * 32 + "\n")
    stack = new_stack(environ={"BUCKETSERVE_GATEWAY_JOB_KEYS_FILE": str(keys), **SLOW})
    async with sdk(stack, tenant="sealed") as client:
        content = jsonl(*(text_line(f"xylophone-{i}", prompt=f"xylophone {i}", echo=True) for i in range(40)))
        file = await send_in(client, content, "xylophone.jsonl")
        metadata = {"xylophone": "xylophone"}
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=TEXT, completion_window="24h", metadata=metadata
        )
        store = connect(stack.redis_url)
        num_looks = 0

        async def is_over() -> bool:
            nonlocal num_looks
            async for key in store.scan_iter("bs:*"):
                if await store.type(key) == b"hash":
                    for name, value in (await store.hgetall(key)).items():
                        num_looks += 1
                        assert b"xylo" not in name + value
            return (await client.batches.retrieve(batch.id)).status == "completed"

        await eventually(is_over, 60)
        await store.aclose()
        assert num_looks > 100
        done = await client.batches.retrieve(batch.id)
        assert done.metadata == metadata
        found = await rows(client, done.output_file_id)
        assert [row["custom_id"] for row in found] == [f"xylophone-{i}" for i in range(40)]
        assert (await client.files.content(file.id)).content == content
    # Without the key a gateway does not start.
    stack.services["gateway"].signal(signal.SIGTERM)
    stack.services["gateway"].wait(30)
    keys.write_text("cd" * 32 + "\n")
    stack.restart("gateway")
    await eventually(lambda: stack.services["gateway"].exit_status is not None, 30)
    assert stack.services["gateway"].exit_status != 0
    assert "job_keys_file" in stack.services["gateway"].log_path.read_text()
    keys.write_text("cd" * 32 + "\n" + "ab" * 32 + "\n")
    stack.restart("gateway")
    await asyncio.to_thread(stack.wait_until_serving)
    async with sdk(stack, tenant="sealed") as client:
        assert await rows(client, done.output_file_id) == found
