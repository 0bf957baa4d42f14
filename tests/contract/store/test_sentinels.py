"""Sentinels on IPv6, with a password of their own that is not that of the servers, and behind TLS."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bucketserve.children import Child
from bucketserve.core.errors import UnavailableError
from bucketserve.store.embedded import find_server, free_port
from bucketserve.store.redis import connect, guard
from tests.certificates import Authority, Papers

pytestmark = pytest.mark.redis


@contextlib.contextmanager
def running(folder: Path, settings: str, *arguments: str) -> Iterator[None]:
    file = folder / f"{free_port()}.conf"
    file.write_text(settings)
    process = Child([find_server(), str(file), *arguments], output=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(5)


async def answers(url: str) -> bool:
    client = connect(url)
    try:
        return bool(await guard(client.ping()))
    except UnavailableError:
        return False
    finally:
        await client.aclose()


async def test_sentinels_and_servers_have_passwords_of_their_own(tmp_path: Path) -> None:
    master, sentinel = free_port(), free_port()
    common = f'dir "{tmp_path}"\nbind 127.0.0.1 ::1\n'
    with (
        running(tmp_path, f"{common}port {master}\nrequirepass one\nsave ''\n"),
        running(
            tmp_path,
            f"{common}port {sentinel}\nrequirepass t&w@o\nsentinel monitor main 127.0.0.1 {master} 1\n"
            "sentinel auth-pass main one\n",
            "--sentinel",
        ),
    ):
        url = f"sentinel://:one@[::1]:{sentinel}/main?sentinel_password=t%26w%40o"
        end_s = time.monotonic() + 20
        while not await answers(url):
            assert time.monotonic() < end_s
        assert not await answers(f"sentinel://:one@[::1]:{sentinel}/main")
        assert not await answers(f"sentinel://:other@[::1]:{sentinel}/main?sentinel_password=t%26w%40o")
        assert await answers(f"redis://:one@[::1]:{master}/0")


@contextlib.asynccontextmanager
async def behind_tls(papers: Papers, port: int, target: int) -> AsyncIterator[None]:
    """A port of 127.0.0.2, which takes clients with a certificate of the CA: what the Sentinel calls master."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(papers.cert, papers.key)
    context.load_verify_locations(papers.ca)
    context.verify_mode = ssl.CERT_REQUIRED

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(65_536):
                sink.write(piece)
                await sink.drain()
        sink.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

    server = await asyncio.start_server(relay, "127.0.0.2", port, ssl=context)
    try:
        yield
    finally:
        server.close()


async def test_sentinels_and_servers_are_spoken_to_by_tls(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    papers, stranger = ours.issue("redis", "127.0.0.2", "localhost"), theirs.issue("rogue")
    elsewhere = ours.issue("elsewhere", "192.0.2.1")
    master, sentinel = free_port(), free_port()
    common = f'dir "{tmp_path}"\nbind 127.0.0.1\n'
    # The embedded server speaks no TLS: its Sentinel does not reach the master where clients do, and has to take it for
    # alive all the same.
    with (
        running(tmp_path, f"dir \"{tmp_path}\"\nbind 127.0.0.1\nport {master}\nsave ''\n"),
        running(
            tmp_path,
            f"{common}port {sentinel}\nsentinel monitor main 127.0.0.2 {master} 1\n"
            "sentinel down-after-milliseconds main 3600000\n",
            "--sentinel",
        ),
    ):
        async with behind_tls(papers, master, master), behind_tls(papers, sentinel, sentinel):
            at = f"sentinels://127.0.0.2:{sentinel}/main"
            mine = f"ssl_certfile={papers.cert}&ssl_keyfile={papers.key}"
            good = f"{at}?ssl_ca_certs={papers.ca}&{mine}"
            assert await answers(good)
            for url in (
                f"{at}?{mine}",
                f"{at}?ssl_ca_certs={stranger.ca}&{mine}",
                f"{at}?ssl_ca_certs={papers.ca}",
                f"{at}?ssl_ca_certs={papers.ca}&ssl_certfile={stranger.cert}&ssl_keyfile={stranger.key}",
                good.replace("sentinels://", "sentinel://").partition("?")[0],
            ):
                assert not await answers(url)
        async with behind_tls(elsewhere, master, master), behind_tls(elsewhere, sentinel, sentinel):
            assert not await answers(good)
            assert await answers(f"{good}&ssl_check_hostname=false")
