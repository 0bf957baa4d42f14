"""The command line as its users have it: a process with pipes, signals and other people's files. And the README."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bucketserve import __version__
from bucketserve_cli.stack import LocalStack
from tests.cli import run_command
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, metric, status

pytestmark = pytest.mark.e2e

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
BUCKETSERVE = [sys.executable, "-m", "bucketserve_cli.main"]
SLOW = {"BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "5000"}


def as_process(*arguments: str, stdin: bytes = b"", cwd: Path | None = None, **environ: str) -> tuple[int, str, str]:
    """Returns exit status, standard output and standard error."""
    environ = {**os.environ, **environ}
    done = subprocess.run(
        [*BUCKETSERVE, *arguments], input=stdin, capture_output=True, timeout=120, check=False, env=environ, cwd=cwd
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def checked(ended: tuple[int, str, str], status: int = 0) -> tuple[str, str]:
    """Returns standard output and standard error of a command that ended with that status."""
    code, out, err = ended
    assert code == status, (out, err)
    assert "Traceback" not in err
    # Nobody's terminal: nothing that only a terminal understands.
    assert "\x1b" not in out + err
    if status:
        assert re.fullmatch(r"error: [^\n]*\n", err), err
    return out, err


def bucketserve(*arguments: str, status: int = 0) -> tuple[str, str]:
    """Returns standard output and standard error of a command that ends with that status."""
    return checked(run_command(*arguments), status)


def test_the_readme_runs_as_pasted_and_the_command_line_keeps_its_word(new_stack: NewStack, tmp_path: Path) -> None:
    stack = new_stack(environ=SLOW)
    at = ("--address", stack.gateway_address)
    _runs_the_readme(stack, tmp_path)
    _generates(at)
    _chats(stack, at)
    _breaks_off(at)
    _reads_and_writes_files(at, tmp_path)
    _shows_tables(stack, at, tmp_path)


def _runs_the_readme(stack: LocalStack, tmp_path: Path) -> None:
    commands = re.findall(r"(?:^    \.venv/bin/|`)(bucketserve [^`#\n]*)", README, re.MULTILINE)
    ran = set()
    (tmp_path / "requests.jsonl").write_text('{"prompt": "And the king said", "max_tokens": 4}\n')
    for command in commands:
        _, name, *arguments = shlex.split(command)
        address = {"generate": stack.gateway_address, "status": stack.scheduler_address, "job": stack.gateway_address}
        if name in address:
            checked(as_process(name, *arguments, "--address", address[name], cwd=tmp_path))
            ran.add(name)
        elif name == "sim" and arguments:
            # As pasted it takes half a minute: with fewer requests the same.
            bucketserve(name, *arguments, "--requests", "200", "--span", "0")
            ran.add(name)
        else:
            # Tests of their own run the stack, the demo and the load generator.
            assert name in ("up", "sim", "bench"), command
    assert ran == {"generate", "status", "job", "sim"}
    for snippet in re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        assert "127.0.0.1:50051" in snippet
        file = tmp_path / "snippet.py"
        file.write_text(snippet.replace("127.0.0.1:50051", stack.gateway_address))
        done = subprocess.run([sys.executable, str(file)], capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout


def _generates(at: tuple[str, ...]) -> None:
    out, err = bucketserve("generate", "x", "--max-tokens", "3", *at)
    assert out.endswith("\n")
    assert re.search(r"length: \d+ prompt \+ 3 output tokens.*, bucket \[\d+, \d+\)", err)
    assert checked(as_process("generate", "-", "--max-tokens", "3", *at, stdin=b"x"))[0] == out
    whole, err = bucketserve("generate", "x", "--max-tokens", "3", "--json", *at)
    found = json.loads(whole)
    assert (found["text"] + "\n", len(found["token_ids"]), found["finish_reason"], err) == (out, 3, "length", "")
    assert found["usage"]["output_tokens"] == 3 and found["batch"]["num_requests"] == 1
    assert bucketserve("generate", "x", "--model", "nobody", "--json", *at, status=1)[0] == ""
    assert bucketserve("--version")[0] == f"bucketserve {__version__}\n"
    _, err = checked(as_process("generate", "-", *at, stdin=b"Gr\xf6\xdfe"), 2)
    assert "standard input is not UTF-8" in err
    _, err = bucketserve("generate", "x", "--model", "[/nobody]", *at, status=1)
    assert "UNKNOWN_MODEL: unknown model '[/nobody]'; served: demo" in err
    _, err = bucketserve("generate", "x", "--max-tokens", "99999", "--stop", "", *at, status=1)
    assert "stopping.stop_strings[0]: " in err
    _, err = bucketserve("generate", "x", "--timeout", "0.2", "--max-tokens", "500", *at, status=1)
    assert "DEADLINE" in err
    _, err = bucketserve("generate", "x", "--address", "127.0.0.1:1", status=1)
    assert "Connection refused" in err


def _chats(stack: LocalStack, at: tuple[str, ...]) -> None:
    lines = b"Who was Noah?\nAnd who was Moses?\n"
    out, _ = checked(as_process("chat", "--max-tokens", "4", *at, stdin=lines))
    assert out.count("\n") >= 2
    again, _ = checked(as_process("chat", "--max-tokens", "4", "--system", "Be brief.", *at, stdin=lines))
    assert again != out
    _, err = checked(as_process("chat", "--model", "nobody", *at, stdin=lines), 1)
    assert "served: demo" in err
    for is_terminal in (False, True):
        _stops_an_answer(stack, at, is_terminal=is_terminal)


def _stops_an_answer(stack: LocalStack, at: tuple[str, ...], *, is_terminal: bool) -> None:
    """Ctrl-C ends the answer; the next line has one too, and the program ends when it is told to."""
    ours, theirs = os.openpty() if is_terminal else os.pipe()[::-1]
    process = subprocess.Popen(
        [*BUCKETSERVE, "chat", "--max-tokens", "1500", *at],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    with process, contextlib.ExitStack() as ends:
        ends.callback(process.kill)
        _stops(stack, process, ours)
    os.close(ours)


def _stops(stack: LocalStack, process: subprocess.Popen[bytes], keyboard: int) -> None:
    assert process.stdout is not None
    out = process.stdout.fileno()

    def num_open() -> float:
        return metric(stack, "gateway", "bucketserve_gateway_open_requests")

    def num_asked() -> float:
        return metric(stack, "gateway", "bucketserve_gateway_requests_total") + num_open()

    def read_answer(line: bytes) -> None:
        """Waits for some of it; a prompt is none. One may end by itself with hardly a letter: then more is asked."""
        before, seen = num_asked(), b""
        os.write(keyboard, line)
        asyncio.run(eventually(lambda: num_asked() > before))
        while len(seen.replace(b"> ", b"")) < 3:
            if select.select([out], [], [], 1.0)[0]:
                letter = os.read(out, 1)
                assert letter, "it has ended"
                seen += letter
            elif not num_open():
                os.write(keyboard, b"more\n")

    for line in (b"one\n", b"two\n"):
        read_answer(line)
        process.send_signal(signal.SIGINT)
    os.write(keyboard, b"/quit\n")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, b"Traceback" in err) == (0, False), err


def _breaks_off(at: tuple[str, ...]) -> None:
    command = shlex.join([*BUCKETSERVE, "generate", "x", "--max-tokens", "100", *at])
    done = subprocess.run(["bash", "-c", f"{command} | head -c 1"], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0
    assert len(done.stdout) == 1
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr
    process = subprocess.Popen(
        [*BUCKETSERVE, "generate", "x", "--max-tokens", "1500", *at], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"")


def _reads_and_writes_files(at: tuple[str, ...], tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    # Unicode's other line ends are text; a mark at the beginning and carriage returns at line ends are fine.
    prompts = ["a\u2028b", "c\x85d", "e\x0bf", "g\u2029h", "i\x1cj"]
    lines = [
        json.dumps({"custom_id": str(i), "prompt": prompt, "max_tokens": 2, "stop": "thee"}, ensure_ascii=False)
        for i, prompt in enumerate(prompts)
    ]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    job_id = bucketserve("job", "submit", str(file), "--wait", *at)[0].split()[0]
    printed, _ = bucketserve("job", "results", job_id, *at)
    rows = [json.loads(line) for line in printed.encode().splitlines()]
    assert [row["custom_id"] for row in rows] == ["0", "1", "2", "3", "4"]
    out.write_text("kept")
    out.chmod(0o640)
    _, err = bucketserve("job", "results", "no-such-job", "-o", str(out), *at, status=1)
    assert "no-such-job" in err
    assert out.read_text() == "kept"
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    bucketserve("job", "results", job_id, "-o", str(link), *at)
    assert out.read_text() == printed
    assert (out.stat().st_mode & 0o777, link.is_symlink()) == (0o640, True)
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out.jsonl"]
    assert checked(as_process("job", "results", job_id, "-o", "/dev/stdout", *at))[0] == printed
    state = {"job_id": job_id, "state": "completed", "num_requests": 5, "num_done": 5, "num_failed": 0}
    for command in (("status", job_id), ("status", job_id, "--watch"), ("cancel", job_id)):
        assert state.items() <= json.loads(bucketserve("job", *command, "--json", *at)[0]).items()
    submitted = json.loads(bucketserve("job", "submit", str(file), "--json", *at)[0])
    waited = json.loads(bucketserve("job", "submit", str(file), "--json", "--wait", *at)[0])
    assert submitted["num_requests"] == waited["num_done"] == 5
    # A request that fails shows in the status of who waited for it.
    file.write_text(json.dumps({"token_ids": [5] * 2047, "max_tokens": 100}))
    code, out_, _ = run_command("job", "submit", str(file), "--wait", *at)
    assert (code, "completed" in out_) == (1, True)
    # What the server finds wrong is named by line, too.
    file.write_text('{"prompt": "x"}\n\n{"prompt": "x", "temperature": -1}\n')
    _, err = bucketserve("job", "submit", str(file), *at, status=2)
    assert f"{file}:3: sampling.temperature: " in err
    wrong = {
        "not JSON": "{",
        'no list "requests"': "[]",
        "requests[1] has no prompt_ids": '{"requests": [{"prompt_ids": [1], "output_len": 1}, {"prompt_ids": "1"}]}',
    }
    for said, content in wrong.items():
        file.write_text(content)
        assert said in bucketserve("bench", "--requests", str(file), *at, status=2)[1]
    assert "served: demo" in bucketserve("bench", "--model", "x", *at, status=1)[1]


def _shows_tables(stack: LocalStack, at: tuple[str, ...], tmp_path: Path) -> None:
    out, _ = bucketserve("status", "--address", stack.scheduler_address)
    assert re.search(r"worker +role .* report age *\n", out)
    (model,) = json.loads(bucketserve("status", "--json", "--address", stack.scheduler_address)[0])["models"]
    assert (model["model"], model["workers"][0]["worker_id"]) == ("demo", "worker-0")
    assert model["workers"][0]["report"]["kv_total_tokens"] > 0
    # Narrow: lines are broken, nothing is cut away.
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "x", "max_tokens": 1}')
    job_id = bucketserve("job", "submit", str(file), *at)[0].strip()
    for command in (("job", "status", job_id, *at), ("status", "--address", stack.scheduler_address)):
        narrow, _ = checked(as_process(*command, COLUMNS="40"))
        assert max(map(len, narrow.splitlines())) <= 40
        assert "…" not in narrow


def test_status_finds_the_scheduler_that_leads(new_stack: NewStack) -> None:
    stack = new_stack(num_schedulers=2)
    bucketserve("generate", "x", "--max-tokens", "1", "--address", stack.gateway_address)
    asyncio.run(status(stack))
    outs, errs = [], []
    for address in stack.scheduler_addresses:
        code, out, err = run_command("status", "--address", address)
        (errs if code else outs).append(out + err)
    assert len(outs) == len(errs) == 1
    assert "model demo" in outs[0]
    assert "standby" in errs[0]
    for order in (1, -1):
        both = [word for address in stack.scheduler_addresses[::order] for word in ("--address", address)]
        assert "model demo" in bucketserve("status", *both)[0]
    _, err = bucketserve("status", "--address", "127.0.0.1:1", status=1)
    assert "127.0.0.1:1" in err
