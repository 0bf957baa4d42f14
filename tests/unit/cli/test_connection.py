"""How commands are told to reach a deployment: what is wrong is said before anything is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.cli import run_command

COMMANDS = {
    "generate": ["generate", "x"],
    "status": ["status"],
    "bench": ["bench"],
    "job": ["job", "status", "job-1"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_what_is_wrong_is_one_line(command: list[str], tmp_path: Path) -> None:
    papers = Authority(tmp_path / "ours").issue("client")
    cases = {
        ("--tls-ca", str(tmp_path / "none")): "[tls] ca_file " + str(tmp_path / "none") + ": No such file or directory",
        ("--tls-ca", str(papers.key)): "no PEM with certificates",
        ("--tls-cert", str(papers.cert)): "ca_file: needed with any other setting of [tls]",
        ("--tls-ca", str(papers.ca), "--tls-cert", str(papers.cert)): "belong together: give both or none",
        ("--api-key", "schlüssel"): "--api-key: a key has printable ASCII characters only",
        ("--api-key", "a\nb"): "--api-key: a key has printable ASCII characters only",
    }
    for options, problem in cases.items():
        status, out, err = run_command(*command, *options)
        assert (status, out) == (2, ""), (options, err)
        assert problem in err
        assert len(err.splitlines()) == 1


def test_the_environment_is_as_good_as_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKETSERVE_TLS_CA_FILE", str(tmp_path / "none"))
    assert "none: No such file" in run_command("generate", "x")[2]
    # An option wins over it.
    ca = Authority(tmp_path / "ours").ca_file
    monkeypatch.setenv("BUCKETSERVE_API_KEY", "schlüssel")
    assert "--api-key" in run_command("generate", "x", "--tls-ca", str(ca))[2]
