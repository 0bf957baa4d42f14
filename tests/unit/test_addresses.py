"""One reader of addresses, one hider of credentials; tables."""

from __future__ import annotations

import urllib.request
from contextlib import closing

import grpc
import pytest
from prometheus_client import CollectorRegistry
from pydantic import TypeAdapter
from redis.asyncio import SSLConnection

from bucketserve.addresses import Address, AddressError, channel_target, redact
from bucketserve.config import AddressList
from bucketserve.core.errors import SettingsError
from bucketserve.probe import main
from bucketserve.rpc.channel import open_channel
from bucketserve.rpc.probe import check_health
from bucketserve.rpc.server import RpcServer
from bucketserve.store.redis import connect
from bucketserve.store.url import SentinelUrl
from bucketserve.telemetry.metrics import MetricsEndpoint


@pytest.mark.parametrize(
    ("text", "host", "port", "written"),
    [
        ("a:1", "a", 1, "a:1"),
        ("my_host.example.:65535", "my_host.example.", 65535, "my_host.example.:65535"),
        ("0.0.0.0:0", "0.0.0.0", 0, "0.0.0.0:0"),
        ("[::1]:50", "::1", 50, "[::1]:50"),
        ("[fd00::a:1]:50053", "fd00::a:1", 50053, "[fd00::a:1]:50053"),
        ("[fe80::1%eth0]:5", "fe80::1%eth0", 5, "[fe80::1%eth0]:5"),
        # As a template writes it that doesn't know the family.
        ("[10.1.2.3]:50053", "10.1.2.3", 50053, "10.1.2.3:50053"),
    ],
)
def test_addresses(text: str, host: str, port: int, written: str) -> None:
    assert Address.parse(text) == (host, port)
    assert str(Address.parse(text)) == written
    if port:
        assert channel_target(text) == written
    assert Address.parse(written) == Address.parse(text)


