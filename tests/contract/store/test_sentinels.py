"""Sentinels on IPv6, with a password of their own that is not that of the servers, and behind TLS."""

from __future__ import annotations

import contextlib
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
from tests.tls_relay import behind_tls

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


@contextlib.contextmanager
def watched(
    folder: Path, bind: str, *, of_master: str = "", of_sentinel: str = "", master_at: str = "127.0.0.1"
) -> Iterator[tuple[int, int]]:
    """A server and a Sentinel that calls it main, with further settings of each; yields their ports."""
    master, sentinel = free_port(), free_port()
    common = f'dir "{folder}"\nbind {bind}\n'
    monitor = f"sentinel monitor main {master_at} {master} 1\n"
    with (
        running(folder, f"{common}port {master}\nsave ''\n{of_master}"),
        running(folder, f"{common}port {sentinel}\n{monitor}{of_sentinel}", "--sentinel"),
    ):
        yield master, sentinel


async def answers(url: str) -> bool:
    client = connect(url)
    try:
        return bool(await guard(client.ping()))
    except UnavailableError:
        return False
    finally:
        await client.aclose()


async def until_it_answers(url: str) -> None:
    """Servers have just been started."""
    end_s = time.monotonic() + 30
    while not await answers(url):
        assert time.monotonic() < end_s


async def test_sentinels_and_servers_have_passwords_of_their_own(tmp_path: Path) -> None:
    settings = {"of_master": "requirepass one\n", "of_sentinel": "requirepass t&w@o\nsentinel auth-pass main one\n"}
    with watched(tmp_path, "127.0.0.1 ::1", **settings) as (master, sentinel):
        url = f"sentinel://:one@[::1]:{sentinel}/main?sentinel_password=t%26w%40o"
        await until_it_answers(url)
        assert not await answers(f"sentinel://:one@[::1]:{sentinel}/main")
        assert not await answers(f"sentinel://:other@[::1]:{sentinel}/main?sentinel_password=t%26w%40o")
        assert await answers(f"redis://:one@[::1]:{master}/0")


async def test_sentinels_and_servers_are_spoken_to_by_tls(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    papers, stranger = ours.issue("redis", "127.0.0.2", "localhost"), theirs.issue("rogue")
    elsewhere = ours.issue("elsewhere", "192.0.2.1")
    # The embedded server speaks no TLS: its Sentinel does not reach the master where clients do, and has to take it for
    # alive all the same.
    settings = {"of_sentinel": "sentinel down-after-milliseconds main 3600000\n", "master_at": "127.0.0.2"}
    with watched(tmp_path, "127.0.0.1", **settings) as (master, sentinel):

        @contextlib.asynccontextmanager
        async def in_front(papers: Papers) -> AsyncIterator[None]:
            """Where the Sentinel says that the master is."""
            async with (
                behind_tls(papers, master, host="127.0.0.2", port=master),
                behind_tls(papers, sentinel, host="127.0.0.2", port=sentinel),
            ):
                yield

        async with in_front(papers):
            at = f"sentinels://127.0.0.2:{sentinel}/main"
            mine = f"ssl_certfile={papers.cert}&ssl_keyfile={papers.key}"
            good = f"{at}?ssl_ca_certs={papers.ca}&{mine}"
            await until_it_answers(good)
            for url in (
                f"{at}?{mine}",
                f"{at}?ssl_ca_certs={stranger.ca}&{mine}",
                f"{at}?ssl_ca_certs={papers.ca}",
                f"{at}?ssl_ca_certs={papers.ca}&ssl_certfile={stranger.cert}&ssl_keyfile={stranger.key}",
                good.replace("sentinels://", "sentinel://").partition("?")[0],
            ):
                assert not await answers(url)
        async with in_front(elsewhere):
            assert not await answers(good)
            assert await answers(f"{good}&ssl_check_hostname=false")
