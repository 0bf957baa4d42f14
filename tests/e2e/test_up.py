"""`bucketserve up` as a user runs it: a process in a terminal's place, signals, kill -9, a second one, settings."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bucketserve.client import BucketServeClient, Chunk, Finished
from bucketserve.store.embedded import free_port
from tests.certificates import Authority

pytestmark = pytest.mark.e2e

MODEL = Path(__file__).resolve().parents[2] / "models" / "demo" / "model"


class Up:
    """One launcher, and what it says."""

    def __init__(self, folder: Path, *arguments: str, stdout: int | None = None, **environ: str) -> None:
        self.port = free_port()
        self.log = folder / f"up-{self.port}.log"
        self.services = folder / f"services-{self.port}"
        command = [sys.executable, "-m", "bucketserve_cli.main", "up", "--log-dir", str(self.services)]
        if "--pool" not in arguments:
            command += ["--engine", "fake", "--model", str(MODEL)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                env={**os.environ, "BUCKETSERVE_GATEWAY_LISTEN": f"127.0.0.1:{self.port}", "COLUMNS": "200"}
                | {"BUCKETSERVE_SCHEDULER_LISTEN": f"127.0.0.1:{free_port()}"}
                | {"BUCKETSERVE_GATEWAY_HTTP_LISTEN": f"127.0.0.1:{free_port()}"}
                | environ,
                stdin=subprocess.DEVNULL,
                stdout=log if stdout is None else stdout,
                stderr=log,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text()

    def services_said(self) -> str:
        """Returns the ends of its services' logs."""
        return "\n".join(f"{log.name}:\n{log.read_text()[-4000:]}" for log in sorted(self.services.glob("*.log")))

    def children(self) -> dict[int, str]:
        """Returns its children that run, and their command lines."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == self.process.pid and state != "Z" and (command := command_of(pid)):
                    found[pid] = command
        return found

    def child(self, name: str) -> int:
        return next(pid for pid, command in self.children().items() if name in command)


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def command_of(pid: int) -> str:
    """Returns the command line of a process; nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def are_gone(pids: dict[int, str]) -> bool:
    # By command too: a number may be used again.
    return not any(command and command == command_of(pid) for pid, command in pids.items())


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    launched: list[Up] = []

    def start(*arguments: str, **options) -> Up:
        up = Up(tmp_path, *arguments, **options)
        launched.append(up)
        return up

    yield start
    for up in launched:
        children = up.children()
        up.process.kill()
        up.process.wait()
        try:
            until(lambda children=children: are_gone(children))
        except AssertionError:
            pytest.fail(f"of {children} some are left\n{up.services_said()}")


def ready(up: Up) -> Up:
    until(lambda: "Ctrl-C drains" in up.said() or up.process.poll() is not None)
    assert up.process.poll() is None, up.said()
    return up


async def generate(up: Up, max_tokens: int = 4, model: str = "") -> Finished:
    async with BucketServeClient(f"127.0.0.1:{up.port}") as client:
        async for event in client.generate(prompt="hello", max_tokens=max_tokens, ignore_eos=True, model=model):
            if isinstance(event, Finished):
                return event
    raise AssertionError("the stream had no end")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT])
def test_nothing_outlives_the_launcher(launch, how: signal.Signals) -> None:
    up = ready(launch())
    children = up.children()
    assert len(children) == 4
    up.process.send_signal(how)
    status = up.process.wait(40)
    assert status == (0 if how in (signal.SIGHUP, signal.SIGTERM) else -how)
    until(lambda: are_gone(children), 40)


def test_a_launcher_that_is_told_to_stop_while_starting_stops(launch) -> None:
    up = launch()
    until(lambda: len(up.children()) == 4)
    children = up.children()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(30) == 1
    assert "interrupted while" in up.said()
    until(lambda: are_gone(children), 5)


async def test_what_ends_is_started_again_and_the_rest_goes_on(launch) -> None:
    up = ready(launch("--workers", "2"))
    before = up.children()

    def num_running(name: str) -> int:
        return sum(name in command for command in up.children().values())

    for name in ("bucketserve_worker", "bucketserve_gateway", "bucketserve_scheduler", "valkey"):
        wanted, killed = num_running(name), up.child(name)
        os.kill(killed, signal.SIGKILL)
        until(lambda killed=killed: killed not in up.children())
        until(lambda name=name, wanted=wanted: num_running(name) == wanted)
        assert up.process.poll() is None
    assert re.search(r"worker-\d ended with status -9; it is started again", up.said())
    until(lambda: up.said().count("serves again") == 3)
    assert (await generate(up)).usage.output_tokens == 4
    assert len(up.children()) == len(before)


