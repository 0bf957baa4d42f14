"""OpenAI's HTTP API as tests call it, by OpenAI's own client and by bare HTTP; the native API beside it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai

from bucketserve.client import BucketServeClient, Chunk
from bucketserve_cli.stack import LocalStack

__all__ = ["CHAT", "TENANT", "TEXT", "USER", "by_grpc", "http", "sdk", "url"]

USER: Any = {"role": "user", "content": "Tell me of the king"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TENANT = "x-llm-d-inference-fairness-id"


def url(stack: LocalStack, gateway: int = 0) -> str:
    return f"http://{stack.http_addresses[gateway]}"


@contextlib.asynccontextmanager
async def sdk(
    stack: LocalStack, max_retries: int = 0, *, tenant: str = "", gateway: int = 0, key: str = "-"
) -> AsyncIterator[openai.AsyncOpenAI]:
    headers = {TENANT: tenant} if tenant else {}
    async with openai.AsyncOpenAI(
        base_url=f"{url(stack, gateway)}/v1", api_key=key, max_retries=max_retries, default_headers=headers
    ) as client:
        yield client


@contextlib.asynccontextmanager
async def http(stack: LocalStack) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url(stack), timeout=60) as client:
        yield client


async def by_grpc(stack: LocalStack, **request: Any) -> str:
    async with BucketServeClient(stack.gateway_address) as client:
        return "".join([event.text async for event in client.generate(**request) if isinstance(event, Chunk)])
