"""Tokens of an identity provider (JWT): who may sign them, and what they say of their bearer."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
from pydantic import ValidationError

from bucketserve.core.errors import SettingsError, UnauthenticatedError
from bucketserve_gateway.keys import Grant, Scope

__all__ = ["TokenRules", "Tokens"]

# Signatures alone, and only those whose key can't be the public one.
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
LEEWAY_S = 30.0
"""By which clocks may differ."""
REFRESH_S, RETRY_S = 300.0, 5.0
FETCH_S = 10.0
MAX_SET_BYTES = 1 << 20
MAX_TOKEN_CHARACTERS = 8192


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a token must say to be one for us."""

    jwks: str
    """Path or https URL of the provider's keys."""
    issuer: str
    audience: str
    tenant_claim: str


class Tokens:
    """The provider's keys, which are read again as they change: a file with each token, a URL every few minutes."""

    def __init__(self, rules: TokenRules, on_problem: Callable[[str], None]) -> None:
        """Reads the keys if they are in a file; those at a URL come with run().

        Raises:
            SettingsError: the file can't be used.
        """
        self._rules = rules
        self._on_problem = on_problem
        self._file = None if rules.jwks.startswith("https://") else Path(rules.jwks)
        self._stamp: tuple[int, int, int] | None = None
        self._keys: dict[str, jwt.PyJWK] = {}
        self._is_unknown_named = asyncio.Event()
        if self._file is not None:
            self._stamp = _stamp_of(self._file)
            try:
                self._keys = _read_set(self._file.read_bytes())
            except (OSError, ValueError) as error:
                raise SettingsError([f"[gateway] jwks {self._file}: {_why(error)}"]) from None

    def grant_of(self, token: str) -> Grant:
        """Returns what a token says that its bearer may do.

        Raises:
            UnauthenticatedError: it is not a token for us, or not valid now; says why, as anybody could find out.
        """
        self._read_if_changed()
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise UnauthenticatedError("this token is too long")
        try:
            key = self._key_of(jwt.get_unverified_header(token))
            claims = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                issuer=self._rules.issuer,
                audience=self._rules.audience,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.InvalidTokenError as error:
            raise UnauthenticatedError(f"this token is not valid: {error}") from None
        except Exception as error:
            # Anybody writes tokens: whatever a parser stumbles over is none.
            raise UnauthenticatedError(f"this token is not valid ({type(error).__name__})") from None
        return self._grant(claims)

    async def run(self) -> None:
        """Keeps the keys at a URL up to date, for ever."""
        while self._file is None:
            try:
                self._keys = await asyncio.to_thread(_fetch, self._rules.jwks)
                pause_s = REFRESH_S
            except (OSError, ValueError) as error:
                self._on_problem(f"{self._rules.jwks}: {_why(error)}")
                pause_s = RETRY_S
            self._is_unknown_named.clear()
            await asyncio.sleep(RETRY_S)
            try:
                # A provider signs with a new key at once when it has one.
                async with asyncio.timeout(pause_s - RETRY_S):
                    await self._is_unknown_named.wait()
            except TimeoutError:
                continue

    def _key_of(self, header: dict[str, Any]) -> jwt.PyJWK:
        name = str(header.get("kid", ""))
        if not name and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        if name not in self._keys:
            self._is_unknown_named.set()
            raise jwt.InvalidTokenError("its key is not known here")
        return self._keys[name]

    def _grant(self, claims: dict[str, Any]) -> Grant:
        scope = claims.get("scope", "")
        named = scope.split() if isinstance(scope, str) else scope if isinstance(scope, list) else []
        try:
            return Grant(
                tenant=claims.get(self._rules.tenant_claim, ""),
                scopes=tuple(known for known in Scope if known.value in named),
                models=claims.get("models"),
                classes=claims.get("classes"),
            )
        except ValidationError as error:
            where = error.errors()[0]["loc"][0]
            claim = {"tenant": self._rules.tenant_claim, "scopes": "scope"}.get(str(where), str(where))
            raise UnauthenticatedError(f"this token's claim {claim!r} is missing or not of the form we know") from None

    def _read_if_changed(self) -> None:
        if self._file is None or (stamp := _stamp_of(self._file)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read_set(self._file.read_bytes())
        except (OSError, ValueError) as error:
            self._on_problem(f"{self._file}: {_why(error)}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Nobody but the named host says whom we trust."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _fetch(url: str) -> dict[str, jwt.PyJWK]:
    opener = urllib.request.build_opener(_NoRedirects)
    with opener.open(url, timeout=FETCH_S) as response:
        return _read_set(response.read(MAX_SET_BYTES))


def _read_set(content: bytes) -> dict[str, jwt.PyJWK]:
    """Returns the keys for signatures in a JSON Web Key Set, by name.

    Raises:
        ValueError: there is none; says why.
    """
    try:
        listed = json.loads(content)["keys"]
        usable = [key for key in listed if key.get("use", "sig") == "sig" and key.get("kty") in ("RSA", "EC", "OKP")]
        keys = {str(key.get("kid", "")): jwt.PyJWK(key) for key in usable}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, jwt.PyJWTError) as error:
        raise ValueError(f"not a JSON Web Key Set ({type(error).__name__})") from None
    if not keys:
        raise ValueError("no public key for signatures in it")
    return keys


def _stamp_of(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
