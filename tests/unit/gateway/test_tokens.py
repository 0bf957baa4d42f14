"""Tokens of an identity provider: which are for us, what they say, and how its keys are kept."""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import os
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from bucketserve.config import load_settings
from bucketserve.core.errors import ForbiddenError, SettingsError, UnauthenticatedError
from bucketserve.core.types import RequestClass
from bucketserve.v1 import inference_pb2
from bucketserve_gateway.auth import Identity, Keys
from bucketserve_gateway.names import ModelNames
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_gateway.tokens import TokenRules, Tokens
from tests.certificates import Authority

ISSUER, AUDIENCE = "https://id.example/realm", "bucketserve"
KEYS: Mapping[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
OTHER = ec.generate_private_key(ec.SECP256R1())


def public(algorithm: str, key: Any, **more: str) -> dict[str, str]:
    form = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
    return {**form, "alg": algorithm, "kid": algorithm, **more}


SET = [public(algorithm, key) for algorithm, key in KEYS.items()]


def token(algorithm: str = "ES256", *, key: Any = None, headers: dict | None = None, **claims: Any) -> str:
    given = {"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 600, "tenant": "acme", "scope": "generate jobs"}
    named = {"kid": algorithm} if headers is None else headers
    content = {name: value for name, value in {**given, **claims}.items() if value is not None}
    return jwt.encode(content, key or KEYS[algorithm], algorithm, headers=named)


def written(folder: Path, content: Any) -> str:
    new = folder / "new"
    new.write_text(content if isinstance(content, str) else json.dumps({"keys": content}))
    os.replace(new, folder / "jwks.json")
    return str(folder / "jwks.json")


def tokens(where: str, problems: list[str] | None = None, tenant_claim: str = "tenant") -> Tokens:
    report = (problems if problems is not None else []).append
    return Tokens(TokenRules(where, ISSUER, AUDIENCE, tenant_claim), report)


def identity(folder: Path, text: str, **more: str) -> Identity:
    keys = Keys("", tokens=tokens(written(folder, SET), **more), names=ModelNames(["demo"]))
    return keys.identify({"authorization": f"Bearer {text}"})


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_token_says_whose_it_is_and_what_for(algorithm: str, tmp_path: Path) -> None:
    who = identity(tmp_path, token(algorithm))
    who.permit(message := inference_pb2.GenerateRequest())
    assert message.tenant == "acme"
    narrow = identity(
        tmp_path,
        token(algorithm, scope=["openid", "generate"], models=["large"], classes=["batch"], aud=["x", AUDIENCE]),
    )
    assert (narrow.scopes, narrow.models, narrow.classes) == ({"generate"}, {"large"}, {RequestClass.BATCH})
    with pytest.raises(ForbiddenError):
        narrow.permit(inference_pb2.GenerateRequest())
    assert identity(tmp_path, token(org="acme/2", tenant=None), tenant_claim="org").tenant == "acme/2"


def test_clocks_may_differ_a_little(tmp_path: Path) -> None:
    now = time.time()
    assert identity(tmp_path, token(exp=now - 5, nbf=now + 5, iat=now + 5)).tenant == "acme"


def unsigned(header: Any, payload: Any = None) -> str:
    def part(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()

    return f"{part(header)}.{part(payload or {'iss': ISSUER, 'aud': AUDIENCE, 'exp': 9e9, 'tenant': 'acme'})}."


PEM = (
    KEYS["RS256"].public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
)


def confused() -> str:
    """Signed with the public key as if it were a shared secret."""
    import hashlib
    import hmac

    text = unsigned({"alg": "HS256", "kid": "RS256"})[:-1]
    mark = hmac.new(PEM, text.encode(), hashlib.sha256).digest()
    return f"{text}.{base64.urlsafe_b64encode(mark).rstrip(b'=').decode()}"


def tampered() -> str:
    head, _, mark = token().split(".")
    return f"{head}.{unsigned({}, {'tenant': 'other'}).split('.')[1]}.{mark}"


NOT_FOR_US = {
    "another signer": lambda: token(key=OTHER),
    "another kind of key": lambda: token("RS256", headers={"kid": "ES256"}),
    "unknown key": lambda: token(headers={"kid": "none"}),
    "no key named, and there are several": lambda: token(headers={}),
    "tampered": tampered,
    "no signature": lambda: unsigned({"alg": "none", "kid": "ES256"}),
    "shared secret": confused,
    "expired": lambda: token(exp=time.time() - 60),
    "not yet": lambda: token(nbf=time.time() + 60),
    "never expires": lambda: token(exp=None),
    "expires at infinity": lambda: token(exp=float("inf")),
    "expires at some time": lambda: token(exp="tomorrow"),
    "another issuer": lambda: token(iss="https://id.example/other"),
    "no issuer": lambda: token(iss=None),
    "for another": lambda: token(aud="billing"),
    "for nobody": lambda: token(aud=None),
    "no tenant": lambda: token(tenant=None),
    "empty tenant": lambda: token(tenant=""),
    "tenant is a number": lambda: token(tenant=5),
    "tenant is long": lambda: token(tenant="x" * 65),
    "tenant has a line": lambda: token(tenant="a\nb"),
    "no scope of ours": lambda: token(scope="openid profile"),
    "no scope": lambda: token(scope=None),
    "scope is a number": lambda: token(scope=7),
    "models are a text": lambda: token(models="demo"),
    "no models": lambda: token(models=[]),
    "unknown class": lambda: token(classes=["urgent"]),
    "deep": lambda: unsigned("[" * 5000),
    "long": lambda: "a." + "x" * 10_000 + ".b",
    "dots": lambda: "...",
    "one dot": lambda: "a.b",
    "no base64": lambda: "ä.ö.ü",
    "no JSON": lambda: unsigned("{"),
    "header is a list": lambda: unsigned([1]),
    "kid is a list": lambda: unsigned({"alg": "ES256", "kid": ["ES256"]}),
}


@pytest.mark.parametrize("case", NOT_FOR_US)
def test_what_is_no_token_for_us_opens_nothing(case: str, tmp_path: Path) -> None:
    refused: list[str] = []
    keys = Keys("", tokens=tokens(written(tmp_path, SET)), on_refused=refused.append)
    text = NOT_FOR_US[case]()
    with pytest.raises(UnauthenticatedError, match="this token") as caught:
        keys.identify({"authorization": f"Bearer {text}"})
    assert refused == ["UNAUTHENTICATED"]
    assert text not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"keys": 5}', '{"keys": []}', '{"keys": [5]}', '{"keys": [{"kty": "RSA"}]}', "[" * 100_000,
     [{"kty": "oct", "k": "c2VjcmV0", "kid": "x"}], [public("ES256", OTHER, use="enc")]],
    ids=lambda content: str(content)[:30],
)  # fmt: skip
def test_a_file_without_public_keys_is_said_at_start(content: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"\[gateway\] jwks .*jwks.json: (not a JSON Web Key Set|no public key)"):
        tokens(written(tmp_path, content))


