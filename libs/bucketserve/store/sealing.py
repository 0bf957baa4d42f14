"""Encryption of what jobs, batches and files hold in the store: AES-256-GCM under keys of a file.

What is sealed says by which key, and is bound to its place: moved elsewhere in the store it can't be opened. What is
not sealed is taken as it is, so that keys may come where there are jobs already.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import cast

import redis.asyncio as aioredis

from bucketserve.core.errors import SettingsError, UnavailableError
from bucketserve.store.redis import guard

__all__ = ["PLAIN", "SealedError", "Sealer", "read_sealing_keys"]

MARK = b"\x00bs1"
"""Before what is sealed: neither a message nor JSON begins so."""
KEY_ID_BYTES, NONCE_BYTES = 4, 12
REASON = "JOB_KEY"
_KEY = re.compile(r"[0-9a-fA-F]{64}")


class SealedError(UnavailableError):
    """What is stored can't be opened here; the rest of the store can be used."""

    def __init__(self, message: str) -> None:
        """Says why."""
        super().__init__(message, reason=REASON)


def read_sealing_keys(path: Path) -> list[bytes]:
    """Returns the keys of a file: one a line, of 64 hexadecimal digits.

    Raises:
        SettingsError: it can't be read, or has something else, or nothing.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError([f"job_keys_file {path}: {problem}"]) from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found or not all(_KEY.fullmatch(line) for line in found):
        # Nothing of it is shown: it may be a key with a mistake.
        raise SettingsError([f"job_keys_file {path}: one key a line, of 64 hexadecimal digits, and nothing else"])
    return [bytes.fromhex(line) for line in found]


class Sealer:
    """Seals with the first of its keys and opens with any; without keys it does nothing."""

    def __init__(self, keys: Sequence[bytes] = ()) -> None:
        """Takes keys of 32 bytes."""
        self._ciphers = {}
        self._first = b""
        if keys:
            # 10 MiB that a gateway without keys need not hold.
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

            self._ciphers = {hashlib.sha256(key).digest()[:KEY_ID_BYTES]: AESGCM(key) for key in keys}
            self._first = next(iter(self._ciphers))

    def seal(self, data: bytes, place: str) -> bytes:
        """Returns data as it is stored at a place."""
        if not self._ciphers:
            return data
        nonce = secrets.token_bytes(NONCE_BYTES)
        return MARK + self._first + nonce + self._ciphers[self._first].encrypt(nonce, data, place.encode())

    def open(self, data: bytes, place: str) -> bytes:
        """Returns what was stored at a place.

        Raises:
            SealedError: it is sealed with a key that is not here, or was changed.
        """
        if not data.startswith(MARK):
            return data
        start = len(MARK) + KEY_ID_BYTES
        cipher = self._ciphers.get(data[len(MARK) : start])
        if cipher is None:
            raise SealedError("what is stored is sealed with a key that this gateway does not have")
        nonce, sealed = data[start : start + NONCE_BYTES], data[start + NONCE_BYTES :]
        from cryptography.exceptions import InvalidTag

        try:
            return cipher.decrypt(nonce, sealed, place.encode())
        except InvalidTag:
            raise SealedError("what is stored was changed by somebody else") from None

    async def check(self, client: aioredis.Redis, deployment: str) -> None:
        """Checks that what others seal can be opened here, and says what is sealed with from now on.

        Raises:
            SettingsError: it can't.
        """
        key = f"bs:{{{deployment}/jobs}}:sealed"
        try:
            found = await guard(cast(Awaitable[bytes | None], client.get(key)))
        except UnavailableError:
            # A gateway starts without its store.
            return
        try:
            self.open(found or b"", key)
        except SealedError:
            problem = "jobs in Redis are sealed with a key that is not in it, or there is no file"
            raise SettingsError([f"[gateway] job_keys_file: {problem}"]) from None
        if self._ciphers and (found or b"")[len(MARK) : len(MARK) + KEY_ID_BYTES] != self._first:
            await guard(cast(Awaitable[object], client.set(key, self.seal(b"", key))))


PLAIN = Sealer()
"""Does nothing."""
