"""URLs of the store: redis://, rediss://, unix://, sentinel://, sentinels:// and memory://.

No message holds what was given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from bucketserve.addresses import Address, AddressError

__all__ = ["SentinelUrl", "check_store_url"]

REDIS_PORT = 6379
SENTINEL_PORT = 26379
SCHEMES = ("redis", "rediss", "unix", "sentinel", "sentinels", "memory")
TLS_PARAMETERS = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"})
"""Of rediss:// as the client library has them."""
_SENTINEL_FORM = (
    "write sentinel://host:port,host:port/service or .../service/db, with ?sentinel_password=... where the Sentinels "
    "have a password of their own; sentinels:// for TLS, with ssl_ca_certs, ssl_certfile and ssl_keyfile"
)


@dataclass(frozen=True, slots=True, repr=False)
class SentinelUrl:
    """sentinel://[user:password@]host[:port],host[:port]/service[/db][?sentinel_username=...&sentinel_password=...].

    The credentials before the @ are those of the data servers, the parameters those of the Sentinels. sentinels://
    speaks TLS to both, with TLS_PARAMETERS.
    """

    sentinels: tuple[Address, ...]
    service: str
    db: int
    username: str
    password: str
    sentinel_username: str
    sentinel_password: str
    tls: dict[str, Any]
    """Arguments of the client library for connections to Sentinels and servers; empty: no TLS."""

    @classmethod
    def parse(cls, url: str) -> SentinelUrl:
        """Returns its parts.

        Raises:
            AddressError: it names no Sentinel or no service, or has a parameter that is not known.
        """
        # Not urlsplit: it reads [a]:1,[b]:2 as one address and refuses it.
        scheme, _, rest = url.partition("://")
        rest, _, query = rest.partition("?")
        credentials, _, rest = rest.rpartition("@")
        hosts, _, path = rest.partition("/")
        service, _, db = path.partition("/")
        try:
            sentinels = tuple(Address.parse(item.strip(), SENTINEL_PORT) for item in hosts.split(","))
            parameters = parse_qs(query, strict_parsing=True) if query else {}
        except ValueError:
            # What was taken for an address may be a part of the password.
            raise AddressError(_SENTINEL_FORM) from None
        known = {"sentinel_username", "sentinel_password"} | (TLS_PARAMETERS if scheme == "sentinels" else set())
        if not service or not (db or "0").isdecimal() or not parameters.keys() <= known:
            raise AddressError(_SENTINEL_FORM)
        tls: dict[str, Any] = {name: parameters[name][-1] for name in TLS_PARAMETERS & parameters.keys()}
        if tls.get("ssl_check_hostname", "true").lower() not in ("true", "false"):
            raise AddressError("ssl_check_hostname is true or false")
        tls["ssl_check_hostname"] = tls.get("ssl_check_hostname", "true").lower() == "true"
        user, _, password = credentials.partition(":")
        return cls(
            sentinels=sentinels,
            service=unquote(service),
            db=int(db or 0),
            username=unquote(user),
            password=unquote(password),
            sentinel_username=parameters.get("sentinel_username", [""])[-1],
            sentinel_password=parameters.get("sentinel_password", [""])[-1],
            tls={"ssl": True, **tls} if scheme == "sentinels" else {},
        )


def check_store_url(url: str) -> str:
    """Returns the URL if it names a store.

    Raises:
        AddressError: it doesn't; the message says what to write and repeats no credentials.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES:
        raise AddressError("begin with " + ", ".join(f"{name}://" for name in SCHEMES))
    if scheme in ("sentinel", "sentinels"):
        SentinelUrl.parse(url)
    if scheme == "unix" and not rest.rpartition("@")[2].startswith("/"):
        raise AddressError("write unix:///path/of/the/socket")
    if scheme in ("redis", "rediss"):
        _check_server(url, scheme)
    return url


def _check_server(url: str, scheme: str) -> None:
    form = f"write {scheme}://user:password@host:port/db, with %XX for any of / ? # in a password"
    try:
        parts = urlsplit(url)
        Address.parse(parts.netloc.rpartition("@")[2] or "localhost", REDIS_PORT)
    except ValueError:
        raise AddressError(form) from None
    if parts.path.strip("/") and not parts.path.strip("/").isdecimal():
        raise AddressError(form)
