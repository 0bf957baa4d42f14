"""Where the clients of others are, and how they are run. `make test-clients` sets them up."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import google.rpc

__all__ = ["BIN", "FOLDER", "ROOT", "output", "seen"]

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
BIN = ROOT / ".venv-clients" / "bin"
PROTOS = ":".join(map(str, (ROOT / "protos", Path(google.rpc.__path__[0]).parents[1])))


async def output(command: str, *arguments: object, timeout_s: float = 120.0, **environ: object) -> tuple[int, str, str]:
    """Runs one of them, with these variables more; returns exit status, standard output and standard error."""
    process = await asyncio.create_subprocess_exec(
        *(str(BIN / command), *map(str, arguments)),
        cwd=FOLDER,
        env={**os.environ, "PROTOS": PROTOS, **{name: str(value) for name, value in environ.items()}},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, errors = await asyncio.wait_for(process.communicate(), timeout_s)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, out.decode(), errors.decode()


async def seen(command: str, *arguments: object, **environ: object) -> Any:
    """Returns what one of them printed as JSON."""
    status, out, errors = await output(command, *arguments, **environ)
    assert status == 0, errors
    return json.loads(out)