async def test_nobody_is_served_less_because_nobody_reads_and_the_logs_are_gone(launch) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as output:
        up = launch(stdout=writing)
        os.close(writing)
        said = b""
        while b"Ctrl-C drains" not in said:
            said += (some := output.read(65536))
            assert some, up.said()
    shutil.rmtree(up.services)
    for name in ("bucketserve_worker", "valkey"):
        killed = up.child(name)
        for folder in Path(tempfile.gettempdir()).glob("bucketserve-valkey-*"):
            # As whoever cleans up does with what is empty.
            if str(folder) in up.children()[killed]:
                folder.rmdir()
        os.kill(killed, signal.SIGKILL)
        until(
            lambda name=name, killed=killed: (
                killed not in up.children() and any(name in c for c in up.children().values())
            )
        )
    assert (await generate(up)).usage.output_tokens == 4
    assert up.process.poll() is None


async def test_a_second_signal_cuts_what_still_runs(launch) -> None:
    up = ready(launch(BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP="100000"))
    children = up.children()
    async with BucketServeClient(f"127.0.0.1:{up.port}") as client:
        stream = client.generate(prompt="hello", max_tokens=400, ignore_eos=True)
        async for event in stream:
            if isinstance(event, Chunk):
                break
        up.process.send_signal(signal.SIGINT)
        until(lambda: "draining" in up.said())
        time.sleep(1.0)
        assert up.process.poll() is None
        up.process.send_signal(signal.SIGINT)
        # Draining would take 25 s.
        assert up.process.wait(12) == 0
        await stream.aclose()
    until(lambda: are_gone(children), 30)


def test_a_port_in_use_is_named_before_anything_starts(launch) -> None:
    first = ready(launch())
    second = launch(BUCKETSERVE_GATEWAY_LISTEN=f"127.0.0.1:{first.port}")
    assert second.process.wait(30) == 1
    assert f"port {first.port} (gateway) is in use by another local stack" in second.said()
    assert "ready" not in second.said()
    assert not second.services.exists()
    assert len(first.children()) == 4


def test_a_port_of_another_program_is_named(launch) -> None:
    import socket

    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::")):
        with socket.socket(family) as other:
            other.bind((host, 0))
            other.listen()
            up = launch(BUCKETSERVE_WORKER_LISTEN=f"127.0.0.1:{other.getsockname()[1]}")
            assert up.process.wait(30) == 1
            assert f"port {other.getsockname()[1]} (worker-0) is in use by another program" in up.said()


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.partition("=")[::2] for entry in entries if entry)


def test_settings_of_the_user_win_over_the_launcher_s(launch, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[worker]\nnum_threads = 7\n[gateway]\nlame_duck_s = 0.6\n")
    metrics = f"127.0.0.1:{free_port()}"
    up = ready(
        launch(
            BUCKETSERVE_CONFIG=str(file),
            BUCKETSERVE_WORKER_METRICS_LISTEN="",
            BUCKETSERVE_SCHEDULER_METRICS_LISTEN=metrics,
            BUCKETSERVE_WORKER_MODEL_NAME="a=b, c",
            BUCKETSERVE_TELEMETRY_LOG_FORMAT="text",
        )
    )
    said = up.said()
    assert f"scheduler metrics http://{metrics}" in said
    assert "worker-0 metrics" not in said
    # What the file says isn't overruled by a variable.
    worker = environment_of(up.child("bucketserve_worker"))
    assert "BUCKETSERVE_WORKER_NUM_THREADS" not in worker
    assert worker["BUCKETSERVE_WORKER_METRICS_LISTEN"] == ""
    gateway = environment_of(up.child("bucketserve_gateway"))
    assert "BUCKETSERVE_GATEWAY_LAME_DUCK_S" not in gateway
    assert gateway["BUCKETSERVE_GATEWAY_MODELS"] == f'{{"a=b, c": "{MODEL}"}}'


POOL = f"model={MODEL},engine=fake"


async def test_pools_and_aliases_are_told_and_served(launch) -> None:
    up = ready(
        launch(
            *("--pool", f"{POOL},model_name=big,workers=2,num_threads=3", "--pool", f"{POOL},model_name=a=b"),
            *("--alias", "latest=big", "--alias", "org/small=a=b"),
        )
    )
    for line in (
        "models big, a=b",
        "pool   big: 2 workers, engine fake, num_threads 3",
        "pool   a=b: 1 worker, engine fake",
        "alias  latest: big",
        "alias  org/small: a=b",
    ):
        assert line in up.said()
    for name in ("big", "a=b", "latest", "org/small"):
        assert (await generate(up, model=name)).usage.output_tokens == 4
    assert [environment_of(pid).get("BUCKETSERVE_WORKER_NUM_THREADS") for pid in up.children()].count("3") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pool", POOL, "--workers", "2"], "--workers and --pool can't be given together"),
        (["--pool", f"{POOL},role=decode"], "prefill workers need a decode worker"),
        (["--pool", POOL, "--pool", "engine=fake,model=/elsewhere"], "pools of model 'demo' are of"),
        (["--pool", f"{POOL},engin=fake"], "engin: no such setting"),
        (["--pool", f"{POOL},listen=127.0.0.1:1"], "listen is for a single process"),
        (["--alias", "demo=demo"], "'demo' is a model's own name"),
        (["--alias", "a=b"], "'a' is for 'b', which is no model here; served: demo"),
        (["--alias", "a=demo", "--alias", "a=demo"], "--alias 'a' is given twice"),
        (["--alias", "a"], "--alias 'a': write NAME=MODEL"),
    ],
)
def test_pools_and_aliases_that_are_none_are_said_before_anything_starts(
    launch, arguments: list[str], said: str
) -> None:
    up = launch(*arguments)
    assert up.process.wait(60) in (1, 2)
    assert said in " ".join(up.said().split())
    assert "Traceback" not in up.said()
    assert not up.services.exists()