@pytest.mark.parametrize(
    "text",
    ["a", "a:", "a:b", "a:70000", "a:-1", "a:+1", "a: 1", "", ":5", "::1", "[::1]", "fd00::1:50053", "[::1]5", "[::1:5",
     "[name]:5", "[]:5", "a b:5", "a/b:5", "u:p@h:5", "http://a:5", "a:٣", "1:2:3"],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(AddressError, match=r"host:port|\[address\]:port"):
        Address.parse(text)


def test_an_address_without_brackets_is_told_how_to_be_written() -> None:
    with pytest.raises(AddressError, match=r"write \[fd00::1\]:port"):
        Address.parse("fd00::1:50053")


def test_a_default_port_is_for_those_without_one() -> None:
    assert [Address.parse(text, 7) for text in ("a", "[::1]", "a:1")] == [("a", 7), ("::1", 7), ("a", 1)]


@pytest.mark.parametrize(
    "text", ["dns:///a:1", "ipv4:1.2.3.4:5,1.2.3.5:5", "ipv6:[::1]:5", "unix:/run/x", "unix-abstract:x"]
)
def test_names_of_grpc_s_own_stay(text: str) -> None:
    assert channel_target(text) == text


def test_lists() -> None:
    adapter = TypeAdapter(AddressList)
    assert adapter.validate_python("a:1, [::1]:2") == "a:1,[::1]:2"
    for text in ("", "a:1,", "a:1,,b:2", "a:0", "[::]:5", "a:1;b:2"):
        with pytest.raises(ValueError):
            adapter.validate_python(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://me:secret@host:1/0", "redis://me:***@host:1/0"),
        ("redis://:secret@host", "redis://***@host"),
        ("http://secret@host:4317", "http://***@host:4317"),
        ("sentinel://u:sec@ret@[::1]:1,b:2/x?sentinel_password=secret&y=1",
         "sentinel://u:***@[::1]:1,b:2/x?sentinel_password=***&y=1"),
        ("can't reach redis://me:sec ret@host", "can't reach redis://me:***@host"),
        ("redis://me:sec/ret@host", "redis://me:***@host"),
        ("redis://h?password=secret", "redis://h?password=***"),
        ("org/model@revision", "org/model@revision"),
        ("me@example.org", "me@example.org"),
    ],
)  # fmt: skip
def test_credentials_are_not_shown(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_sentinels_of_both_families_with_a_password_of_their_own() -> None:
    url = SentinelUrl.parse(
        "sentinel://me:p%40w@[::1]:1,host,10.0.0.1:3/main/2?sentinel_username=watch&sentinel_password=a%26b@c"
    )
    assert url.sentinels == (("::1", 1), ("host", 26379), ("10.0.0.1", 3))
    assert (url.service, url.db, url.username, url.password) == ("main", 2, "me", "p@w")
    assert (url.sentinel_username, url.sentinel_password) == ("watch", "a&b@c")
    assert "p@w" not in repr(url)


def test_sentinels_by_tls() -> None:
    url = "sentinels://:one@a,b/main?ssl_ca_certs=/ca.pem&ssl_check_hostname=False&sentinel_password=two"
    client = connect(url)
    asked = client.watchers.sentinels[1].connection_pool
    for pool in (asked, client.connection_pool):
        assert issubclass(pool.connection_class, SSLConnection)
        assert pool.connection_kwargs["ssl_ca_certs"] == "/ca.pem"
        assert pool.connection_kwargs["ssl_check_hostname"] is False
    assert connect("sentinels://a/main").connection_pool.connection_kwargs["ssl_check_hostname"] is True


@pytest.mark.parametrize(
    "url",
    [
        "sentinel://a/main?ssl_ca_certs=/ca.pem",
        "sentinels://a/main?ssl_cert_reqs=none",
        "sentinels://a/main?ssl_check_hostname=0",
        "sentinels://a",
        "sentinels:///main",
    ],
)
def test_what_sentinels_do_not_take_is_refused(url: str) -> None:
    with pytest.raises(SettingsError):
        connect(url)


def test_the_client_asks_sentinels_with_their_password_and_servers_with_theirs() -> None:
    client = connect("sentinel://me:one@[::1]:1/main?sentinel_password=two")
    asked = client.watchers.sentinels[0].connection_pool.connection_kwargs
    assert (asked["host"], asked["port"], asked["username"], asked["password"]) == ("::1", 1, None, "two")
    served = client.connection_pool.connection_kwargs
    assert (served["username"], served["password"], served["db"]) == ("me", "one", 0)


@pytest.mark.parametrize("url", ["redis://u:p@[::1]:7/3", "rediss://[fd00::1]"])
def test_the_client_takes_ipv6(url: str) -> None:
    kwargs = connect(url).connection_pool.connection_kwargs
    assert kwargs["host"] in ("::1", "fd00::1")


@pytest.mark.parametrize("listen", ["[::]:0", "0.0.0.0:0"])
async def test_every_address_means_both_families(listen: str) -> None:
    server = RpcServer(listen, services=[], on_unexpected=lambda method, error: None)
    port = await server.start()
    try:
        await server.set_serving(True)
        for host in ("127.0.0.1", "[::1]"):
            async with open_channel(f"{host}:{port}") as channel:
                await channel.channel_ready()
    finally:
        await server.stop(0)
    with MetricsEndpoint(CollectorRegistry(), *Address.parse(listen)) as endpoint:
        for host in ("127.0.0.1", "[::1]"):
            with closing(urllib.request.urlopen(f"http://{host}:{endpoint.port}/metrics", timeout=5)) as answer:
                assert answer.status == 200


def test_the_probe_refuses_what_is_no_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["::1:50051"]) == 2
    assert "an IPv6 address needs brackets" in capsys.readouterr().err
    with pytest.raises(grpc.RpcError):
        check_health("[::1]:1", timeout_s=1.0)
