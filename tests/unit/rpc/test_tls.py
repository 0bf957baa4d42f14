"""What can be wrong with [tls] is one sentence at start."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
import trustme

from bucketserve.config import TlsSettings
from bucketserve.core.errors import SettingsError
from bucketserve.process import tls_of
from bucketserve.rpc.tls import Tls
from tests.certificates import Authority, Papers, replace

Change = Callable[[Authority, Papers, Path], dict[str, str]]


def written(folder: Path, content: bytes) -> str:
    (folder / "odd.pem").write_bytes(content)
    return str(folder / "odd.pem")


def both(ours: Authority, folder: Path) -> list[Path]:
    """CA files, ours and another."""
    other = folder / "another" / "ca.pem"
    return [ours.ca_file, other if other.exists() else Authority(other.parent).ca_file]


def encrypted(ours: Authority, papers: Papers, folder: Path) -> dict[str, str]:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(papers.key.read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"secret")
    form = serialization.PrivateFormat.PKCS8
    return {"key_file": written(folder, key.private_bytes(serialization.Encoding.PEM, form, secret))}


WRONG: dict[str, tuple[Change, str]] = {
    "no certificate": (
        lambda a, p, f: {"cert_file": str(f / "none")},
        r"cert_file .*/none: No such file or directory$",
    ),
    "no key": (lambda a, p, f: {"key_file": str(f / "none")}, r"key_file .*/none: No such file or directory$"),
    "no CA": (lambda a, p, f: {"ca_file": str(f / "none")}, r"ca_file .*/none: No such file or directory$"),
    "a directory": (lambda a, p, f: {"ca_file": str(f)}, r"ca_file .*: Is a directory$"),
    "empty CA": (lambda a, p, f: {"ca_file": written(f, b"")}, r"ca_file .*odd.pem: no PEM with certificates$"),
    "no PEM": (lambda a, p, f: {"cert_file": written(f, b"\0\xff")}, r"cert_file .*: no PEM with certificates$"),
    "key as CA": (lambda a, p, f: {"ca_file": str(p.key)}, r"ca_file .*: no PEM with certificates$"),
    "other key": (
        lambda a, p, f: {"key_file": str(a.issue("other").key)},
        r"key_file .*other.key has the key of another certificate$",
    ),
    "no key in it": (
        lambda a, p, f: {"key_file": str(p.cert)},
        r"key_file .* has no key that can be read without a password$",
    ),
    "encrypted key": (encrypted, r"key_file .*odd.pem has no key that can be read without a password$"),
    "expired": (
        lambda a, p, f: a.issue("old", is_expired=True).settings(),
        r"cert_file .*old.pem: not valid: certificate has expired$",
    ),
    "other CA": (
        lambda a, p, f: {"ca_file": str(Authority(f / "theirs").ca_file)},
        r"cert_file .*: not valid: unable to get local issuer certificate$",
    ),
    "certificate alone": (lambda a, p, f: {"key_file": ""}, r"cert_file and key_file belong together"),
    "key alone": (lambda a, p, f: {"cert_file": ""}, r"cert_file and key_file belong together"),
    "neither": (lambda a, p, f: {"cert_file": "", "key_file": ""}, r"a service needs a certificate of its own"),
    "clients of our CA": (lambda a, p, f: {"client_ca_file": str(p.ca)}, r"client_ca_file has a CA of ca_file"),
    "clients of ours and theirs": (
        lambda a, p, f: {"client_ca_file": written(f, b"".join(map(Path.read_bytes, both(a, f))))},
        r"client_ca_file has a CA of ca_file",
    ),
    "we of ours and the clients'": (
        lambda a, p, f: {
            "ca_file": written(f, b"".join(map(Path.read_bytes, both(a, f)))),
            "client_ca_file": str(both(a, f)[1]),
        },
        r"client_ca_file has a CA of ca_file",
    ),
    "clients of a CA below ours": (
        lambda a, p, f: {"client_ca_file": str(Authority(f / "below", a).ca_file)},
        r"client_ca_file has a CA of ca_file, or one below it",
    ),
    "CA not named": (lambda a, p, f: {"ca_file": ""}, r"ca_file: needed with any other setting of \[tls\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence(case: str, tmp_path: Path) -> None:
    ours = Authority(tmp_path / "ours")
    papers = ours.issue("service")
    change, message = WRONG[case]
    with pytest.raises(SettingsError, match=message) as caught:
        tls = tls_of(TlsSettings(**{**papers.settings(), **change(ours, papers, tmp_path)}))
        assert tls is not None
        tls.check_service()
    assert len(caught.value.problems) == 1


def test_every_file_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        Tls(ca_file=str(tmp_path / "a"), cert_file=str(tmp_path / "b"), key_file=str(tmp_path / "c"))
    assert [problem.split()[1] for problem in caught.value.problems] == ["ca_file", "cert_file", "key_file"]


def test_when_the_certificate_ends_is_known(tmp_path: Path) -> None:
    ours = Authority(tmp_path / "ours")
    tls = ours.issue("service", until=date(2100, 1, 1)).tls()
    assert tls.ends_unix_s() == datetime(2100, 1, 1, 12, tzinfo=UTC).timestamp()
    ours.issue("service", until=date(2101, 1, 1))
    assert tls.ends_unix_s() == datetime(2101, 1, 1, 12, tzinfo=UTC).timestamp()
    assert Tls(ca_file=str(ours.ca_file)).ends_unix_s() == 0.0


def test_clients_of_another_ca_are_welcome_whatever_it_is_called(tmp_path: Path) -> None:
    for name in ("ours", "clients"):
        ca = trustme.CA(organization_name="one", organization_unit_name="name")
        (tmp_path / f"{name}.pem").write_bytes(ca.cert_pem.bytes())
    tls = Tls(ca_file=str(tmp_path / "ours.pem"), client_ca_file=str(tmp_path / "clients.pem"))
    assert tls.current().client_ca


def test_nothing_set_is_plain_text() -> None:
    assert tls_of(TlsSettings()) is None


def test_a_client_needs_no_certificate_and_none_of_the_services_ca(tmp_path: Path) -> None:
    ours, clients = Authority(tmp_path / "ours"), Authority(tmp_path / "clients")
    assert Tls(ca_file=str(ours.ca_file)).current().cert == b""
    client = clients.issue("client").tls(ca_file=ours.ca_file)
    with pytest.raises(SettingsError, match="unable to get local issuer"):
        client.check_service()


def test_a_service_starts_with_nothing_wrong_and_ends_with_a_sentence(tmp_path: Path) -> None:
    papers = Authority(tmp_path / "ours").issue("old", is_expired=True)
    command = [sys.executable, "-m", "bucketserve_scheduler"]
    done = subprocess.run(command, env=dict(papers.environ()), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].strip().endswith("not valid: certificate has expired")
    assert "Traceback" not in done.stderr


def test_changed_files_are_taken_if_they_are_good(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = Authority(tmp_path / "ours")
    papers = ours.issue("service")
    tls = papers.tls()
    first = tls.current()
    assert tls.current() is first
    # Half of a renewal: the new certificate's key is still to come.
    other = ours.issue("other")
    with caplog.at_level(logging.WARNING, "bucketserve.tls"):
        replace(papers.cert, other.cert.read_bytes())
        assert tls.current() is first
        assert tls.current() is first
    assert [record.getMessage() for record in caplog.records] == ["tls.files_unusable"]
    assert "has the key of another certificate" in caplog.records[0].fields["detail"]
    replace(papers.key, other.key.read_bytes())
    assert tls.current().cert == other.cert.read_bytes()
    for path in papers.ca, papers.cert, papers.key:
        path.unlink()
    assert tls.current().cert == other.cert.read_bytes()
