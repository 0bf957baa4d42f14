"""TLS of a process: its own certificate, whom it trusts, and both again when their files change.

With it every internal port asks its callers for a certificate of the deployment's CA: who has none gets no further than
the handshake. A certificate says that its bearer belongs to the deployment, and to nothing narrower.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import grpc

from bucketserve.addresses import Address
from bucketserve.core.errors import SettingsError

__all__ = ["Pems", "Tls"]

_log = logging.getLogger("bucketserve.tls")


class _Files(NamedTuple):
    """Paths; empty for what was not given."""

    ca: str
    cert: str
    key: str
    client_ca: str


class Pems(NamedTuple):
    """Contents of the files; empty for what was not given."""

    ca: bytes
    cert: bytes
    key: bytes
    client_ca: bytes
    ends_unix_s: float = 0.0
    """When our certificate does; 0 without one."""


class Tls:
    """What certifies this process, and what certifies others to it.

    Files are read again when they have changed: by a server with each handshake, by a client with each new channel.
    What could not be used is reported in the log, and what was there before stays in use.
    """

    def __init__(
        self,
        *,
        ca_file: str,
        cert_file: str = "",
        key_file: str = "",
        client_ca_file: str = "",
        peer_name: str = "",
        metrics: Literal["", "tls", "mutual"] = "",
    ) -> None:
        """Reads the files.

        Args:
            ca_file: PEM with the CAs that certify whom we call, and who may call internal ports.
            cert_file: PEM with our certificate and those between it and the CA; may be left out by a client.
            key_file: PEM with its key, not encrypted.
            client_ca_file: PEM with the CAs of clients; empty: a public port asks for no certificate.
            peer_name: the name that the certificates of those whom we call carry; empty: the host that is called.
            metrics: whether /metrics is served by TLS; mutual: to certificates of ca_file only.

        Raises:
            SettingsError: one of them can't be used; says which and why.
        """
        self._files = _Files(ca_file, cert_file, key_file, client_ca_file)
        self._peer_name = peer_name
        self._metrics = metrics
        self._lock = threading.Lock()
        self._stamp = self._read_stamp()
        self._pems = self._read()

    def current(self) -> Pems:
        """Returns the files as they are, or as they last were of use. Any thread may call it."""
        with self._lock:
            # Before the files: what changes while they are read is seen by the next call.
            stamp = self._read_stamp()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._pems = self._read()
                except SettingsError as error:
                    _log.warning("tls.files_unusable", extra={"fields": {"detail": "; ".join(error.problems)}})
            return self._pems

    def ends_unix_s(self) -> float:
        """Returns when our certificate ends; 0 without one."""
        return self.current().ends_unix_s

    def check_service(self) -> None:
        """Checks that this can be a service of a deployment, which serves and calls with one certificate.

        Raises:
            SettingsError: it can't; says why.
        """
        if not self._pems.cert:
            raise SettingsError(["[tls] cert_file: a service needs a certificate of its own, and key_file"])
        problem, _ = self._try_certificate(self._files.ca)
        if problem:
            raise SettingsError([f"[tls] cert_file {self._files.cert}: {problem}"])

    def check_address(self, address: str) -> None:
        """Checks that whoever calls this process at that address finds the name that he looks for.

        Raises:
            SettingsError: it is not in our certificate.
        """
        at = Address.parse(address)
        host = self._peer_name or ("" if at.is_wildcard else at.host)
        problem, _ = self._try_certificate(self._files.ca, host)
        if problem:
            advice = (
                "others call this process so: put it into the certificate, or set peer_name to a name that is there"
            )
            raise SettingsError([f"[tls] cert_file {self._files.cert}: {problem.rstrip('.')}; {advice}"])

    def server_credentials(self, *, is_public: bool) -> grpc.ServerCredentials:
        """Returns credentials that take each handshake's certificate from the files as they are then.

        An internal port asks for a certificate of the deployment's CA; a public one for one of the clients' CA, if
        there is one, or of the deployment's, so that a service can be probed by itself.
        """
        given = self.current()

        def configuration() -> grpc.ServerCertificateConfiguration:
            roots = self._public_roots(given) if is_public else given.ca
            return grpc.ssl_server_certificate_configuration([(given.key, given.cert)], roots or None)

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            now = self.current()
            if now is given:
                return None
            given = now
            return configuration()

        asks = bool(given.client_ca) if is_public else True
        # None is right, whatever the annotations say: nothing has changed.
        return grpc.dynamic_ssl_server_credentials(
            configuration(),
            changed,  # type: ignore[arg-type]
            require_client_authentication=asks,
        )

    def http_context(self) -> ssl.SSLContext:
        """Returns the same as server_credentials of a public port, for the servers of Python's own TLS."""
        return self._renewed_context(self._public_roots)

    def metrics_context(self) -> ssl.SSLContext | None:
        """Returns what /metrics is served by; None: plain HTTP."""
        if not self._metrics:
            return None
        return self._renewed_context(lambda given: given.ca if self._metrics == "mutual" else b"")

    def _renewed_context(self, trusted: Callable[[Pems], bytes]) -> ssl.SSLContext:
        """Returns a server's context that takes each handshake's certificate from the files as they are then.

        It asks for a certificate of the CAs that are trusted, if there are any.
        """
        given, context = self.current(), self._server_context(trusted)

        def renewed() -> ssl.SSLContext:
            nonlocal given, context
            now = self.current()
            if now is not given:
                # What is read again here was found good a moment ago; if it is not now, the former stays.
                with contextlib.suppress(ssl.SSLError, OSError):
                    given, context = now, self._server_context(trusted)
            return context

        return _RenewedContext(renewed)

    @staticmethod
    def _public_roots(given: Pems) -> bytes:
        return given.client_ca and given.ca + b"\n" + given.client_ca

    def _server_context(self, trusted: Callable[[Pems], bytes]) -> ssl.SSLContext:
        context, roots = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), trusted(self.current())
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._files.cert, self._files.key, password="")
        if roots:
            context.load_verify_locations(cadata=roots.decode("ascii"))
            context.verify_mode = ssl.CERT_REQUIRED
            # A session that is resumed, and by that renewed, would outlive the certificate that it began with.
            context.num_tickets = 0
        return context

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Returns credentials with what the files have now: a channel keeps them as long as it lives."""
        given = self.current()
        return grpc.ssl_channel_credentials(given.ca, given.key or None, given.cert or None)

    @property
    def channel_options(self) -> list[tuple[str, str]]:
        """Channel arguments beside the credentials."""
        return [("grpc.ssl_target_name_override", self._peer_name)] if self._peer_name else []

    def _read_stamp(self) -> tuple[tuple[int, ...] | None, ...]:
        """Returns what changes when a file is replaced or written."""

        def of(path: str) -> tuple[int, ...] | None:
            try:
                found = Path(path).stat()
            except OSError:
                return None
            return found.st_mtime_ns, found.st_size, found.st_ino

        return tuple(of(path) for path in self._files if path)

    def _read(self) -> Pems:
        """Returns the files' contents.

        Raises:
            SettingsError: with everything that is wrong.
        """
        problems: list[str] = []
        contents = {
            name: self._read_file(f"{name}_file", path, problems) if path else b""
            for name, path in self._files._asdict().items()
        }
        if bool(self._files.cert) != bool(self._files.key):
            problems.append("[tls] cert_file and key_file belong together: give both or none")
        if not problems and self._files.client_ca and _is_under(self._files.client_ca, self._files.ca):
            problems.append(
                "[tls] client_ca_file has a CA of ca_file, or one below it: its clients could call internal ports"
            )
        ends_unix_s = 0.0
        if not problems and self._files.cert:
            problem, ends_unix_s = self._try_certificate(self._files.cert)
            problems += [f"[tls] cert_file {self._files.cert}: {problem}"] if problem else []
        if problems:
            raise SettingsError(problems)
        return Pems(**contents, ends_unix_s=ends_unix_s)

    def _read_file(self, field: str, path: str, problems: list[str]) -> bytes:
        try:
            content = Path(path).read_bytes()
            if field != "key_file":
                # Whatever is no certificate is found here, and not in the first handshake.
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        except ssl.SSLError:
            problems.append(f"[tls] {field} {path}: no PEM with certificates")
        except OSError as error:
            problems.append(f"[tls] {field} {path}: {error.strerror}")
        else:
            return content
        return b""

    def _try_certificate(self, trusted: str, host: str = "") -> tuple[str, float]:
        """Returns why somebody who trusts that file would not accept our certificate, or "" and when it ends (Unix s).

        He looks for that host in it, if it is not empty.

        We call ourselves, and both sides do what anybody does who verifies us. Who trusts the certificate itself sees
        whether the key is its own and whether its time has come and is not over.
        """
        cert, key = self._files.cert, self._files.key
        ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        theirs.check_hostname = bool(host)
        try:
            for context in (ours, theirs):
                # Without a password OpenSSL would ask for one at the terminal.
                context.load_cert_chain(cert, key, password="")
                context.load_verify_locations(trusted)
                context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            ours.verify_mode = ssl.CERT_REQUIRED
            return "", _shake_hands(ours, theirs, host)
        except ssl.SSLCertVerificationError as error:
            return f"not valid: {error.verify_message}", 0.0
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                return f"key_file {key} has the key of another certificate", 0.0
            return f"key_file {key} has no key that can be read without a password", 0.0
        except OSError as error:
            return str(error.strerror), 0.0


class _RenewedContext(ssl.SSLContext):
    """A server's context that leaves each connection to the one that is right for it.

    A new one knows no session of the one before: whoever was trusted by files that have changed is looked at again.
    """

    def __new__(cls, renewed: Callable[[], ssl.SSLContext]) -> Self:
        """Takes what returns the context for a connection that begins."""
        self = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        self._renewed = renewed
        return self

    _renewed: Callable[[], ssl.SSLContext]

    def wrap_socket(self, *args: Any, **options: Any) -> ssl.SSLSocket:
        """Returns a connection over a socket."""
        return self._renewed().wrap_socket(*args, **options)

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """Returns a connection in memory."""
        return self._renewed().wrap_bio(*args, **options)


def _is_under(clients: str, services: str) -> bool:
    """Whether a CA of the one file is in the other, or was certified by one that is."""
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    theirs.load_verify_locations(clients)
    ours.load_verify_locations(services)
    if set(theirs.get_ca_certs(binary_form=True)) & set(ours.get_ca_certs(binary_form=True)):
        return True
    names = [ca["subject"] for ca in ours.get_ca_certs()]
    # Two of one name that certify themselves are two.
    return any(ca["issuer"] in names and ca["issuer"] != ca["subject"] for ca in theirs.get_ca_certs())


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> float:
    """Lets two sides talk in memory until each has verified the other; returns when the client's certificate ends.

    Raises:
        ssl.SSLError: one of them refuses.
    """
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    served = server.wrap_bio(up, down, server_side=True)
    waiting = [client.wrap_bio(down, up, server_hostname=host or None), served]
    while waiting:
        for side in list(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
    shown = served.getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))
