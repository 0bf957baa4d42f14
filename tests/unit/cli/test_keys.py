"""bucketserve keys new."""

from __future__ import annotations

from pathlib import Path

import pytest

from bucketserve.v1 import inference_pb2
from bucketserve_gateway.auth import Keys
from tests.cli import run_command


def test_a_new_key_opens_what_its_table_says(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    known = []
    with file.open("a", encoding="utf-8") as tables:
        for arguments in (
            ("--tenant", "acme"),
            ("--tenant", 'Größe "x" \\', "--name", "n", "--model", "a", "--model", "b", "--class", "batch"),
            ("--tenant", "front", "--scope", "generate", "--scope", "admin"),
        ):
            status, out, err = run_command("keys", "new", *arguments)
            assert status == 0
            tables.write(out)
            known.append(err.strip())
            assert known[-1] not in out
    keys = Keys(str(file))
    found = [keys.identify({"authorization": f"Bearer {key}"}) for key in known]
    assert [identity.tenant for identity in found] == ["acme", 'Größe "x" \\', "front"]
    assert found[1].models == {"a", "b"}
    found[2].permit(inference_pb2.GenerateRequest(tenant="anybody"))
    assert len({key for key in known}) == 3
    assert all(len(key) > 40 and key.startswith("bsk_") for key in known)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--tenant", ""], "--tenant: "),
        (["--tenant", "x" * 65], "--tenant: String should have at most 64"),
        (["--tenant", "a\nb"], "--tenant: printable characters only"),
        (["--tenant", "a", "--model", "m", "--model", "m"], "--models: name at least one, and each once"),
        (["--tenant", "a", "--scope", "root"], "root"),
        ([], "--tenant"),
    ],
)
def test_what_no_file_may_hold_is_not_printed(arguments: list[str], problem: str) -> None:
    status, out, err = run_command("keys", "new", *arguments)
    assert (status, out) == (2, "")
    assert problem in err and "Traceback" not in err
