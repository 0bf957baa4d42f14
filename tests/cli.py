"""The command line within the test's own process, which takes no second to start."""

from __future__ import annotations

import contextlib
import io

import pytest
import typer

from bucketserve_cli.main import app

__all__ = ["COMMAND", "run_command"]

COMMAND = typer.main.get_command(app)


def run_command(*arguments: str) -> tuple[int, str, str]:
    """Returns exit status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        COMMAND.main(list(arguments), prog_name="bucketserve")
    assert isinstance(left.value.code, int)
    return left.value.code, out.getvalue(), err.getvalue()
