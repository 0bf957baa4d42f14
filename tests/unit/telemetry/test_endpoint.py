"""The metrics endpoint keeps no connection that asks nothing, and speaks TLS where that is asked for."""

from __future__ import annotations

import contextlib
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from bucketserve.telemetry import metrics
from bucketserve.telemetry.metrics import MetricsEndpoint, ProcessMetrics
from bucketserve.telemetry.names import Service
from tests.certificates import Authority, Papers, replace


def test_silent_connections_are_closed_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "SILENCE_S", 0.2)
    with MetricsEndpoint(ProcessMetrics(Service.GATEWAY).registry, "127.0.0.1", 0) as endpoint:
        silent = [socket.create_connection(("127.0.0.1", endpoint.port), timeout=10) for _ in range(20)]
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=10) as response:
            assert b"bucketserve_gateway_open_calls" in response.read()
        for each in silent:
            # Closed by the other side.
            assert each.recv(1) == b""
            each.close()
    assert "Traceback" not in capfd.readouterr().err


@contextlib.contextmanager
def serving(papers: Papers, how: Literal["tls", "mutual"], **more: Any) -> Iterator[MetricsEndpoint]:
    context = papers.tls(metrics=how, **more).metrics_context()
    with MetricsEndpoint(ProcessMetrics(Service.WORKER).registry, "127.0.0.1", 0, context) as endpoint:
        yield endpoint


def trusting(ca: Path, shown: Papers | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    if shown is not None:
        context.load_cert_chain(shown.cert, shown.key)
    return context


def is_served(endpoint: MetricsEndpoint, context: ssl.SSLContext | None) -> bool:
    """Whether the metrics come; never something else."""
    scheme = "http" if context is None else "https"
    try:
        with urllib.request.urlopen(f"{scheme}://127.0.0.1:{endpoint.port}/metrics", timeout=10, context=context) as it:
            return b"bucketserve_worker_steps_total" in it.read()
    except OSError:
        return False


def test_certificates_are_asked_for_where_it_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    clients, papers, stranger = Authority(tmp_path / "clients"), ours.issue("service"), theirs.issue("stranger")
    expired = ours.issue("expired", is_expired=True)
    with serving(papers, "tls") as open_, serving(papers, "mutual", client_ca_file=clients.ca_file) as closed:
        for context, by_open, by_closed in [
            (None, False, False),
            (trusting(theirs.ca_file), False, False),
            (trusting(ours.ca_file), True, False),
            (trusting(ours.ca_file, stranger), True, False),
            (trusting(ours.ca_file, clients.issue("client")), True, False),
            (trusting(ours.ca_file, expired), True, False),
            (trusting(ours.ca_file, papers), True, True),
        ]:
            assert (is_served(open_, context), is_served(closed, context)) == (by_open, by_closed)
    assert papers.tls().metrics_context() is None
    # Who is refused fills no log.
    assert "Traceback" not in capfd.readouterr().err


def test_who_shakes_no_hands_is_let_go_and_delays_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    papers = Authority(tmp_path / "ours").issue("service")
    monkeypatch.setattr(metrics, "SILENCE_S", 0.5)
    with serving(papers, "tls") as endpoint:
        silent = [socket.create_connection(("127.0.0.1", endpoint.port), timeout=30) for _ in range(20)]
        silent[0].sendall(b"\x16\x03\x01")
        monkeypatch.setattr(metrics, "SILENCE_S", 10.0)
        assert is_served(endpoint, trusting(papers.ca))
        for each in silent:
            with contextlib.suppress(ConnectionError):
                while each.recv(100):
                    pass
            each.close()


def test_a_renewed_certificate_is_shown(tmp_path: Path) -> None:
    papers, new = Authority(tmp_path / "ours").issue("service"), Authority(tmp_path / "new").issue("service")
    with serving(papers, "mutual") as endpoint:
        assert is_served(endpoint, trusting(papers.ca, papers))
        before = trusting(papers.ca, papers)
        for old, fresh in zip((papers.ca, papers.cert, papers.key), (new.ca, new.cert, new.key), strict=True):
            replace(old, fresh.read_bytes())
        assert not is_served(endpoint, before)
        assert is_served(endpoint, trusting(new.ca, new))
