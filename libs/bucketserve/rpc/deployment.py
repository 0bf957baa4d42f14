"""Which deployment a process belongs to: its parts speak to each other and to nobody else.

Every call between services carries the deployment's name and token as metadata, and is refused before its first message
is read if they are not those of the called one. The name keeps apart what shares a machine or a Redis by mistake; the
token keeps strangers out who can reach an internal port. With TLS (tls.py) they don't come so far, and nobody listens.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field

from bucketserve.core.errors import PeerRefusedError
from bucketserve.rpc.tls import Tls

__all__ = ["Deployment"]

NAME_KEY, TOKEN_KEY = "bucketserve-deployment", "bucketserve-token"


@dataclass(frozen=True, slots=True)
class Deployment:
    """A name, and a secret that all its services share; without one everybody who knows the name is let in."""

    name: str = "default"
    token: str = field(default="", repr=False)
    tls: Tls | None = field(default=None, repr=False)
    """How its services speak to each other, and to clients; None: in plain text."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call to another service carries."""
        return ((NAME_KEY, self.name), (TOKEN_KEY, self.token))

    @property
    def health_service(self) -> str:
        """The service whose health tells this deployment from others that listen on the same port."""
        return f"bucketserve.deployment.{self.name}"

    def check(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
        """Lets a call of another service in.

        Raises:
            PeerRefusedError: it is of another deployment, or does not know the token.
        """
        given = {key: value for key, value in metadata or () if isinstance(value, str)}
        name = given.get(NAME_KEY)
        if name != self.name:
            of = "a caller that names none" if name is None else f"deployment {name!r}"
            raise PeerRefusedError(f"this is deployment {self.name!r}; refused: {of}")
        if not hmac.compare_digest(given.get(TOKEN_KEY, "").encode(), self.token.encode()):
            raise PeerRefusedError(f"the caller's token is not that of deployment {self.name!r}")