def test_a_file_is_read_again_and_what_is_wrong_keeps_the_former_keys(tmp_path: Path) -> None:
    problems: list[str] = []
    known = tokens(written(tmp_path, [public("ES256", OTHER)]), problems)
    # There is but one: which it is needs no name.
    assert known.grant_of(token(key=OTHER, headers={})).tenant == "acme"
    written(tmp_path, "{")
    assert known.grant_of(token(key=OTHER)).tenant == "acme"
    assert len(problems) == 1
    written(tmp_path, SET)
    with pytest.raises(UnauthenticatedError):
        known.grant_of(token(key=OTHER))
    assert known.grant_of(token()).tenant == "acme"


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({"JWKS": "http://id.example/keys"}, "JWKS: name a file or an https:// URL"),
        ({"JWKS": "keys.json"}, r"jwt_issuer: needed with jwks"),
        ({"JWKS": "keys.json", "JWT_ISSUER": "x"}, r"jwt_audience: needed with jwks"),
    ],
)
def test_settings_that_would_let_anybody_in_are_refused(environ: dict[str, str], problem: str) -> None:
    named = {f"BUCKETSERVE_GATEWAY_{name}": value for name, value in environ.items()}
    with pytest.raises(SettingsError, match=problem):
        load_settings({"gateway": GatewaySettings}, environ=named)


class Provider(http.server.BaseHTTPRequestHandler):
    """Answers with what a test puts here."""

    keys: ClassVar[list[dict[str, str]]] = []
    moved_to = ""
    num_asked = 0

    def do_GET(self) -> None:
        Provider.num_asked += 1
        if self.moved_to:
            self.send_response(302)
            self.send_header("Location", self.moved_to)
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"keys": self.keys}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    papers = Authority(tmp_path / "web").issue("id", "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(papers.ca))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(papers.cert, papers.key)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Provider.moved_to, Provider.keys, Provider.num_asked = "", [], 0
    yield f"https://127.0.0.1:{server.server_address[1]}/keys"
    server.shutdown()
    server.server_close()
    thread.join()


async def until(known: Tokens, text: str) -> None:
    while True:
        try:
            assert known.grant_of(text).tenant == "acme"
            return
        except UnauthenticatedError:
            await asyncio.sleep(0.02)


async def test_keys_at_a_url_come_as_soon_as_they_can_and_when_a_new_one_is_named(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bucketserve_gateway.tokens.RETRY_S", 0.05)
    problems: list[str] = []
    known = tokens(url, problems)
    task = asyncio.create_task(known.run())
    try:
        async with asyncio.timeout(60):
            # The provider has none yet, then it moves; nobody is followed elsewhere.
            while not problems:
                await asyncio.sleep(0.02)
            assert "no public key" in problems[0]
            Provider.keys, Provider.moved_to = [public("ES256", OTHER)], url + "2"
            while not any("302" in problem for problem in problems):
                await asyncio.sleep(0.02)
            with pytest.raises(UnauthenticatedError):
                known.grant_of(token(key=OTHER))
            Provider.moved_to = ""
            await until(known, token(key=OTHER))
            # The next regular look is minutes away.
            Provider.keys = SET
            await until(known, token("RS256"))
            before = Provider.num_asked
            await asyncio.sleep(0.3)
            assert Provider.num_asked <= before + 1
    finally:
        task.cancel()
        await asyncio.wait([task])
