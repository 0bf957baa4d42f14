"""Where something listens or is reached: the one reader and writer of host:port and of what stands in URLs.

Everything that takes or builds an address uses these, so that IPv6 and credentials are treated alike everywhere.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple
from urllib.parse import urlsplit

from bucketserve.core.errors import BucketServeError

__all__ = ["Address", "AddressError", "channel_target", "check_endpoint", "redact"]

_HOST_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_PORT = re.compile(r"[0-9]{1,5}")
_GRPC_SCHEME = re.compile(r"(?:dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):")
# Up to the last @, whatever stands before it: too much is hidden rather than too little.
_CREDENTIALS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^\s:@/]*)(?P<rest>.*)@", re.DOTALL)
_SECRET_PARAMETER = re.compile(r"(?P<name>[?&][^=&\s]*(?:password|token|secret)=)[^&\s'\"]+", re.IGNORECASE)


class AddressError(BucketServeError, ValueError):
    """A text is not an address; says what it should look like."""

    reason = "ADDRESS"


class Address(NamedTuple):
    """A host (a name, or an IP address without brackets) and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, default_port: int | None = None) -> Address:
        """Returns the address in "name:port", "1.2.3.4:port" or "[ip]:port"; an IP of either family may have brackets.

        Args:
            text: what to read.
            default_port: the port where the text has none; None: it must have one.

        Raises:
            AddressError: it is none of these, or the port is not a number from 0 to 65535. An IPv6 address without
                brackets is refused, since its last group can't be told from a port.
        """
        shown = redact(text)
        if text.startswith("["):
            host, bracket, tail = text[1:].partition("]")
            if not bracket or not _is_ip(host) or (tail and not tail.startswith(":")):
                raise AddressError(f"{shown!r} is not [address]:port")
            port = tail[1:] if tail else None
        elif text.count(":") > 1:
            head = text.rpartition(":")[0]
            hint = f"; write [{head}]:port" if _is_ip(head) else ""
            raise AddressError(f"{shown!r} is not host:port: an IPv6 address needs brackets{hint}")
        else:
            host, colon, tail = text.partition(":")
            port = tail if colon else None
            if not _HOST_NAME.fullmatch(host):
                every = "; [::]:port is every address of the machine" if not host else ""
                raise AddressError(f"{shown!r} is not host:port{every}")
        if port is None and default_port is not None:
            return cls(host, default_port)
        if port is None or not _PORT.fullmatch(port) or int(port) > 65535:
            raise AddressError(f"{shown!r} is not host:port with a port from 0 to 65535")
        return cls(host, int(port))

    @property
    def is_wildcard(self) -> bool:
        """Whether it stands for every address of the machine, which is where one listens and not whom one calls."""
        return _is_ip(self.host) and ipaddress.ip_address(self.host).is_unspecified

    def local(self) -> Address:
        """Returns where this machine reaches what listens here."""
        return Address("127.0.0.1", self.port) if self.is_wildcard else self

    def __str__(self) -> str:
        """Returns host:port, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def channel_target(text: str) -> str:
    """Returns gRPC's name of an address; names with a scheme of gRPC's, such as dns:///host:port, stay as they are.

    Raises:
        AddressError: it is neither, or port 0, at which nobody can be reached.
    """
    if _GRPC_SCHEME.match(text):
        return text
    address = Address.parse(text)
    if not address.port:
        raise AddressError(f"{text!r} is not host:port with a port from 1 to 65535")
    return str(address)


def check_endpoint(text: str) -> str:
    """Returns the text if it is http://host:port or https://host:port.

    Raises:
        AddressError: it is not.
    """
    try:
        parts = urlsplit(text)
        Address.parse(parts.netloc.rpartition("@")[2])
    except ValueError:
        # What was taken for the address may be a part of credentials: it is not repeated.
        raise AddressError("write http://host:port or https://host:port") from None
    if parts.scheme not in ("http", "https") or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise AddressError("write http://host:port or https://host:port")
    return text


def redact(text: str) -> str:
    """Returns a text without the credentials in the URLs in it; a user's name stays, a token in its place doesn't."""

    def mask(found: re.Match[str]) -> str:
        user = f"{found['user']}:" if found["user"] and found["rest"].startswith(":") else ""
        return f"{found['scheme']}{user}***@"

    return _SECRET_PARAMETER.sub(r"\g<name>***", _CREDENTIALS.sub(mask, text))


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
