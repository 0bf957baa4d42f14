"""Sentinels on IPv6, with a password of their own that is not that of the servers."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bucketserve.children import Child
from bucketserve.core.errors import UnavailableError
from bucketserve.store.embedded import find_server, free_port
from bucketserve.store.redis import connect, guard

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
