"""Random requests to every route of OpenAI's HTTP API: never 500, never a hang, never a crash.

FUZZ_CASES sets how many (default 1,500; `make fuzz` sends 100,000).
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.chaos.checks import leased
from tests.e2e.batch_client import chat_line, jsonl, text_line
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, metric
from tests.e2e.openai_client import CHAT, TENANT, TEXT, url
from tests.e2e.test_fuzz import AT_ONCE, CASES, NUMBERS, TEXTS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

ALLOWED = {200, 400, 403, 404, 405, 408, 409, 413, 415, 429, 431}
FILES, BATCHES = "/v1/files", "/v1/batches"
NAMES = ["model", "prompt", "messages", "n", "max_tokens", "stream", "stop", "seed", "logprobs", "input_file_id"]
NAMES += ["endpoint", "completion_window", "metadata", "output_expires_after", "custom_id", "method", "url", "body"]
# What the output must be, and parts of schemas.
NAMES += ["response_format", "json_schema", "schema", "type", "guided_json", "guided_regex", "structured_outputs"]
NAMES += ["tools", "tool_choice", "function", "name", "parameters", "oneOf", "discriminator", "propertyNames", "enum"]
KNOWN: dict[str, list[str]] = {FILES: [], BATCHES: []}
"""Ids of files and batches that there are, or have been."""


def value(rng: random.Random, depth: int = 0) -> Any:
    """Anything that JSON knows, some of which means something."""
    match rng.randrange(9 if depth < 3 else 6):
        case 0:
            return rng.choice(TEXTS)
        case 1:
            return rng.choice(NUMBERS)
        case 2:
            return rng.choice([None, True, False, 0.5, -1, 1e300])
        case 3:
            return rng.choice([*KNOWN[FILES][-5:], *KNOWN[BATCHES][-5:], CHAT, TEXT, "24h", "POST", "demo"])
        case 4:
            return [5, 6, 7]
        case 5:
            return {"role": "user", "content": "a"}
        case 6:
            return [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
        case _:
            return {rng.choice([*NAMES, rng.choice(TEXTS)]): value(rng, depth + 1) for _ in range(rng.randint(0, 4))}


def mangled(data: bytes, rng: random.Random) -> bytes:
    """The bytes, of which some are changed, missing or there twice, more often than not."""
    if rng.random() < 0.4:
        return data
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(found))
        match rng.randrange(3):
            case 0:
                found[at : at + 1] = rng.randbytes(1)
            case 1:
                del found[at : at + rng.randint(1, 50)]
            case _:
                found[at:at] = found[at : at + 20]
    return bytes(found)


def file(rng: random.Random) -> bytes:
    """Lines that are right, and some that are not."""
    lines = [rng.choice([chat_line, text_line])(rng.choice(["a", "b", "c", "d"])) for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.5:
        lines.append(value(rng))
    for line in lines:
        if isinstance(line, dict) and rng.random() < 0.3:
            line[rng.choice(NAMES)] = value(rng)
    return mangled(jsonl(*lines), rng)


def form(rng: random.Random) -> tuple[dict[str, str], bytes]:
    """A form with a file, as it should be or not."""
    boundary = rng.choice(["b", "b", "x" * 70, "-", '"q"'])
    heads = [('name="purpose"', rng.choice([b"batch"] * 5 + [b"", b"vision"]))]
    heads += [('name="file"; filename="{}"'.format(rng.choice(["a", "../b", "", "\\", "%00"])), file(rng))]
    if rng.random() < 0.3:
        heads.append(('name="expires_after[anchor]"', b"created_at"))
        heads.append(('name="expires_after[seconds]"', str(rng.choice(NUMBERS)).encode()))
    if rng.random() < 0.1:
        heads.append((f'name="{rng.choice(NAMES)}"', rng.randbytes(5)))
    rng.shuffle(heads)
    mark = boundary.strip('"').encode()
    parts = [b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (mark, h.encode(), d) for h, d in heads]
    body = b"".join(parts) + b"--" + mark + b"--\r\n"
    is_whole = rng.random() < 0.6
    return {"content-type": f"multipart/form-data; boundary={boundary}"}, body if is_whole else mangled(body, rng)


async def send(client: httpx.AsyncClient, rng: random.Random) -> tuple[str, httpx.Response]:
    """Sends one; returns its route and its answer."""
    headers = {TENANT: rng.choice([*["a"] * 8, "b", "t" * 65, ""])}
    kind = rng.choice([FILES, BATCHES])
    name = rng.choice([*KNOWN[kind][-20:], "file-x", "batch_", "%ff", "..", "x" * 300])
    routes = [
        *[("POST", FILES)] * 3,
        *[("POST", BATCHES)] * 3,
        *[("POST", TEXT), ("POST", CHAT)],
        *[("GET", FILES), ("GET", BATCHES)],
        *[("GET", f"{kind}/{name}"), ("GET", f"{kind}/{name}/content"), ("POST", f"{kind}/{name}/cancel")],
        ("DELETE", f"{kind}/{name}"),
        (rng.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]), rng.choice([FILES, BATCHES, TEXT])),
    ]
    method, path = rng.choice(routes)
    content = b""
    if method == "POST" and path == FILES:
        more, content = form(rng)
        headers |= more
    elif method == "POST":
        headers["content-type"] = "application/json"
        body = value(rng)
        if path == BATCHES and rng.random() < 0.8:
            file_id = rng.choice([*KNOWN[FILES][-5:], name])
            body = {"endpoint": rng.choice([CHAT, TEXT]), "completion_window": "24h", "input_file_id": file_id}
        content = json.dumps(body).encode()
        content = content if rng.random() < 0.7 else mangled(content, rng)
    query = rng.choice(["", "", "", "?limit=5", "?after=" + name, "?limit=-1", "?order=asc&purpose=batch", "?%00=%ff"])
    answer = await client.request(method, path + query, headers=headers, content=content)
    return f"{method} {path.replace(name, 'NAME')}", answer


async def test_no_request_breaks_anything(new_stack: NewStack) -> None:
    stack = new_stack(environ={"BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "0"})
    rng = random.Random(20261126)
    seen: Counter[tuple[str, int]] = Counter()
    slots = asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=url(stack), timeout=60, limits=limits) as client:

        async def one(seed: int) -> None:
            async with slots:
                route, answer = await send(client, random.Random(seed))
                assert answer.status_code in ALLOWED, (seed, route, answer.status_code, answer.text)
                seen[route, answer.status_code] += 1
                if answer.status_code == 200 and route in (f"POST {FILES}", f"POST {BATCHES}"):
                    an_id = answer.json()["id"]
                    KNOWN[route.partition(" ")[2]].append(an_id)
                    if an_id.startswith("batch_"):
                        KNOWN[FILES].append(f"file-{an_id.removeprefix('batch_')}-output")

        await asyncio.gather(*(one(rng.getrandbits(60)) for _ in range(CASES)))
        assert (await client.post(TEXT, json={"prompt": "a", "max_tokens": 2})).status_code == 200
        # Which of them meet something that is there depends on the order of the answers; that many do does not.
        for route, status in (
            (f"POST {FILES}", 200),
            (f"POST {FILES}", 400),
            (f"POST {BATCHES}", 400),
            (f"GET {FILES}", 200),
            (f"GET {BATCHES}", 200),
        ):
            assert seen[route, status] > 0, (route, status, seen)
        assert sum(number for (route, status), number in seen.items() if "NAME" in route and status == 200), seen
    for name, service in stack.services.items():
        assert service.exit_status is None, name
        assert "Traceback" not in service.log_path.read_text(), name
        assert "rpc.failed" not in service.log_path.read_text(), name
    # What was made a batch may still run, or wait for its next try.
    left: list[list[str]] = []

    async def is_done() -> bool:
        left[:] = [await leased(stack.redis_url)]
        return not left[0] and metric(stack, "gateway", "bucketserve_gateway_open_requests") == 0

    try:
        await eventually(is_done, 120)
    except AssertionError:
        raise AssertionError(f"batches do not end: {left}") from None
