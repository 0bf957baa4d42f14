"""How a service's process ends when it is told to: whatever hangs in it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SERVICE = """
import asyncio, sys, threading, time
from bucketserve import process

process.END_S = {end_s}

async def main(stop):
    print("ready", flush=True)
    {body}

sys.exit(process.run_service(main, {drain_s}))
"""
DEAF = """
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass
"""
HANGS = {
    "a task that swallows its cancellation": DEAF,
    "an event loop that is busy for ever": "while True: pass",
    "an event loop that waits for ever": "time.sleep(600)",
    "a thread that goes on": "threading.Thread(target=time.sleep, args=[600]).start(); await stop.wait()",
    "a thread that the loop waits for": "asyncio.get_running_loop().run_in_executor(None, time.sleep, 600)\n"
    "    await stop.wait()",
    "what is run at exit": "import atexit; atexit.register(time.sleep, 600); await stop.wait()",
}


def start(body: str, *, end_s: float, drain_s: float = 0.0) -> subprocess.Popen[str]:
    code = SERVICE.format(body=body, end_s=end_s, drain_s=drain_s)
    service = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert service.stdout is not None
    assert service.stdout.readline() == "ready\n"
    return service


@pytest.mark.parametrize("body", HANGS.values(), ids=HANGS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_hangs_ends_all_the_same_and_says_where_it_was(body: str, number: signal.Signals) -> None:
    service = start(body, end_s=0.5)
    service.send_signal(number)
    _, said = service.communicate(timeout=60)
    assert service.returncode == -signal.SIGALRM
    assert "most recent call first" in said


@pytest.mark.parametrize("body", ["await stop.wait()", "await stop.wait(); await asyncio.sleep(1)"])
def test_what_ends_within_its_time_ends_well(body: str) -> None:
    service = start(body, end_s=0.5, drain_s=50.0)
    service.send_signal(signal.SIGTERM)
    _, said = service.communicate(timeout=60)
    assert (service.returncode, said) == (0, "")


def test_a_second_signal_cuts_what_drains() -> None:
    body = "await stop.wait(); print('drains', flush=True); await asyncio.sleep(600)"
    service = start(body, end_s=50.0, drain_s=600.0)
    service.send_signal(signal.SIGTERM)
    assert service.stdout is not None
    assert service.stdout.readline() == "drains\n"
    service.send_signal(signal.SIGTERM)
    service.communicate(timeout=60)
    assert service.returncode == 1


def test_a_second_signal_shortens_what_hangs() -> None:
    service = start(f"await stop.wait(); print('drains', flush=True){DEAF}", end_s=0.5, drain_s=600.0)
    service.send_signal(signal.SIGTERM)
    assert service.stdout is not None
    assert service.stdout.readline() == "drains\n"
    service.send_signal(signal.SIGTERM)
    service.communicate(timeout=60)
    assert service.returncode == -signal.SIGALRM


def test_what_is_ignored_stays_ignored() -> None:
    """Under nohup the end of the terminal is no reason to stop."""
    code = SERVICE.format(body="await stop.wait()", end_s=0.5, drain_s=0.0)
    ignoring = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); exec({code!r})"
    service = subprocess.Popen(
        [sys.executable, "-c", ignoring], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert service.stdout is not None
    assert service.stdout.readline() == "ready\n"
    service.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        service.wait(1.5)
    service.send_signal(signal.SIGTERM)
    assert service.wait(60) == 0
    service.communicate()


def test_what_a_failed_start_held_goes_before_the_interpreter() -> None:
    code = """
import sys
from bucketserve import process
from bucketserve.core.errors import ModelLoadError

class Server:
    # As one of gRPC, which has lines of its own to say where it goes with the interpreter.
    def __del__(self):
        if sys.is_finalizing():
            print("I was forgotten", file=sys.stderr)

async def main(stop):
    server = Server()
    raise ModelLoadError("no such model")

sys.exit(process.run_service(main, 0.0))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (2, "error: no such model\n")
