"""Batches as tests have them done by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import openai
from openai.types import Batch, FileObject

from bucketserve.store.redis import connect
from bucketserve_cli.stack import LocalStack
from tests.e2e.observe import eventually
from tests.e2e.openai_client import CHAT, TEXT

__all__ = ["ENDED", "chat_line", "ended", "jsonl", "nothing_is_held", "rows", "send_in", "start", "text_line"]

ENDED = ("completed", "failed", "expired", "cancelled")


def chat_line(custom_id: str, **body: Any) -> dict[str, Any]:
    message = {"role": "user", "content": f"Tell me of {custom_id}"}
    body = {"model": "demo", "messages": [message], "max_tokens": 5, "ignore_eos": True, **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def text_line(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 5, "ignore_eos": True, **body}
    return {"custom_id": custom_id, "method": "POST", "url": TEXT, "body": body}


def jsonl(*lines: Any) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


async def send_in(client: openai.AsyncOpenAI, content: bytes, name: str = "in.jsonl") -> FileObject:
    return await client.files.create(file=(name, content), purpose="batch")


async def start(client: openai.AsyncOpenAI, content: bytes, endpoint: Any = CHAT, **more: Any) -> Batch:
    file = await send_in(client, content)
    return await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


async def ended(client: openai.AsyncOpenAI, batch_id: str) -> Batch:
    async def has_ended() -> bool:
        return (await client.batches.retrieve(batch_id)).status in ENDED

    await eventually(has_ended, 60)
    return await client.batches.retrieve(batch_id)


async def rows(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    content = (await client.files.content(file_id)).content
    assert len(content) == (await client.files.retrieve(file_id)).bytes
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


async def nothing_is_held(stack: LocalStack, tenant: str) -> None:
    store = connect(stack.redis_url)

    async def is_so() -> bool:
        name = f"bs:{{{stack.deployment.name}/jobs}}:held"
        return not await store.hexists(name, tenant)

    await eventually(is_so)
    await store.aclose()
