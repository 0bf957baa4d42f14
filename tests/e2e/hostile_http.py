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


FORM = b"POST /v1/files HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=b\r\nConnection: close\r\n"
PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


def send_in(content: bytes, end: bytes = b"\r\n--b--\r\n") -> bytes:
    body = PURPOSE + FILE + content + end
    return FORM + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def http_files(address: str, scale: float) -> Outcomes:
    """Forms that take time to read, files as large as may be and beyond, and such as drip and never end."""
    kinds = [
        send_in(b"x" * 20_000_000),
        send_in(b"\n" * 20_000_000),
        send_in(b"\r\n--" * 5_000_000),
        send_in(b"\r\n--b " * 3_000_000),
        send_in((b"\r\n" + PURPOSE) * 300_000),
        FORM + b"Content-Length: 60000000\r\n\r\n" + PURPOSE + FILE + b"x" * 100_000,
        FORM + b"Content-Length: 20000000\r\n\r\n--b\r\n" + b"X: a\r\n" * 3_000_000,
        FORM + b"Content-Length: 20000000\r\n\r\n--b\r\nX: " + b" " * 19_999_990,
        FORM + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n-\r\n" * 300_000,
    ]
    tasks = [asyncio.create_task(exchange(address, data)) for data in kinds * max(round(10 * scale), 1)]
    done, unfinished = await asyncio.wait(tasks, timeout=5 + 25 * min(scale, 1))
    for task in unfinished:
        task.cancel()
    await asyncio.gather(*unfinished, return_exceptions=True)
    return Counter(task.result() for task in done)


async def http_batches(address: str, scale: float) -> Outcomes:
    """Batches of lines that are many, wrong, or long; lists and files, again and again, that nobody reads."""
    line = b'{"custom_id": "%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": [5], "max_tokens": 1}}'
    contents = [
        b"\n".join(line % i for i in range(50)),
        # All of it is on its way to be run when the last line is seen.
        b"\n".join(line % i for i in range(max(round(20_000 * scale), 100))) + b"\n{}",
        b"{}\n" * 1_000_000,
        b"\n" * 5_000_000,
        b"[" * 5_000_000,
        b'{"body": [' + b"5," * 5_000_000,
    ]
    found = Counter[str]()
    for content in contents:
        head, _, body = (await whole(address, send_in(content))).partition(b"\r\n\r\n")
        found[head[9:12].decode() or "cut"] += 1
        if not head.startswith(b"HTTP/1.1 200"):
            continue
        terms = {"input_file_id": json.loads(body)["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        made = post(json.dumps(terms).encode()).replace(b"/v1/chat/completions", b"/v1/batches")
        found += await send(address, [made] * max(round(20 * scale), 1))
        path = b"GET /v1/files/%s/content HTTP/1.1\r\nConnection: close\r\n\r\n" % terms["input_file_id"].encode()
        found += await send(address, [path] * max(round(100 * scale), 1), hold_s=1)
    again = [b"GET %s HTTP/1.1\r\nConnection: close\r\n\r\n" % path for path in (b"/v1/files", b"/v1/batches")]
    return found + await send(address, again * max(round(200 * scale), 1))


async def whole(address: str, data: bytes) -> bytes:
    """Sends bytes; returns all of the answer."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
            return await reader.read()
        return b""
    finally:
        writer.transport.abort()


HOSTILE_HTTP: dict[str, Callable[[str, float], Coroutine[Any, Any, Outcomes]]] = {
    kind.__name__: kind for kind in (http_bodies, http_frames, http_silence, http_unread, http_files, http_batches)
}