@pytest.mark.parametrize("host", ["[::1]", "[::]"])
async def test_a_stack_may_live_on_ipv6_alone(launch, host: str) -> None:
    # What listens on all addresses is reached at one of them.
    reached = "[::1]"
    delivery = free_port()
    names = ("GATEWAY", "GATEWAY_HTTP", "SCHEDULER", "WORKER", "GATEWAY_METRICS", "WORKER_METRICS")
    environ = {f"BUCKETSERVE_{name}_LISTEN": f"{host}:{free_port()}" for name in names}
    scheduler = environ["BUCKETSERVE_SCHEDULER_LISTEN"].replace(host, reached)
    up = ready(
        launch(
            **environ,
            BUCKETSERVE_GATEWAY_DELIVERY_LISTEN=f"{host}:{delivery}",
            BUCKETSERVE_GATEWAY_DELIVERY_ADDRESS=f"{reached}:{delivery}",
            BUCKETSERVE_GATEWAY_SCHEDULER_ADDRESS=scheduler,
            BUCKETSERVE_WORKER_SCHEDULER_ADDRESS=scheduler,
        )
    )
    async with BucketServeClient(environ["BUCKETSERVE_GATEWAY_LISTEN"].replace(host, reached)) as client:
        events = [event async for event in client.generate(prompt="hello", max_tokens=4, ignore_eos=True)]
    assert isinstance(events[-1], Finished)
    for name in ("gateway", "worker-0"):
        assert f"{name} metrics http://" in up.said()
    http = environ["BUCKETSERVE_GATEWAY_HTTP_LISTEN"].replace(host, reached)
    assert "OpenAI API http://" in up.said()
    with urllib.request.urlopen(f"http://{http}/health", timeout=10) as answer:
        assert json.load(answer) == {"status": "SERVING"}


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"BUCKETSERVE_WORKER_NUM_THREAD": "1"}, "BUCKETSERVE_WORKER_NUM_THREAD: no such setting"),
        ({"BUCKETSERVE_WORKER_LISTEN": "127.0.0.1:1"}, "2 workers can't share it"),
        ({"BUCKETSERVE_SCHEDULER_REDIS_URL": "http://me:hunter2@x"}, "BUCKETSERVE_SCHEDULER_REDIS_URL: begin with"),
    ],
)
def test_wrong_settings_are_said_before_anything_starts(launch, environ: dict[str, str], said: str) -> None:
    up = launch("--workers", "2", **environ)
    assert up.process.wait(30) in (1, 2)
    assert said in up.said()
    assert "hunter2" not in up.said()
    assert not up.services.exists()


def test_addresses_are_told_as_they_are_reached(launch, tmp_path: Path) -> None:
    papers = Authority(tmp_path / "ours").issue("service").environ()
    up = ready(launch(**papers, BUCKETSERVE_TLS_METRICS="tls"))
    assert "OpenAI API https://" in up.said()
    assert "gateway metrics https://" in up.said()
