"""SIGTERM while a service starts: it ends at once with status 0, also as the first process of a container."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bucketserve.store.embedded import free_port

pytestmark = pytest.mark.e2e

MODEL = Path(__file__).resolve().parents[2] / "models" / "demo" / "model"
SERVICES = ("gateway", "scheduler", "worker")
# A process that ignores what is not handled, as the first one of a container does.
AS_FIRST = ["unshare", "--pid", "--fork", "--kill-child"]


def start(service: str, *, prefix: tuple[str, ...] = (), **environ: str) -> subprocess.Popen[bytes]:
    name = f"BUCKETSERVE_{service.upper()}"
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", f"bucketserve_{service}"],
        env={
            **os.environ,
            f"{name}_LISTEN": f"127.0.0.1:{free_port()}",
            f"{name}_METRICS_LISTEN": "",
            "BUCKETSERVE_GATEWAY_HTTP_LISTEN": "",
            "BUCKETSERVE_GATEWAY_DELIVERY_LISTEN": f"127.0.0.1:{free_port()}",
            "BUCKETSERVE_GATEWAY_MODELS": f"demo={MODEL}",
            "BUCKETSERVE_SCHEDULER_REDIS_URL": "memory://",
            "BUCKETSERVE_WORKER_MODEL": str(MODEL),
            "BUCKETSERVE_TELEMETRY_LOG_FORMAT": "json",
        }
        | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("service", SERVICES)
def test_a_signal_during_imports_ends_a_service(service: str, number: signal.Signals) -> None:
    process = start(service)
    # Well after the first line and well before the imports are over, on any machine that takes a second for them.
    wait_for_handler(process.pid, number)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (0, b"")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs the right to make a namespace")
@pytest.mark.parametrize("service", SERVICES)
def test_a_signal_during_imports_ends_a_container_s_first_process(service: str) -> None:
    outer = start(service, prefix=tuple(AS_FIRST))
    inner = first_child(outer.pid)
    wait_for_handler(inner, signal.SIGTERM)
    os.kill(inner, signal.SIGTERM)
    output, _ = outer.communicate(timeout=20)
    assert (outer.returncode, output) == (0, b"")


@pytest.mark.parametrize("service", ["gateway", "worker"])
def test_a_signal_while_a_model_loads_ends_a_service(service: str, tmp_path: Path) -> None:
    process = start(service, BUCKETSERVE_CACHE=str(tmp_path))
    assert process.stdout is not None
    lines = b""
    while b"model.loading" not in lines:
        line = process.stdout.readline()
        assert line, lines
        lines += line
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0


def wait_for_handler(pid: int, number: signal.Signals) -> None:
    """Waits until the process handles a signal, which is long before its imports are over."""
    end_s = time.monotonic() + 20
    while time.monotonic() < end_s:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        # Python itself handles SIGINT from the start: the others say that ours are there.
        if caught & 1 << (signal.SIGTERM - 1) and caught & 1 << (signal.SIGHUP - 1):
            return
        time.sleep(0.002)
    raise AssertionError(f"no handler for {number.name}")


def first_child(pid: int) -> int:
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s:
        if children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            return int(children[0])
        time.sleep(0.002)
    raise AssertionError("no child")


def test_a_gateway_has_no_torch_in_its_memory() -> None:
    process = start("gateway")
    try:
        assert process.stdout is not None
        while b"gateway.ready" not in process.stdout.readline():
            assert process.poll() is None
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        assert pages * os.sysconf("SC_PAGE_SIZE") < 200 * 2**20
    finally:
        process.kill()
        process.communicate()
