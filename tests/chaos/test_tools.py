"""What the chaos test itself stands on: relays, clocks, and what explains a wait."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bucketserve.engine.native.compiler import KernelBuildError
from tests.chaos.clocks import Clocks
from tests.chaos.faults import Faults, Interval
from tests.chaos.proxy import Relay
from tests.listening import until_closed


@contextlib.asynccontextmanager
async def echo():
    """Yields the address of a server that answers with what it gets."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(100):
                writer.write(data)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with until_closed(server):
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def is_silent(reader: asyncio.StreamReader) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.1):
            await reader.read(1)
            return False
    return True


@pytest.mark.parametrize("direction", ["there", "back"])
async def test_a_direction_that_is_stopped_holds_what_comes_and_goes_on_with_it(direction: str) -> None:
    async with echo() as address:
        relay = Relay(address)
        await relay.start()
        reader, writer = await asyncio.open_connection(*relay.address.split(":"))
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        getattr(relay, direction).clear()
        writer.write(b"b")
        assert await is_silent(reader)
        relay.resume()
        assert await reader.readexactly(1) == b"b"
        relay.is_refusing = True
        relay.cut()
        again, writer_again = await asyncio.open_connection(*relay.address.split(":"))
        for refused in (reader, again):
            with contextlib.suppress(ConnectionResetError):
                assert await refused.read(1) == b""
        writer.close()
        writer_again.close()
        await relay.close()


def test_a_clock_is_stepped_while_the_process_runs_and_what_it_showed_is_put_right(tmp_path: Path) -> None:
    try:
        clocks = Clocks(tmp_path, ["a"])
    except KernelBuildError:
        pytest.skip("no compiler")
    show = "import sys, time\nfor _ in sys.stdin: print(time.time(), time.monotonic(), flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", show], env=clocks.environ("a"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        shown, true = [], []
        for offset_s in (0.0, 3000.0, -3000.0, 0.0):
            clocks.step("a", offset_s)
            true.append(time.time())
            process.stdin.write("\n")
            process.stdin.flush()
            wall_s, monotonic_s = map(float, process.stdout.readline().split())
            assert wall_s == pytest.approx(time.time() + offset_s, abs=5)
            assert monotonic_s == pytest.approx(time.monotonic(), abs=5)
            shown.append(wall_s)
        process.stdin.close()
    assert list(map(clocks.reader("a"), shown)) == pytest.approx(true, abs=5)


def test_a_wait_is_explained_by_what_lasted_as_long_and_by_nothing_else() -> None:
    faults = Faults(site=None, seed=1)  # type: ignore[arg-type]
    faults.intervals = [
        Interval("long", 100.0, 5.0, ended_s=120.0),
        Interval("moment", 130.0, 0.0, ended_s=130.0),
        Interval("first", 200.0, 5.0, ended_s=208.0),
        Interval("second", 213.5, 0.0, ended_s=220.0),
    ]
    assert faults.excuses(99.0, 126.0)
    assert faults.excuses(199.5, 220.5)
    # It began long before, or went on long after; a moment explains nothing.
    assert not faults.excuses(95.0, 112.0)
    assert not faults.excuses(110.0, 130.0)
    assert not faults.excuses(122.0, 140.0)
