"""Peers as processes: each in its own virtual environment, loaded once, stopped (SIGSTOP) while it is not measured."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from bucketserve.store.embedded import free_port

HERE = Path(__file__).resolve().parent
LOAD_S = 900.0
"""vLLM compiles at its first start."""
SETTLE_S = 1.0
"""Between waking a peer and measuring it: threads and heartbeats find their feet again."""
MODEL_NAME = "reference"


class PeerError(Exception):
    """A peer ended, or did not answer in time; says where its log is."""


def environ_of(peers: Path, engine: str) -> dict[str, str]:
    """Returns the environment in which an engine is as fast as it can be.

    vLLM's CPU build wants its cores bound, and tcmalloc and its OpenMP preloaded.
    """
    cores = os.cpu_count() or 1
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(cores)}
    if engine == "vllm":
        preload = [*peers.glob("tcmalloc/**/libtcmalloc_minimal.so.4"), peers / "vllm" / "lib" / "libiomp5.so"]
        environ |= {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "LD_PRELOAD": ":".join(str(path) for path in preload if path.exists()),
        }
    return environ


def python_of(peers: Path, engine: str) -> Path:
    """Returns the interpreter of an engine's virtual environment."""
    return peers / ("vllm" if engine == "vllm" else "transformers") / "bin" / "python"


class PeerProcess:
    """A process group of ours that answers lines with lines."""

    def __init__(self, name: str, command: list[str | Path], environ: dict[str, str], log: Path) -> None:
        """Starts it."""
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environ,
                start_new_session=True,
                text=True,
            )

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def has_ended(self) -> bool:
        """Whether it runs no more."""
        return self._process.poll() is not None

    def go(self) -> None:
        """Wakes it."""
        self._signal(signal.SIGCONT)
        time.sleep(SETTLE_S)

    def halt(self) -> None:
        """Stops it and its children."""
        self._signal(signal.SIGSTOP)

    def ask(self, line: str, timeout_s: float) -> str:
        """Returns its answer to a line.

        Raises:
            PeerError: it ended, or did not answer in time.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self.answer(timeout_s)

    def answer(self, timeout_s: float) -> str:
        """Returns its next line.

        Raises:
            PeerError: it ended, or there was none in time.
        """
        assert self._process.stdout is not None
        # One line answers one line, so nothing waits in the reader's buffer.
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            raise PeerError(f"did not finish in {timeout_s:.0f} s")
        if not (line := self._process.stdout.readline()):
            raise PeerError(f"ended; see {self.log}")
        return line

    def close(self) -> None:
        """Ends it and its children."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


class OfflinePeer(PeerProcess):
    """benchmarks/peers/offline.py with one engine."""

    def __init__(
        self, engine: str, dtype: str, *, peers: Path, model: Path, requests: Path, kv_tokens: int | None, logs: Path
    ) -> None:
        """Returns once it is loaded, warm and stopped.

        Raises:
            PeerError: it ended, or took too long to load.
        """
        command: list[str | Path] = [python_of(peers, engine), HERE / "offline.py", engine]
        command += ["--model", model, "--dtype", dtype, "--requests", requests]
        command += [] if kv_tokens is None else ["--kv-tokens", str(kv_tokens)]
        log = logs / f"{engine}-{dtype}.log"
        super().__init__(f"{engine} {dtype}", command, environ_of(peers, engine), log)
        try:
            self.answer(LOAD_S)
        except PeerError:
            self.close()
            raise
        self.halt()

    def run(self, timeout_s: float) -> tuple[float, int, list[float]]:
        """Runs the requests once; returns seconds, output tokens, and seconds to first tokens if the engine says them.

        Raises:
            PeerError: it ended, or did not finish in time.
        """
        self.go()
        answer = json.loads(self.ask("go", timeout_s))
        self.halt()
        return answer["seconds"], answer["output_tokens"], answer["ttfts_s"]


class VllmServer(PeerProcess):
    """vLLM's OpenAI server on a free port of 127.0.0.1, without a tokenizer: prompts are token ids."""

    def __init__(self, dtype: str, *, peers: Path, model: Path, kv_tokens: int | None, logs: Path) -> None:
        """Returns once it answers.

        Raises:
            PeerError: it ended, or took too long to load.
        """
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command: list[str | Path] = [python_of(peers, "vllm"), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", model, "--served-model-name", MODEL_NAME, "--dtype", dtype]
        command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--max-num-seqs", "64"]
        command += ["--skip-tokenizer-init", "--no-enable-prefix-caching"]
        if kv_tokens is not None:
            # As in offline.py.
            command += ["--block-size", "32", "--num-gpu-blocks-override", str(kv_tokens // 32 + 1)]
        command += ["--disable-log-stats", "--disable-uvicorn-access-log"]
        log = logs / f"vllm-server-{dtype}.log"
        # It writes its log to standard output as well.
        shell: list[str | Path] = ["/bin/sh", "-c", 'exec "$0" "$@" 1>&2', *command]
        super().__init__(f"vllm-server {dtype}", shell, environ_of(peers, "vllm"), log)
        deadline_s = time.monotonic() + LOAD_S
        while not self._is_healthy():
            if self.has_ended or time.monotonic() > deadline_s:
                self.close()
                raise PeerError(f"the server did not start; see {self.log}")
            time.sleep(0.5)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False


class VllmClient(PeerProcess):
    """benchmarks/peers/client.py: it only waits while nothing is asked of it."""

    def __init__(self, server: VllmServer, *, peers: Path, logs: Path) -> None:
        """Returns once it is ready."""
        command: list[str | Path] = [python_of(peers, "vllm"), HERE / "client.py"]
        command += ["--url", server.url, "--model", MODEL_NAME]
        super().__init__("client", command, {**os.environ}, logs / "vllm-client.log")
        self.answer(60.0)

    def run(self, plan: list[dict[str, Any]], timeout_s: float) -> dict[str, Any]:
        """Sends arrivals; returns outcomes and seconds.

        Raises:
            PeerError: it ended, or did not finish in time.
        """
        answer: dict[str, Any] = json.loads(self.ask(json.dumps(plan), timeout_s))
        return answer
