"""Who gets through a handshake."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from bucketserve.core.errors import SettingsError
from bucketserve.probe import main as probe
from bucketserve.rpc.channel import open_channel
from bucketserve.rpc.probe import check_health
from bucketserve.rpc.server import RpcServer
from bucketserve.rpc.tls import Tls
from tests.certificates import Authority, replace
from tests.listening import until_closed


@asynccontextmanager
async def serving(tls: Tls | None, *, is_public: bool = False) -> AsyncIterator[str]:
    server = RpcServer(
        "127.0.0.1:0", services=[], on_unexpected=lambda method, error: None, tls=tls, is_public=is_public
    )
    port = await server.start()
    await server.set_serving(True)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def answer(address: str, tls: Tls | None) -> str:
    """SERVING, or the code of the refusal."""
    async with open_channel(address, tls, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            found = await check(health_pb2.HealthCheckRequest(), timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return health_pb2.HealthCheckResponse.ServingStatus.Name(found.status)


async def test_an_internal_port_is_open_to_certificates_of_its_ca_alone(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    papers = ours.issue("service")
    async with serving(papers.tls()) as address:
        assert await answer(address, papers.tls()) == "SERVING"
        assert await answer(address, ours.issue("second", "elsewhere").tls()) == "SERVING"
        refused = {
            "plain text": None,
            "no certificate": Tls(ca_file=str(ours.ca_file)),
            "other CA": theirs.issue("theirs").tls(ca_file=ours.ca_file),
        }
        for who, tls in refused.items():
            assert await answer(address, tls) == "UNAVAILABLE", who
        # Its own settings would not let it begin: this one was good when it was read.
        late = ours.issue("late")
        tls = late.tls()
        old = ours.issue("old", is_expired=True)
        tls._pems = tls._pems._replace(cert=old.cert.read_bytes(), key=old.key.read_bytes())
        assert await answer(address, tls) == "UNAVAILABLE"


async def test_a_client_leaves_a_server_that_is_not_whom_it_called(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    client = ours.issue("client").tls()
    async with serving(theirs.issue("rogue").tls()) as address:
        assert await answer(address, client) == "UNAVAILABLE"
    async with serving(ours.issue("other", "other.example").tls(peer_name="other.example")) as address:
        assert await answer(address, client) == "UNAVAILABLE"
        named = ours.issue("client").tls(peer_name="other.example")
        assert await answer(address, named) == "SERVING"
    async with serving(None) as address:
        assert await answer(address, client) == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("hosts", "listen", "reached_at", "peer_name", "is_right"),
    [
        (("127.0.0.1",), "127.0.0.1:0", "", "", True),
        (("127.0.0.1",), "127.0.0.1:0", "10.0.0.7:1", "", False),
        (("10.0.0.7",), "[::]:0", "10.0.0.7:1", "", True),
        (("fd00::7",), "[::]:0", "[fd00::7]:1", "", True),
        (("fd00::7",), "[::]:0", "[fd00::8]:1", "", False),
        (("*.pods.example",), "0.0.0.0:0", "worker.pods.example:1", "", True),
        (("worker.example",), "0.0.0.0:0", "gateway.example:1", "", False),
        # Where it is reached is not known.
        (("worker.example",), "0.0.0.0:0", "", "", True),
        (("bucketserve",), "0.0.0.0:0", "10.0.0.7:1", "bucketserve", True),
        (("10.0.0.7",), "0.0.0.0:0", "10.0.0.7:1", "bucketserve", False),
    ],
)
async def test_a_service_whose_certificate_is_for_another_name_does_not_begin(
    hosts: tuple[str, ...], listen: str, reached_at: str, peer_name: str, is_right: bool, tmp_path: Path
) -> None:
    tls = Authority(tmp_path / "ours").issue("service", *hosts).tls(peer_name=peer_name)

    def new(is_public: bool) -> RpcServer:
        return RpcServer(
            listen,
            services=[],
            on_unexpected=lambda method, error: None,
            tls=tls,
            is_public=is_public,
            reached_at=reached_at,
        )

    # Clients come by names that nobody here knows.
    new(is_public=True)
    if is_right:
        new(is_public=False)
    else:
        with pytest.raises(SettingsError, match=r"is not valid for '.*'; others call this process so: put it into"):
            new(is_public=False)


async def test_a_public_port_asks_for_certificates_only_if_it_is_told_whose(tmp_path: Path) -> None:
    ours, clients = Authority(tmp_path / "ours"), Authority(tmp_path / "clients")
    papers = ours.issue("gateway")
    anybody = Tls(ca_file=str(ours.ca_file))
    client = clients.issue("client").tls(ca_file=ours.ca_file)
    async with serving(papers.tls(), is_public=True) as address:
        assert await answer(address, anybody) == "SERVING"
        assert await answer(address, None) == "UNAVAILABLE"
    tls = papers.tls(client_ca_file=clients.ca_file)
    async with serving(tls, is_public=True) as public, serving(tls) as internal:
        assert await answer(public, anybody) == "UNAVAILABLE"
        assert await answer(public, client) == "SERVING"
        # So that it can be probed by itself.
        assert await answer(public, papers.tls()) == "SERVING"
        # A client's certificate opens no internal port.
        assert await answer(internal, client) == "UNAVAILABLE"


async def test_certificates_and_ca_are_changed_while_it_serves(tmp_path: Path) -> None:
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    papers = old.issue("service")
    before, after = papers.tls(), new.issue("service").tls()
    async with serving(papers.tls()) as address:
        assert (await answer(address, before), await answer(address, after)) == ("SERVING", "UNAVAILABLE")
        fresh = new.issue("service")
        # Nobody is locked out while both are trusted.
        replace(papers.ca, papers.ca.read_bytes() + new.ca_file.read_bytes())
        assert await answer(address, before) == "SERVING"
        replace(papers.cert, fresh.cert.read_bytes())
        replace(papers.key, fresh.key.read_bytes())
        assert await answer(address, after) == "SERVING"
        # What had read them when it began reads them again.
        assert await answer(address, before) == "SERVING"
        replace(papers.ca, new.ca_file.read_bytes())
        assert await answer(address, after) == "SERVING"
        stale = Authority(tmp_path / "stale").issue("service").tls(ca_file=new.ca_file)
        assert await answer(address, stale) == "UNAVAILABLE"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("kind", ["public", "metrics"])
async def test_no_session_outlives_the_ca_by_which_it_was_trusted(
    kind: str, version: ssl.TLSVersion, tmp_path: Path
) -> None:
    ours, old, new = (Authority(tmp_path / name) for name in ("ours", "old", "new"))
    client, papers, services_ca = old.issue("client"), ours.issue("gateway"), ours.ca_file.read_bytes()
    if kind == "public":
        trusted = tmp_path / "trusted.pem"
        replace(trusted, old.ca_file.read_bytes())
        context = papers.tls(client_ca_file=trusted).http_context()
    else:
        trusted = papers.ca
        replace(trusted, services_ca + old.ca_file.read_bytes())
        found = papers.tls(metrics="mutual").metrics_context()
        assert found is not None
        context = found
    theirs = ssl.create_default_context(cadata=services_ca.decode())
    theirs.load_cert_chain(client.cert, client.key)
    theirs.maximum_version = version

    def welcome(session: ssl.SSLSession | None) -> tuple[bool | None, ssl.SSLSession | None]:
        with (
            socket.create_connection(address) as raw,
            theirs.wrap_socket(raw, server_hostname="127.0.0.1", session=session) as connection,
        ):
            if connection.recv(2) != b"hi":
                raise ConnectionError
            return connection.session_reused, connection.session

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hi")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context)
    address = server.sockets[0].getsockname()
    async with until_closed(server):
        _, session = await asyncio.to_thread(welcome, None)
        is_reused, _ = await asyncio.to_thread(welcome, session)
        # What would be renewed for ever is not resumed at all.
        assert is_reused == (version is ssl.TLSVersion.TLSv1_2)
        replace(trusted, new.ca_file.read_bytes() + (services_ca if kind == "metrics" else b""))
        for offered in (session, None):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.to_thread(welcome, offered)
        fresh = new.issue("client")
        theirs.load_cert_chain(fresh.cert, fresh.key)
        await asyncio.to_thread(welcome, session)


async def test_the_probe_speaks_as_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    papers = Authority(tmp_path / "ours").issue("service")
    async with serving(papers.tls()) as address:
        assert await asyncio.to_thread(probe, [address]) == 1
        for name, value in papers.environ().items():
            monkeypatch.setenv(name, value)
        assert await asyncio.to_thread(probe, [address]) == 0
        assert await asyncio.to_thread(check_health, address, tls=papers.tls()) == "SERVING"
    monkeypatch.setenv("BUCKETSERVE_TLS_KEY_FILE", str(tmp_path / "none"))
    assert probe([address]) == 2
