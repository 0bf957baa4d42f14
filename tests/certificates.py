"""Throw-away certificates."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import trustme

from bucketserve.rpc.tls import Tls

__all__ = ["Authority", "Papers"]

YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
LONG_AGO = YESTERDAY - datetime.timedelta(days=10)


@dataclass(frozen=True)
class Papers:
    """Files of a process."""

    ca: Path
    cert: Path
    key: Path

    def settings(self, **more: object) -> dict[str, str]:
        """What Tls takes."""
        files = {"ca_file": self.ca, "cert_file": self.cert, "key_file": self.key, **more}
        return {name: str(value) for name, value in files.items()}

    def environ(self, **more: object) -> Mapping[str, str]:
        """The same as settings of a process."""
        return {f"BUCKETSERVE_TLS_{name.upper()}": value for name, value in self.settings(**more).items()}

    def tls(self, **more: object) -> Tls:
        return Tls(**self.settings(**more))


class Authority:
    """A CA of its own, with a folder for what it issues."""

    def __init__(self, folder: Path, parent: Authority | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ca = trustme.CA() if parent is None else parent._ca.create_child_ca()
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(self._ca.cert_pem.bytes())

    def issue(self, name: str, *hosts: str, is_expired: bool = False, until: datetime.date | None = None) -> Papers:
        """Writes a certificate for these hosts, 127.0.0.1 if none; over those of that name, as whoever renews them."""
        times = {"not_before": LONG_AGO, "not_after": YESTERDAY} if is_expired else {}
        if until is not None:
            times = {"not_after": datetime.datetime.combine(until, datetime.time(12), datetime.UTC)}
        leaf = self._ca.issue_cert(*(hosts or ("127.0.0.1",)), **times)
        papers = Papers(self.ca_file, self._folder / f"{name}.pem", self._folder / f"{name}.key")
        replace(papers.cert, b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        replace(papers.key, leaf.private_key_pem.bytes())
        return papers


def replace(path: Path, content: bytes) -> None:
    """Writes a file in one step."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, path)
