"""What a hostile client sends over HTTP, each kind as a function of how much of it; outcomes as in hostile.py.

An outcome is the status of the answer; "cut" where the connection ended without one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ["HOSTILE_HTTP"]

Outcomes = Counter[str]
TIMEOUT_S = 120.0
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
MOST = 12_500_000


async def exchange(address: str, data: bytes, hold_s: float = 0.0) -> str:
    """Sends bytes on a connection of its own, reads nothing for a while, then all; returns the outcome."""
    host, _, port = address.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    except OSError:
        return "cut"
    answer = b""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            with contextlib.suppress(ConnectionError):
                writer.write(data)
                await writer.drain()
            await asyncio.sleep(hold_s)
            while piece := await reader.read(65536):
                answer = answer or piece
    except (OSError, TimeoutError):
        pass
    finally:
        writer.transport.abort()
    return answer[9:12].decode() or "cut"


async def send(address: str, datas: list[bytes], hold_s: float = 0.0) -> Outcomes:
    return Counter(await asyncio.gather(*(exchange(address, data, hold_s) for data in datas)))


def post(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def http_bodies(address: str, scale: float) -> Outcomes:
    """12 MB of what takes room and time to read, and texts as long as may be."""
    pieces = [b"[]", b"{}", b'""', b'{"a":1}', b"0.1", b"5", b"[" * 900 + b"]" * 900, b'"' + b"\\u00e9" * 1000 + b'"']
    bodies = [b'{"messages":[' + b",".join([piece] * (MOST // (len(piece) + 1)))[:MOST] + b"]}" for piece in pieces]
    bodies += [b'{"prompt":[' + b"5," * (MOST // 2 - 10) + b"5]}"]
    bodies += [b'{"messages":[{"role":"user","content":"' + b"And the king " * 300_000 + b'"}]}']
    return await send(address, [post(body) for body in bodies] * max(round(4 * scale), 1))


async def http_frames(address: str, scale: float) -> Outcomes:
    """Heads, trailers and frames without end; bodies of which a byte is missing; requests without a pause."""
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    kinds = [
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 2_000_000,
        b"GET /health HTTP/1.1\r\n" + b"X: a\r\n" * 300_000,
        chunked + b"0\r\nX: " + b"a" * 3_000_000,
        chunked + b"0\r\n" + b"X: a\r\n" * 500_000,
        chunked + b"1\r\n{\r\n" * 300_000,
        HEAD + b"Content-Length: 1000000\r\n\r\n" + b"{" * 999_999,
        b"GET /v1/models HTTP/1.1\r\n\r\n" * 5000 + b"GET / HTTP/1.0\r\n\r\n",
        b"\r\n" * 1_000_000,
    ]
    return await send(address, kinds * max(round(10 * scale), 1), hold_s=1)


async def http_silence(address: str, scale: float) -> Outcomes:
    """Connections that say nothing, half of a head, or half of a body, for a while."""
    kinds = [b"", b"GET /health HT", HEAD + b"Content-Length: 1000\r\n\r\n{"]
    tasks = [asyncio.create_task(exchange(address, kinds[i % 3], hold_s=TIMEOUT_S)) for i in range(round(1200 * scale))]
    await asyncio.sleep(1 + 9 * min(scale, 1))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return Counter()


async def http_unread(address: str, scale: float) -> Outcomes:
    """Streams with much in them that nobody reads, and many choices whose client goes at once."""
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1000, "ignore_eos": True}
    many = json.dumps({**chat, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    found = await send(address, [post(many)] * max(round(100 * scale), 1), hold_s=1 + 4 * min(scale, 1))
    choices = json.dumps({**chat, "n": 16}).encode()
    tasks = [asyncio.create_task(exchange(address, post(choices))) for _ in range(max(round(20 * scale), 1))]
    await asyncio.sleep(1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return found


HOSTILE_HTTP: dict[str, Callable[[str, float], Coroutine[Any, Any, Outcomes]]] = {
    kind.__name__: kind for kind in (http_bodies, http_frames, http_silence, http_unread)
}
