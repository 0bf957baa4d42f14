"""Files of OpenAI's API through real processes: lists of them, and forms that are wrong or never end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from bucketserve.store.redis import connect
from bucketserve_cli.stack import LocalStack
from tests.e2e.batch_client import chat_line, ended, jsonl, nothing_is_held, send_in
from tests.e2e.observe import eventually
from tests.e2e.openai_client import CHAT, TENANT, sdk

pytestmark = pytest.mark.e2e


@pytest.mark.stack()
async def test_lists_have_pages_and_lose_nothing_though_what_they_name_goes(stack: LocalStack) -> None:
    async with sdk(stack, tenant="pages") as client:
        files = [await send_in(client, jsonl(chat_line("a"), chat_line("b", n=0))) for _ in range(7)]
        batches = []
        for file in files[:3]:
            batches.append(await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h"))
        done = [await ended(client, batch.id) for batch in batches]
        listed = [batch.id async for batch in client.batches.list(limit=2)]
        assert listed == [batch.id for batch in reversed(batches)]
        page = await client.batches.list(limit=2)
        assert (page.has_more, len(page.data)) == (True, 2)
        outputs = [each for batch in done for each in (batch.error_file_id, batch.output_file_id)]
        everything = [*(file.id for file in files), *outputs]
        for limit in (1, 2, 3, 100):
            forward = [file.id async for file in client.files.list(limit=limit, order="asc")]
            assert forward == everything
            assert [file.id async for file in client.files.list(limit=limit)] == everything[::-1]
        assert [file.id async for file in client.files.list(purpose="batch", order="asc", limit=2)] == everything[:7]
        assert [file.id async for file in client.files.list(purpose="batch_output", order="asc", limit=2)] == outputs
        assert [file.id async for file in client.files.list(purpose="vision")] == []
        # Whoever deletes as he goes comes to the end.
        async for file in client.files.list(limit=2):
            await client.files.delete(file.id)
        assert [file.id async for file in client.files.list()] == []
        for path in (
            "/files?limit=0",
            "/files?limit=10001",
            "/files?limit=x",
            "/files?limit=%D9%A1",
            "/files?order=up",
            "/files?after=nobody",
            "/files?after=file-%00",
            "/files?surprise=1",
            "/files?limit=1&limit=2",
            "/files?" + "&".join(f"a{i}=" for i in range(100)),
            "/batches?limit=101",
            "/batches?after=file-x",
            "/batches?order=asc",
        ):
            with pytest.raises(openai.BadRequestError):
                await client.get(path, cast_to=object)


FORM = {"content-type": "multipart/form-data; boundary=b"}


def form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    return (
        b"".join(
            b"--b\r\nContent-Disposition: form-data; " + head.encode("latin-1") + b"\r\n\r\n" + data + b"\r\n"
            for head, data in parts
        )
        + end
    )


PURPOSE = ('name="purpose"', b"batch")
FILE = ('name="file"; filename="a.jsonl"', b"{}\n")
BAD: dict[str, tuple[dict[str, str], bytes, int]] = {
    "no form": ({"content-type": "application/json"}, b"{}", 415),
    "no type": ({}, form(PURPOSE, FILE), 415),
    "a compressed form": ({**FORM, "content-encoding": "gzip"}, form(PURPOSE, FILE), 415),
    "no boundary": ({"content-type": "multipart/form-data"}, form(PURPOSE, FILE), 400),
    "an empty boundary": ({"content-type": "multipart/form-data; boundary="}, form(PURPOSE, FILE), 400),
    "a huge boundary": ({"content-type": "multipart/form-data; boundary=" + "b" * 200}, form(PURPOSE, FILE), 400),
    "another boundary": ({"content-type": "multipart/form-data; boundary=c"}, form(PURPOSE, FILE), 400),
    "no body": (FORM, b"", 400),
    "noise": (FORM, bytes(range(256)) * 1000, 400),
    "no end": (FORM, form(PURPOSE, FILE, end=b""), 400),
    "nothing in it": (FORM, b"--b--\r\n", 400),
    "no file": (FORM, form(PURPOSE), 400),
    "two files": (FORM, form(PURPOSE, FILE, FILE), 400),
    "an empty file": (FORM, form(PURPOSE, (FILE[0], b"")), 400),
    "no purpose": (FORM, form(FILE), 400),
    "two purposes": (FORM, form(PURPOSE, PURPOSE, FILE), 400),
    "another purpose": (FORM, form(('name="purpose"', b"fine-tune"), FILE), 400),
    "a purpose that is no text": (FORM, form(('name="purpose"', b"\xff\xfe"), FILE), 400),
    "a huge purpose": (FORM, form(('name="purpose"', b"batch" * 1000), FILE), 400),
    "an unknown field": (FORM, form(PURPOSE, FILE, ('name="surprise"', b"")), 400),
    "no name": (FORM, form(PURPOSE, ('filename="a"', b"{}")), 400),
    "many parts": (FORM, form(*[('name="purpose"', b"")] * 1000), 400),
    "huge headers": (FORM, b"--b\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 400),
    "many headers": (FORM, b"--b\r\n" + b"X: a\r\n" * 10_000 + b"\r\n", 400),
    "a name with line ends": (FORM, form(PURPOSE, ('name="file"; filename="a\u0007"', b"{}\n")), 400),
    "a huge name": (FORM, form(PURPOSE, (f'name="file"; filename="{"a" * 300}"', b"{}\n")), 400),
    "an encoded part": (
        FORM,
        form(PURPOSE, ('name="file"; filename="a"\r\nContent-Transfer-Encoding: base64', b"e30K")),
        415,
    ),
    "another anchor": (FORM, form(PURPOSE, FILE, ('name="expires_after[anchor]"', b"now")), 400),
    "too short": (
        FORM,
        form(
            PURPOSE,
            FILE,
            ('name="expires_after[anchor]"', b"created_at"),
            ('name="expires_after[seconds]"', b"1"),
        ),
        400,
    ),
    "no number": (
        FORM,
        form(
            PURPOSE,
            FILE,
            ('name="expires_after[anchor]"', b"created_at"),
            ('name="expires_after[seconds]"', "٣٦٠٠".encode()),
        ),
        400,
    ),
    "too long": (FORM, form(PURPOSE, (FILE[0], b"x" * (65 << 20))), 413),
    "too long beside its file": (FORM, form(PURPOSE, FILE) + b"x" * (65 << 20), 413),
}


@pytest.mark.stack()
@pytest.mark.parametrize("case", BAD)
async def test_a_form_that_is_wrong_is_refused_and_leaves_nothing(stack: LocalStack, case: str) -> None:
    headers, body, status = BAD[case]

    async def chunks() -> AsyncIterator[bytes]:
        # Without a length, so that nothing is refused by it.
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    async with httpx.AsyncClient(base_url=f"http://{stack.http_address}", timeout=60) as client:
        for content in (body, chunks()):
            try:
                answer = await client.post("/v1/files", content=content, headers={**headers, TENANT: "bad"})
            except httpx.TransportError:
                # Answered, and cut, while it was still sending.
                assert status == 413
                continue
            assert answer.status_code == status, answer.text
            assert answer.json()["error"]["type"] == "invalid_request_error"
        assert (await client.get("/v1/files", headers={TENANT: "bad"})).json()["data"] == []
    await nothing_is_held(stack, "bad")


@pytest.mark.stack()
async def test_a_connection_that_is_cut_leaves_nothing_of_its_file(stack: LocalStack) -> None:
    host, _, port = stack.http_address.rpartition(":")
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\n{TENANT}: cut\r\nContent-Length: 5000000\r\n"
    body = form(PURPOSE, (FILE[0], b"{}\n" * 100_000), end=b"")
    store = connect(stack.redis_url)

    async def pieces() -> int:
        return len([key async for key in store.scan_iter("bs:{file-*:piece")])

    before = await pieces()
    for _ in range(3):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + body)
        await writer.drain()

        async def is_coming() -> bool:
            return await pieces() > before

        await eventually(is_coming)
        writer.transport.abort()

        async def is_gone() -> bool:
            return await pieces() == before

        await eventually(is_gone)
    await store.aclose()
    await nothing_is_held(stack, "cut")
