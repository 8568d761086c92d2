"""Access: which tokens are believed, what their readers see, that a claim is never syntax."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from rich.pretty import pretty_repr
from structlog.testing import capture_logs

from tests.postgres import async_wait_until
from walstream.access import Cause, Gate, Reader, ReaderRefused, Sight
from walstream.access.jwks import MAX_BYTES, OLD_SECONDS, PAUSE_SECONDS, RETRY_SECONDS, Jwks
from walstream.access.keys import key_set, public_key, secret_key
from walstream.access.readers import Persona
from walstream.changes import Layout, Relation
from walstream.config.access import AccessConfig
from walstream.errors import ConfigError, FilterError
from walstream.grammar import And, Comparison, Filter, Not, Operator, Or, parse
from walstream.placeholders import ClaimPath, ClaimUnusable, RowCondition
from walstream.projection import Projection
from walstream.values import Types

SECRET: Final = "correct horse battery staple, and more of it"  # noqa: S105 - of these tests alone
CANARY: Final = "canary-of-a-claim"


def private_key(kind: str = "RSA") -> Any:
    match kind:
        case "RSA":
            return rsa.generate_private_key(65537, 2048)
        case "EC":
            return ec.generate_private_key(ec.SECP256R1())
        case _:
            return ed25519.Ed25519PrivateKey.generate()


RSA_KEY: Final = private_key("RSA")
EC_KEY: Final = private_key("EC")
ED_KEY: Final = private_key("Ed25519")
FOREIGN_KEY: Final = private_key("RSA")


def pem(key: Any) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    public: bytes = key.public_key().public_bytes(encoding, form)
    return public


def jwk(key: Any, kid: str | None = None, **members: Any) -> dict[str, Any]:
    """The public half of a key, as a provider publishes it."""
    algorithm = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    kind = next(made for known, made in algorithm.items() if isinstance(key, known))
    made: dict[str, Any] = kind.to_jwk(key.public_key(), as_dict=True)  # type: ignore[attr-defined]
    made.pop("key_ops", None)
    return made | ({} if kid is None else {"kid": kid}) | members


def claims(**others: Any) -> dict[str, Any]:
    """Claims that are let in; None takes one away."""
    now = int(time.time())
    everything = {"role": "viewer", "sub": "abc", "iat": now, "exp": now + 86400} | others
    return {name: value for name, value in everything.items() if value is not None}


def signed(key: Any = SECRET, algorithm: str = "HS256", header: Any = None, **others: Any) -> str:
    return jwt.encode(claims(**others), key, algorithm=algorithm, headers=header)


def by_hand(header: str | dict[str, Any], payload: str | dict[str, Any], key: str = SECRET) -> str:
    """A token signed by HMAC, whatever stands in it."""
    parts = [encoded(one if isinstance(one, str) else json.dumps(one)) for one in (header, payload)]
    algorithm = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    signature = algorithm.sign(".".join(parts).encode(), key.encode())
    return ".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=").decode()])


def encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


VIEWER: Final[dict[str, Any]] = {
    "status": True,
    "tables": [
        {"table": "public.messages", "where": "user_id=eq.{claims.sub}"},
        {"table": "public.events", "columns": {"exclude": ["ip"], "mask": {"email": "redact"}}},
    ],
}


def configured(**content: Any) -> AccessConfig:
    if not {"jwks_url", "jwks_file", "public_key_file", "secret_file"} & content.keys():
        content = {"secret": SECRET} | content
    return AccessConfig(**{"roles": {"viewer": VIEWER}} | content)


async def refused(token: str | None, **content: Any) -> ReaderRefused:
    gate = Gate(configured(**content))
    try:
        with pytest.raises(ReaderRefused) as caught:
            await gate.admit(token)
    finally:
        await gate.close()
    assert CANARY not in caught.value.reason + caught.value.hint + repr(caught.value)
    assert SECRET not in str(caught.value)
    return caught.value


async def admitted(token: str | None, **content: Any) -> Reader:
    gate = Gate(configured(**content))
    try:
        return await gate.admit(token)
    finally:
        await gate.close()


# ---- Tokens that are believed


async def test_a_token_makes_a_reader_of_its_role() -> None:
    reader = await admitted(signed(exp=4_000_000_000))
    assert (reader.role, reader.claims["sub"]) == ("viewer", "abc")
    assert reader.expires_at == 4_000_000_005, "exp and the leeway"
    assert (reader.can_see_status, reader.can_operate) == (True, False)


@pytest.mark.parametrize(
    ("content", "others"),
    [
        ({}, {"exp": time.time() + 86400.5}),
        ({"leeway_seconds": 1e7}, {"exp": int(time.time()) - 60}),
        ({"leeway_seconds": 1e7}, {"nbf": int(time.time()) + 86400}),
        ({}, {"aud": "anything", "iss": "anybody"}),
        ({}, {"sub": 5}),
        ({"audience": "web"}, {"aud": "web"}),
        ({"audience": ["web", "app"]}, {"aud": ["app", "other"]}),
        ({"issuer": "https://id.example.org"}, {"iss": "https://id.example.org"}),
        ({"role_claim": "app_metadata.role"}, {"role": "x", "app_metadata": {"role": "viewer"}}),
        (
            {"role_claim": '"https://example.org/role"'},
            {"role": None, "https://example.org/role": "viewer"},
        ),
    ],
)
async def test_what_is_as_configured_is_let_in(
    content: dict[str, Any], others: dict[str, Any]
) -> None:
    assert (await admitted(signed(**others), **content)).role == "viewer"


@pytest.mark.parametrize(
    ("key", "algorithms"),
    [
        (RSA_KEY, ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"]),
        (EC_KEY, ["ES256"]),
        (ED_KEY, ["EdDSA"]),
    ],
)
async def test_a_public_key_verifies_what_its_kind_signs(
    tmp_path: Path, key: Any, algorithms: list[str]
) -> None:
    (tmp_path / "key.pem").write_bytes(pem(key))
    for algorithm in algorithms:
        token = signed(key, algorithm)
        assert (await admitted(token, public_key_file=tmp_path / "key.pem")).role == "viewer"


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
async def test_longer_hashes_are_taken_where_they_are_asked_for(algorithm: str) -> None:
    secret = SECRET * 2
    token = signed(secret, algorithm)
    assert (await admitted(token, secret=secret, algorithms=[algorithm])).role == "viewer"
    if algorithm != "HS256":
        assert (await refused(token, secret=secret)).status == 401


async def test_an_end_that_no_timer_knows_is_the_end_of_the_calendar() -> None:
    for far in (10**300, 1e300):
        token = by_hand({"alg": "HS256"}, claims(exp=far))
        assert (await admitted(token)).expires_at == 253_402_300_804


async def test_keys_that_a_token_brings_along_are_not_looked_at() -> None:
    header = {
        "jwk": jwk(FOREIGN_KEY),
        "jku": "http://127.0.0.1:1/keys",
        "x5u": "http://127.0.0.1:1/cert",
        "x5c": ["abc"],
        "kid": "../../etc/passwd",
    }
    assert (await admitted(signed(header=header))).role == "viewer"
    token = signed(FOREIGN_KEY, "RS256", header=header)
    assert (await refused(token)).status == 401


# ---- Tokens that are not


NOW: Final = int(time.time())

NOT_BELIEVED: Final[dict[str, tuple[str, str]]] = {
    "expired": (signed(exp=NOW - 60), "has expired"),
    "expired long ago": (signed(exp=-1), "has expired"),
    "expired, as a boolean": (signed(exp=True), "has expired"),
    "not yet": (signed(nbf=NOW + 10**7), "not valid yet"),
    "issued in the future": (signed(iat=NOW + 10**7), "not valid yet"),
    "without an end": (signed(exp=None), "has no exp"),
    "with an end of null": (by_hand({"alg": "HS256"}, {"role": "viewer", "exp": None}), "no exp"),
    "with an end in words": (signed(exp="4000000000"), "exp is no number"),
    "with an end that is a list": (signed(exp=[4000000000]), "no token"),
    "with an end that is no number": (by_hand({"alg": "HS256"}, '{"exp":NaN}'), "no token"),
    "with an end in infinity": (by_hand({"alg": "HS256"}, '{"exp":Infinity}'), "no token"),
    "with a beginning in words": (signed(nbf="0"), "nbf is no number"),
    "unsigned": (jwt.encode(claims(), "", algorithm="none"), "algorithm"),
    "unsigned, in capitals": (by_hand({"alg": "NONE"}, claims()), "algorithm"),
    "unsigned, with a dot less": (by_hand({"alg": "HS256"}, claims()).rpartition(".")[0], "token"),
    "without its signature": (
        by_hand({"alg": "HS256"}, claims()).rpartition(".")[0] + ".",
        "wrong",
    ),
    "without an algorithm": (by_hand({"typ": "JWT"}, claims()), "no token"),
    "with an algorithm of no name": (by_hand({"alg": None}, claims()), "no token"),
    "with a list of algorithms": (by_hand({"alg": ["HS256"]}, claims()), "no token"),
    "with two algorithms": (by_hand('{"alg":"none","alg":"HS256"}', claims()), "no token"),
    "of another algorithm": (signed(SECRET * 2, "HS512"), "algorithm"),
    "signed by an RSA key": (signed(RSA_KEY, "RS256"), "algorithm"),
    "signed by another secret": (signed("x" * 40), "signature is wrong"),
    "signed by no secret": (by_hand({"alg": "HS256"}, claims(), ""), "signature is wrong"),
    "with something critical": (by_hand({"alg": "HS256", "crit": ["x"]}, claims()), "no token"),
    "not encoded": (
        by_hand({"alg": "HS256", "b64": False, "crit": ["b64"]}, claims()),
        "no token",
    ),
    "with a key that is a number": (
        signed(header=None) and by_hand({"alg": "HS256", "kid": 5}, {}),
        "no token",
    ),
    "whose claims are a list": (by_hand({"alg": "HS256"}, "[1]"), "no token"),
    "whose claims are no JSON": (by_hand({"alg": "HS256"}, "{"), "no token"),
    "whose header is no JSON": (by_hand("{", claims()), "no token"),
    "whose header is a list": (by_hand("[]", claims()), "no token"),
    "whose header is deep": (by_hand("[" * 2000, claims()), "no token"),
    "whose claims are deep": (by_hand({"alg": "HS256"}, "[" * 2000), "no token"),
    "of two parts": ("e30.e30", "no token"),
    "of four parts": (signed() + ".e30", "no token"),
    "encrypted": ("e30.e30.e30.e30.e30", "no token"),
    "empty": ("", "no token"),
    "of dots": ("..", "no token"),
    "with a NUL": (signed() + "\0", "no token"),
    "with a NUL in it": (signed().replace(".", ".\0", 1), "no token"),
    "not of ASCII": (signed() + "é", "no token"),
    "half a character": ("\ud800", "no token"),
    "with a line end": (signed() + "\n", "no token"),
    "with a scheme before it": ("Bearer " + signed(), "no token"),
    "garbage": ("garbage", "no token"),
    "too long": ("x" * 8193, "longer than 8192 bytes"),
    "too long, and right": (signed(padding="x" * 8192), "longer than 8192 bytes"),
}


@pytest.mark.parametrize("token", NOT_BELIEVED)
async def test_who_it_is_is_not_known_by_a_token(token: str) -> None:
    text, reason = NOT_BELIEVED[token]
    error = await refused(text)
    assert error.status == 401
    assert reason in error.reason


CAUSES: Final[dict[str, Cause]] = {
    "expired": Cause.EXPIRED,
    "expired long ago": Cause.EXPIRED,
    "without an end": Cause.INCOMPLETE,
    "with an end of null": Cause.INCOMPLETE,
    "unsigned": Cause.SIGNATURE,
    "of another algorithm": Cause.SIGNATURE,
    "signed by another secret": Cause.SIGNATURE,
    "signed by no secret": Cause.SIGNATURE,
    "without its signature": Cause.SIGNATURE,
    "not yet": Cause.MALFORMED,
    "garbage": Cause.MALFORMED,
    "of two parts": Cause.MALFORMED,
    "too long": Cause.MALFORMED,
}


@pytest.mark.parametrize("token", CAUSES)
async def test_a_refusal_tells_its_cause(token: str) -> None:
    error = await refused(NOT_BELIEVED[token][0])
    assert error.cause is CAUSES[token]
    assert (error.expired_seconds_ago is not None) == (error.cause is Cause.EXPIRED)


async def test_an_expired_token_is_told_for_how_long_it_is() -> None:
    error = await refused(signed(exp=int(time.time()) - 60))
    assert 60 <= (error.expired_seconds_ago or 0) < 75
    forged = signed("x" * 40, exp=NOW - 60)
    assert (await refused(forged)).expired_seconds_ago is None, "its signature is wrong"


async def test_other_refusals_tell_their_causes() -> None:
    assert (await refused(None)).cause is Cause.MISSING
    assert (await refused(signed(role=None))).cause is Cause.INCOMPLETE
    assert (await refused(signed(role="other"))).cause is Cause.FORBIDDEN
    assert (await refused(signed(sub=None))).cause is Cause.FORBIDDEN
    assert ReaderRefused(503, "").cause is Cause.UNAVAILABLE


# ---- Keys that are no tokens


API_KEY: Final = "sb_publishable_0123456789"
OPEN: Final[dict[str, Any]] = {"tables": [{"table": "public.news"}]}
TWO_ROLES: Final = {"viewer": VIEWER, "anon": OPEN}


def keyed(**key: Any) -> dict[str, Any]:
    return {"roles": TWO_ROLES, "api_keys": [{"role": "anon"} | key]}


async def test_an_api_key_stands_for_a_role(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(API_KEY + "\n")
    for content in (keyed(key=API_KEY), keyed(key_file=tmp_path / "key")):
        reader = await admitted(API_KEY, **content)
        assert (reader.role, reader.claims, reader.expires_at) == ("anon", {}, None)
        assert (await admitted(signed(), **content)).role == "viewer", "tokens go on to count"
        for wrong in (API_KEY[:-1], API_KEY + "0", API_KEY.upper(), API_KEY + "é", ""):
            assert (await refused(wrong, **content)).status == 401


async def test_api_keys_need_no_key_for_tokens() -> None:
    content = keyed(key=API_KEY)
    gate = Gate(AccessConfig(**content))
    assert (await gate.admit(API_KEY)).role == "anon"
    with pytest.raises(ReaderRefused, match="tokens are not taken here"):
        await gate.admit(signed())
    assert API_KEY not in repr(AccessConfig(**content))


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ({"key": API_KEY, "role": "other"}, "found 'other'; allowed: viewer, anon"),
        ({"key": API_KEY, "role": "viewer"}, "needs the claim sub"),
        ({"key": "short"}, "found 5 characters"),
        ({"key": API_KEY + " "}, "found blanks"),
        ({}, "needs key or key_file"),
        ({"key": API_KEY, "key_file": "/dev/null"}, "needs key or key_file"),
    ],
)
def test_an_api_key_that_is_none_is_a_mistake(key: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        AccessConfig(**keyed(**key))


def test_a_key_stands_for_one_role() -> None:
    keys = [{"key": API_KEY, "role": "anon"}] * 2
    with pytest.raises(ValueError, match=re.escape("[1].key: found the one of [0]")):
        AccessConfig(roles=TWO_ROLES, api_keys=keys)


def test_a_file_of_an_api_key_is_read_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("short")
    with pytest.raises(ConfigError, match=r"api_keys\[0\].key_file: found 5 characters"):
        Gate(AccessConfig(**keyed(key_file=tmp_path / "key")))


async def test_a_token_that_was_changed_is_refused() -> None:
    header, payload, signature = signed().split(".")
    for text in (encoded('{"role":"admin"}'), payload[:-4], payload + "AAAA"):
        assert (await refused(f"{header}.{text}.{signature}")).status == 401
    assert (await refused(f"{header}.{payload}.{signature[:-4]}")).status == 401


@pytest.mark.parametrize(
    ("content", "others", "reason"),
    [
        ({"audience": "web"}, {}, "has no aud"),
        ({"audience": "web"}, {"aud": CANARY}, "another audience"),
        ({"audience": "web"}, {"aud": [CANARY]}, "another audience"),
        ({"audience": "web"}, {"aud": []}, "has no aud"),
        ({"audience": "web"}, {"aud": {"web": 1}}, "another audience"),
        ({"audience": "web"}, {"aud": [["web"]]}, "another audience"),
        ({"issuer": "us"}, {}, "has no iss"),
        ({"issuer": "us"}, {"iss": CANARY}, "another issuer"),
        ({"leeway_seconds": 0}, {"exp": NOW - 1}, "has expired"),
    ],
)
async def test_a_token_for_others_is_refused(
    content: dict[str, Any], others: dict[str, Any], reason: str
) -> None:
    error = await refused(signed(**others), **content)
    assert (error.status, reason in error.reason) == (401, True)


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"role": None}, "has no claim role"),
        ({"role": CANARY}, "no [access.roles.<name>]"),
        ({"role": "Viewer"}, "no [access.roles.<name>]"),
        ({"role": ""}, "no [access.roles.<name>]"),
        ({"role": ["viewer"]}, "not one role's name"),
        ({"role": {"viewer": True}}, "not one role's name"),
        ({"role": 5}, "not one role's name"),
        ({"sub": None}, "claim sub is missing"),
        ({"sub": [CANARY]}, "claim sub is of a type"),
        ({"sub": {CANARY: CANARY}}, "claim sub is of a type"),
        ({"sub": CANARY + "\0"}, "claim sub has a character"),
        ({"sub": CANARY + "\ud800"}, "claim sub has a character"),
    ],
)
async def test_who_is_known_and_may_not_is_refused_otherwise(
    others: dict[str, Any], reason: str
) -> None:
    error = await refused(signed(**others))
    assert (error.status, reason in error.reason) == (403, True)


@given(st.text() | st.lists(st.text(alphabet="eyJ0.-_=", max_size=20), max_size=5).map(".".join))
def test_no_text_is_let_in_by_chance(token: str) -> None:
    error = asyncio.run(refused(token))
    assert error.status == 401


_JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["exp", "nbf", "iat", "aud", "iss", "sub", "role"]), _JSON))
def test_whatever_is_signed_is_admitted_or_refused(payload: dict[str, Any]) -> None:
    gate = Gate(configured(audience="web", issuer="us"))
    try:
        reader = asyncio.run(gate.admit(by_hand({"alg": "HS256"}, payload)))
    except ReaderRefused:
        return
    assert reader.expires_at is not None


# ---- Keys are used for what they are


@pytest.mark.parametrize("kind", ["pem", "jwks"])
@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
async def test_a_public_key_is_no_secret(tmp_path: Path, kind: str, algorithm: str) -> None:
    """The oldest attack: an HMAC whose secret is what everybody knows."""
    file = tmp_path / "key"
    text = pem(RSA_KEY) if kind == "pem" else json.dumps({"keys": [jwk(RSA_KEY, "a")]}).encode()
    file.write_bytes(text)
    content: dict[str, Any] = {"public_key_file" if kind == "pem" else "jwks_file": file}
    header = {"alg": algorithm, "kid": "a"}
    modulus = jwk(RSA_KEY)["n"]
    for secret in (text, text.strip(), modulus.encode(), json.dumps(jwk(RSA_KEY, "a")).encode()):
        token = by_hand(header, claims(), secret.decode())
        error = await refused(token, **content)
        assert (error.status, "algorithm" in error.reason) == (401, True)


async def test_the_wrong_kind_of_key_verifies_nothing(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(pem(RSA_KEY))
    for key, algorithm in ((EC_KEY, "ES256"), (ED_KEY, "EdDSA"), (FOREIGN_KEY, "RS256")):
        error = await refused(signed(key, algorithm), public_key_file=tmp_path / "key")
        assert error.status == 401
    token = signed(RSA_KEY, "RS512")
    content: dict[str, Any] = {"public_key_file": tmp_path / "key", "algorithms": ["RS256"]}
    assert (await refused(token, **content)).status == 401


def test_a_key_in_a_set_is_for_its_algorithm_alone() -> None:
    assert key_set_of(jwk(RSA_KEY))[0].algorithms == {
        *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
    }
    assert key_set_of(jwk(RSA_KEY, alg="PS256"))[0].algorithms == {"PS256"}
    assert key_set_of(jwk(EC_KEY))[0].algorithms == {"ES256"}
    assert key_set_of(jwk(ED_KEY))[0].algorithms == {"EdDSA"}
    assert key_set_of(jwk(EC_KEY, key_ops=["verify"], use="sig"))


def key_set_of(*keys: Any) -> list[Any]:
    found, left_out = key_set(json.dumps({"keys": keys}).encode())
    assert len(found) + left_out == len(keys)
    return found


@pytest.mark.parametrize(
    "key",
    [
        {"kty": "oct", "k": encoded(SECRET), "kid": "a"},
        {"kty": "oct", "k": encoded(SECRET), "kid": "a", "alg": "RS256"},
        jwk(RSA_KEY, alg="HS256"),
        jwk(RSA_KEY, alg="none"),
        jwk(RSA_KEY, alg="ES256"),
        jwk(RSA_KEY, alg=["RS256"]),
        jwk(RSA_KEY, use="enc"),
        jwk(RSA_KEY, use=5),
        jwk(RSA_KEY, key_ops=["encrypt"]),
        jwk(RSA_KEY, key_ops="verify"),
        jwk(RSA_KEY) | {"kid": 5},
        jwk(RSA_KEY) | {"n": 5},
        jwk(RSA_KEY) | {"n": ""},
        jwk(RSA_KEY) | {"e": "!"},
        jwk(RSA_KEY) | {"kty": "EC"},
        jwk(RSA_KEY) | {"kty": ["RSA"]},
        jwk(EC_KEY) | {"crv": "P-521"},
        jwk(EC_KEY) | {"x": jwk(EC_KEY)["y"]},
        jwk(ec.generate_private_key(ec.SECP256K1())),
        jwk(ED_KEY) | {"crv": "X25519"},
        jwk(rsa.generate_private_key(65537, 1024)),  # noqa: S505 - that is the point
        {},
        [],
        None,
        "key",
    ],
)
def test_a_key_that_is_not_for_tokens_is_left_out_of_its_set(key: Any) -> None:
    assert key_set_of(key) == []
    assert len(key_set_of(key, jwk(EC_KEY))) == 1


def test_a_private_key_in_a_set_is_its_public_half() -> None:
    private = jwt.algorithms.RSAAlgorithm.to_jwk(RSA_KEY, as_dict=True)
    [key] = key_set_of(private | {"key_ops": ["verify"]})
    assert isinstance(key.value, rsa.RSAPublicKey)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"keys":{}}', b"\xff", b"[" * 5000])
def test_what_is_no_set_of_keys_is_told(text: bytes) -> None:
    with pytest.raises(ValueError, match="no JWK Set"):
        key_set(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "no public key in PEM"),
        (b"-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY-----", "no public key in PEM"),
        (
            RSA_KEY.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            "found a private key",
        ),
        (pem(rsa.generate_private_key(65537, 1024)), "of 1024 bits"),  # noqa: S505
        (pem(ec.generate_private_key(ec.SECP256K1())), "of a kind that signs no tokens"),
    ],
)
def test_a_file_of_another_key_is_a_mistake_of_the_configuration(
    tmp_path: Path, text: bytes, said: str
) -> None:
    (tmp_path / "key").write_bytes(text)
    with pytest.raises(ConfigError, match=said) as caught:
        Gate(configured(public_key_file=tmp_path / "key"))
    assert caught.value.problems[0].startswith("access.public_key_file: found")


def test_a_public_key_in_the_place_of_the_secret_is_refused() -> None:
    for secret in (pem(RSA_KEY).decode(), json.dumps(jwk(RSA_KEY))):
        with pytest.raises((ValueError, ConfigError), match="public_key_file"):
            Gate(configured(secret=secret))


def test_algorithms_that_a_key_is_not_for_are_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(pem(EC_KEY))
    with pytest.raises(ConfigError, match=r"algorithms: found 'RS256'; allowed with .*: ES256"):
        Gate(configured(public_key_file=tmp_path / "key", algorithms=["ES256", "RS256"]))


# ---- Sets of keys that change


class Provider:
    """A server of keys."""

    def __init__(self) -> None:
        self.answers: Callable[[], bytes] = lambda: b""
        self.keys: list[Any] = []
        self.fetched = 0
        self.now = 0.0
        self.set = Jwks("id.example.org", self._fetch, clock=lambda: self.now)

    def _fetch(self) -> bytes:
        self.fetched += 1
        return self.answers() or json.dumps({"keys": self.keys}).encode()

    def fails(self, error: Exception | None) -> None:
        def answer() -> bytes:
            if error is not None:
                raise error
            return b""

        self.answers = answer

    async def status(self, kid: str | None, algorithm: str = "RS256") -> int:
        """200 if there is such a key, otherwise the status of the refusal."""
        try:
            await self.set.key(algorithm, kid)
        except ReaderRefused as error:
            return error.status
        return 200


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    provider = Provider()
    provider.keys = [jwk(RSA_KEY, "a"), jwk(EC_KEY, "b")]
    yield provider
    await provider.set.close()


async def test_keys_are_fetched_once_however_many_wait_for_them(provider: Provider) -> None:
    assert await asyncio.gather(*(provider.status("a") for _ in range(50))) == [200] * 50
    assert provider.fetched == 1


async def test_a_key_is_found_by_its_name_and_its_kind(provider: Provider) -> None:
    assert [await provider.status(kid) for kid in ("a", "b", "c", None)] == [200, 401, 401, 200]
    assert [await provider.status(kid, "ES256") for kid in ("a", "b", None)] == [401, 200, 200]
    provider.keys.append(jwk(FOREIGN_KEY, "c"))
    provider.now += PAUSE_SECONDS
    assert await provider.status("c") == 200
    assert await provider.status(None) == 401, "two keys could be meant"


async def test_unknown_names_have_the_set_read_again_but_not_each_time(provider: Provider) -> None:
    assert await provider.status("a") == 200
    for name in range(100):
        assert await provider.status(f"unknown {name}") == 401
    assert provider.fetched == 1
    provider.keys = [jwk(FOREIGN_KEY, "new")]
    provider.now += PAUSE_SECONDS
    assert [await provider.status(kid) for kid in ("new", "a")] == [200, 401]
    assert provider.fetched == 2


async def test_known_keys_go_on_working_while_the_provider_is_away(provider: Provider) -> None:
    assert await provider.status("a") == 200
    provider.fails(OSError(111, "Connection refused"))
    with capture_logs() as logs:
        for _ in range(3):
            provider.now += OLD_SECONDS + 1
            assert await provider.status("a") == 200
            assert await provider.status("unknown") == 503
    assert provider.fetched == 4
    assert logs[0] == {
        "event": "jwks_unreadable",
        "log_level": "warning",
        "source": "id.example.org",
        "reason": "Connection refused",
        "keys": 2,
    }


async def test_a_key_that_was_taken_back_is_believed_until_the_set_is_read_again(
    provider: Provider,
) -> None:
    assert await provider.status("a") == 200
    provider.keys = [jwk(EC_KEY, "b")]
    provider.now += OLD_SECONDS + 1
    await provider.status("a")
    await async_wait_until(lambda: provider.fetched == 2 and provider.set._reading is None)
    assert await provider.status("a") == 401


async def test_without_any_key_nobody_is_refused_for_good(provider: Provider) -> None:
    provider.fails(TimeoutError())
    with capture_logs() as logs:
        assert [await provider.status("a") for _ in range(10)] == [503] * 10
    assert provider.fetched == 1
    assert [entry["reason"] for entry in logs] == ["there was no answer in time"]
    provider.fails(None)
    assert await provider.status("a") == 503
    provider.now += RETRY_SECONDS
    assert await provider.status("a") == 200


async def test_what_is_no_set_of_keys_leaves_the_known_ones(provider: Provider) -> None:
    assert await provider.status("a") == 200
    provider.answers = lambda: b"<html>"
    provider.now += OLD_SECONDS + 1
    assert [await provider.status(kid) for kid in ("a", "a", "c")] == [200, 200, 503]


async def test_an_empty_set_is_a_set(provider: Provider) -> None:
    provider.keys = []
    assert await provider.status("a") == 401


async def test_one_who_is_cancelled_does_not_stop_the_others(provider: Provider) -> None:
    is_asked, may_answer = threading.Event(), threading.Event()

    def answer() -> bytes:
        is_asked.set()
        may_answer.wait(10)
        return b""

    provider.answers = answer
    first = asyncio.create_task(provider.status("a"))
    second = asyncio.create_task(provider.status("a"))
    await asyncio.to_thread(is_asked.wait, 10)
    first.cancel()
    await asyncio.wait([first])
    may_answer.set()
    assert await second == 200


async def test_closing_does_not_wait_for_a_provider_that_hangs(provider: Provider) -> None:
    is_asked, may_answer = threading.Event(), threading.Event()

    def answer() -> bytes:
        is_asked.set()
        may_answer.wait(10)
        return b""

    provider.answers = answer
    waiting = asyncio.create_task(provider.status("a"))
    await asyncio.to_thread(is_asked.wait, 10)
    await provider.set.close()
    assert await waiting == 503
    may_answer.set()


@contextmanager
def serving(respond: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server that answers by HTTP; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            respond(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/keys?apikey={CANARY}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answering(status: int, body: bytes, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return respond


async def test_keys_come_by_http() -> None:
    text = json.dumps({"keys": [jwk(RSA_KEY, "a")]}).encode()
    with serving(answering(200, text)) as url, capture_logs() as logs:
        token = signed(RSA_KEY, "RS256", header={"kid": "a"})
        assert (await admitted(token, jwks_url=url)).role == "viewer"
        token = signed(FOREIGN_KEY, "RS256", header={"kid": "a"})
        assert (await refused(token, jwks_url=url)).reason == "the token's signature is wrong"
    assert logs[0] == {
        "event": "jwks_read",
        "log_level": "info",
        "source": "127.0.0.1",
        "keys": 1,
        "left_out": 0,
    }
    assert CANARY not in str(logs)


@pytest.mark.parametrize(
    ("respond", "reason"),
    [
        (answering(500, b""), "HTTP 500"),
        (answering(302, b"", Location="/elsewhere"), "HTTP 302"),
        (answering(302, b"", Location="file:///etc/passwd"), "HTTP 302"),
        (answering(200, b"{}"), "it is no JWK Set"),
        (answering(200, b"x" * (MAX_BYTES + 1)), f"the answer is longer than {MAX_BYTES} bytes"),
        (lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"), "BadStatusLine"),
        (lambda handler: handler.connection.close(), ""),
    ],
)
async def test_a_provider_that_answers_otherwise_is_logged(
    respond: Callable[[BaseHTTPRequestHandler], None], reason: str
) -> None:
    with serving(respond) as url, capture_logs() as logs:
        token = signed(RSA_KEY, "RS256", header={"kid": "a"})
        assert (await refused(token, jwks_url=url)).status == 503
    [entry] = logs
    assert entry["event"] == "jwks_unreadable"
    assert entry["reason"]
    assert reason in entry["reason"]
    assert CANARY not in str(logs)


async def test_a_provider_that_is_not_there_is_logged() -> None:
    with capture_logs() as logs:
        error = await refused(
            signed(RSA_KEY, "RS256", header={"kid": "a"}), jwks_url="http://127.0.0.1:1/keys"
        )
    assert error.status == 503
    assert logs[0]["reason"] == "Connection refused"


async def test_a_file_of_keys_may_be_replaced(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [jwk(RSA_KEY, "a")]}))
    content: dict[str, Any] = {"jwks_file": file}
    assert (await admitted(signed(RSA_KEY, "RS256", header={"kid": "a"}), **content)).claims
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"access\.jwks_file: it is no JWK Set"):
        Gate(configured(**content))


# ---- Without a token


async def test_nobody_is_let_in_unless_it_is_configured() -> None:
    for token in (None, signed()):
        with pytest.raises(ReaderRefused) as caught:
            await Gate(AccessConfig()).admit(token)
        assert caught.value.status == 401
        assert "[access]" in caught.value.hint


async def test_without_a_token_nobody_is_let_in() -> None:
    error = await refused(None)
    assert (error.status, error.reason) == (401, "there is no token")
    assert "Authorization: Bearer" in error.hint


async def test_without_a_token_there_is_the_anonymous_role_if_it_is_given() -> None:
    roles = {"guest": {"tables": [{"table": "public.news"}]}, "viewer": VIEWER}
    gate = Gate(configured(roles=roles, anonymous_role="guest"))
    reader = await gate.admit(None)
    assert (reader.role, reader.claims, reader.expires_at) == ("guest", {}, None)
    with pytest.raises(ReaderRefused):
        await gate.admit(signed(exp=NOW - 60))  # a token that is bad is not as good as none
    only_anonymous = Gate(AccessConfig.model_validate({"roles": roles, "anonymous_role": "guest"}))
    assert (await only_anonymous.admit(None)).role == "guest"
    with pytest.raises(ReaderRefused, match="tokens are not taken here"):
        await only_anonymous.admit(signed())


# ---- What readers see


def layout(name: str, *ancestors: str, schema: str = "public") -> Layout:
    above = tuple(Relation("public", one) for one in ancestors)
    return Layout(Relation(schema, name), [], [], [], Types(lambda _: bytes.decode), above)


async def reader(*tables: Any, masking_key: bytes | None = None, **others: Any) -> Reader:
    config = configured(roles={"viewer": {"tables": list(tables)}})
    return await Gate(config, masking_key=masking_key).admit(signed(**others))


async def test_a_table_that_no_entry_covers_is_not_seen() -> None:
    viewer = await reader({"table": "public.messages"}, {"table": "audit.*"})
    assert viewer.sight(layout("messages")) == Sight("public.messages")
    assert viewer.sight(layout("log", schema="audit")) == Sight("audit.*")
    for other in (layout("Messages"), layout("messages", schema="audit2"), layout("users")):
        assert viewer.sight(other) is None
    assert (await reader()).sight(layout("messages")) is None


async def test_the_first_entry_counts() -> None:
    hidden = {"table": "public.users", "where": "id=eq.{claims.sub}"}
    viewer = await reader(hidden, {"table": "*.*"})
    sight = viewer.sight(layout("users"))
    assert sight is not None
    assert sight.where == parse("id=eq.abc")
    other = viewer.sight(layout("orders"))
    assert other is not None
    assert other.where is None


async def test_a_partition_is_seen_by_what_is_above_it() -> None:
    viewer = await reader({"table": "public.events"})
    assert viewer.sight(layout("events_2024", "events_year", "events")) == Sight("public.events")
    assert viewer.sight(layout("events_2024")) is None


async def test_walstreams_own_tables_are_seen_only_when_they_are_named() -> None:
    own = layout("dead_letters", schema="walstream")
    assert (await reader({"table": "*.*"}, {"table": "walstream.*"})).sight(own) is None
    assert (await reader({"table": "walstream.dead_letters"})).sight(own) is not None
    mine = frozenset({Relation("mine", "dead_letters")})
    config = configured(roles={"viewer": {"tables": [{"table": "*.*"}]}})
    viewer = await Gate(config, own_tables=mine).admit(signed())
    assert viewer.sight(layout("dead_letters", schema="mine")) is None


async def test_columns_that_are_left_out_or_masked_are_not_read() -> None:
    columns = {"include": ["id", "email", "ssn"], "exclude": ["ssn"], "mask": {"email": "redact"}}
    sight = (await reader({"table": "public.t", "columns": columns})).sight(layout("t"))
    assert sight is not None
    assert [sight.reads(name) for name in ("id", "email", "ssn", "other")] == [True] + [False] * 3
    everything = (await reader({"table": "public.t"})).sight(layout("t"))
    assert everything is not None
    assert everything.projection is None
    assert everything.reads("anything")


def test_a_hash_needs_a_key() -> None:
    table = {"table": "public.t", "columns": {"mask": {"email": "hash", "name": "hash"}}}
    config = configured(roles={"viewer": {"tables": [{"table": "a.b"}, table]}})
    with pytest.raises(ConfigError, match=r"access\.roles\.viewer\.tables\[1\]\.columns: "):
        Gate(config)
    Gate(config, masking_key=b"key")


async def test_who_sees_the_same_has_an_equal_sight() -> None:
    tables = [
        {"table": "public.t", "where": "team=eq.{claims.team}", "columns": {"exclude": ["x"]}}
    ]
    gate = Gate(configured(roles={"viewer": {"tables": tables}, "editor": {"tables": tables}}))
    sights = [
        (await gate.admit(signed(**others))).sight(layout("t"))
        for others in (
            {"sub": "a", "team": "red"},
            {"sub": "b", "team": "red", "exp": NOW + 10**6},
            {"role": "editor", "team": "red"},
            {"team": "blue"},
        )
    ]
    assert len(set(sights)) == 2
    assert len({hash(sight) for sight in sights}) == 2
    assert sights[0] == sights[1] == sights[2] != sights[3]
    assert isinstance(sights[0].projection if sights[0] else None, Projection)


async def test_claims_are_in_no_representation(tmp_path: Path) -> None:
    viewer = await reader({"table": "public.t", "where": "id=eq.{claims.sub}"}, sub=CANARY)
    sight = viewer.sight(layout("t"))
    for one in (viewer, sight, viewer.grants, [viewer], {"sight": sight}):
        for text in (repr(one), str(one), pretty_repr(one), f"{one}"):
            assert CANARY not in text
            assert re.search("viewer|public.t", text)
    for key in (secret_key(SECRET.encode()), public_key(pem(RSA_KEY))):
        assert SECRET not in repr(key) + pretty_repr(key)


# ---- Row conditions


CLAIMS: Final[dict[str, Any]] = {
    "sub": "abc",
    "teams": ["red", "blue"],
    "numbers": [1, 2.5],
    "mixed": ["a", 1, True],
    "none": None,
    "nothing": [],
    "holes": ["a", None],
    "nested": [["a"]],
    "yes": True,
    "no": False,
    "count": 7,
    "big": 2**70,
    "share": 0.1,
    "whole": 1.0,
    "empty": "",
    "infinite": float("inf"),
    "app_metadata": {"org": {"id": "o1"}, "tenant.id": "t1"},
    "https://example.org/tenant": "t2",
    "evil": 'x",id=eq.1)',
    "list": "a,b",
    "null": "null",
    "placeholder": "{claims.sub}",
}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("user_id=eq.{claims.sub}", "user_id=eq.abc"),
        ('user_id=eq."{claims.sub}"', "user_id=eq.abc"),
        ("user_id=neq.{claims.sub}", "user_id=neq.abc"),
        ("user_id=not.eq.{claims.sub}", "user_id=not.eq.abc"),
        ("user_id=isdistinct.{claims.sub}", "user_id=isdistinct.abc"),
        ("team=in.({claims.teams})", "team=in.(red,blue)"),
        ("team=in.({claims.teams},public)", "team=in.(red,blue,public)"),
        ("team=in.({claims.sub},{claims.teams})", "team=in.(abc,red,blue)"),
        ("team=not.in.({claims.teams})", "team=not.in.(red,blue)"),
        ("team=in.({claims.nothing})", "team=in.()"),
        ("n=in.({claims.numbers})", "n=in.(1,2.5)"),
        ("n=in.({claims.mixed})", "n=in.(a,1,true)"),
        ("n=gte.{claims.count}", "n=gte.7"),
        ("n=lt.{claims.big}", "n=lt.1180591620717411303424"),
        ("n=eq.{claims.share}", "n=eq.0.1"),
        ("n=eq.{claims.whole}", "n=eq.1.0"),
        ("b=eq.{claims.yes}", "b=eq.true"),
        ("b=eq.{claims.no}", "b=eq.false"),
        ("t=eq.{claims.empty}", 't=eq.""'),
        ("t=eq.{claims.null}", "t=eq.null"),
        ("org=eq.{claims.app_metadata.org.id}", "org=eq.o1"),
        ('org=eq.{claims.app_metadata."tenant.id"}', "org=eq.t1"),
        ('org=eq.{claims."https://example.org/tenant"}', "org=eq.t2"),
        ("or(a.eq.{claims.sub},and(b.is.true,c.in.({claims.teams})))", None),
        ("a=eq.{claims.evil}", 'a=eq."x\\",id=eq.1)"'),
        ("a=in.({claims.list})", 'a=in.("a,b")'),
        ("a=eq.{claims.placeholder}", "a=eq.{claims.sub}"),
        ("a=eq.5,b=like.x*,c=is.null", "a=eq.5,b=like.x*,c=is.null"),
        ('tags=eq."{1,2}",more=eq."{\\"red\\"}"', None),
    ],
)
def test_claims_take_the_place_of_their_placeholders(text: str, filled: str | None) -> None:
    found = RowCondition.parse(text).fill(CLAIMS)
    if filled is not None:
        assert found == parse(filled)
    assert "claims" not in str(found) or "placeholder" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a=eq.{claims.absent}", "the claim absent is missing"),
        ("a=eq.{claims.none}", "the claim none is missing"),
        ("a=eq.{claims.sub.inner}", r"the claim sub\.inner is missing"),
        ("a=eq.{claims.app_metadata.org.name}", r"app_metadata\.org\.name is missing"),
        ("a=eq.{claims.app_metadata}", "the claim app_metadata is of a type"),
        ("a=eq.{claims.teams}", "the claim teams is of a type"),
        ("a=gt.{claims.teams}", "the claim teams is of a type"),
        ("a=in.({claims.app_metadata})", "the claim app_metadata is of a type"),
        ("a=in.({claims.holes})", "the claim holes is missing"),
        ("a=in.({claims.nested})", "the claim nested is of a type"),
        ("a=eq.{claims.infinite}", "the claim infinite is of a type"),
        ("a=eq.1,or(b.eq.2,c.eq.{claims.absent})", "the claim absent is missing"),
    ],
)
def test_a_claim_that_cannot_fill_its_place_is_named(text: str, said: str) -> None:
    with pytest.raises(ClaimUnusable, match=said):
        RowCondition.parse(text).fill(CLAIMS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a",
        "a=eq",
        "a=eq.x{claims.sub}",
        "a=eq.{claims.sub}x",
        "a=eq.{claims.sub}{claims.sub}",
        "a=eq.{claims.sub},b=eq.-{claims.sub}",
        "a=eq.{claims}",
        "a=eq.{claims.}",
        "a=eq.{claims..sub}",
        "a=eq.{claims.sub.}",
        "a=eq.{claims.a b}",
        "a=eq.{ claims.sub }",
        "a=eq.{Claims.sub}",
        "a=eq.{claims[sub]}",
        "a=eq.{claim.sub}",
        "a=eq.{sub}",
        "a=eq.claims.sub",
        "a=neq.$claims.sub",
        "a=eq.{{claims.sub}}",
        "a=eq.{claims.sub}}",
        "a=neq.{ user.id }",
        "a=like.{claims.sub}",
        "a=ilike.{claims.sub}",
        "a=match.{claims.sub}",
        "a=imatch.{claims.sub}",
        "a=not.like.{claims.sub}",
        "a=is.{claims.sub}",
        "a=like.*{claims.sub}*",
        "a=in.{claims.teams}",
        "a=in.(x{claims.teams})",
        "{claims.sub}=eq.a",
        "a={claims.operator}.b",
        "{claims.everything}",
        "or({claims.everything})",
    ],
)
def test_a_placeholder_where_none_can_be_is_refused(text: str) -> None:
    with pytest.raises(FilterError):
        RowCondition.parse(text)


def test_the_claims_of_a_condition_are_known() -> None:
    condition = RowCondition.parse("or(a.eq.{claims.sub},b.in.({claims.x.y},1)),c=eq.{claims.sub}")
    assert [str(path) for path in condition.claims] == ["sub", "x.y"]


@given(st.lists(st.text(min_size=1), min_size=1, max_size=3))
def test_a_path_is_printed_so_that_it_is_read_again(names: list[str]) -> None:
    path = ClaimPath(tuple(names))
    assert ClaimPath.parse(str(path)) == path


# Whatever the grammar gives a meaning to, and some that it does not.
_SYNTAX: Final = st.text(alphabet='{}().,="\\ *%_\n\0abc1', max_size=12) | st.sampled_from(
    ["{claims.a}", "a=eq.1,b=eq.2", ")", '")', "in.(1)", "not.eq.1", "null", "*", "\ud800"]
)
_VALUES: Final = st.none() | st.booleans() | st.integers() | st.floats() | _SYNTAX | st.text()
_CONDITIONS: Final = st.sampled_from(
    [
        "x=eq.{claims.a}",
        "x=not.eq.{claims.a},y=in.({claims.b},z)",
        "or(x.eq.{claims.a},and(y.gt.{claims.b},z.eq.1)),w=like.a*",
        "not.and(x.in.({claims.a}),y.isdistinct.{claims.b})",
    ]
)


def shape(where: Filter) -> Any:
    """A filter without its values."""
    match where:
        case Comparison(column, operator, values):
            return column, operator, None if operator is Operator.IN else len(values)
        case Not(negated):
            return "not", shape(negated)
        case And(parts) | Or(parts):
            return type(where), tuple(map(shape, parts))


@given(_CONDITIONS, _VALUES | st.lists(_VALUES), _VALUES | st.lists(_VALUES))
def test_no_claim_changes_the_shape_of_a_condition(text: str, first: Any, second: Any) -> None:
    condition = RowCondition.parse(text)
    try:
        filled = condition.fill({"a": first, "b": second})
    except ClaimUnusable:
        return
    assert shape(filled) == shape(condition.where)
    assert parse(str(filled)) == filled, "also when it is printed and read again"


# ---- Row security


def secured(**table: Any) -> dict[str, Any]:
    return {"roles": {"viewer": {"tables": [{"table": "public.a", "rls": True} | table]}}}


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"rls": False, "deletes": "key"}, "it needs rls = true"),
        ({"deletes": "all"}, "Input should be 'none' or 'key'"),
        ({"rows": "all"}, "without where and rls"),
        ({"rls": False, "rows": "all", "where": "a=eq.1"}, "without where and rls"),
        ({"rls": False, "rows": "some"}, "Input should be 'all'"),
    ],
)
def test_rules_of_rows_that_contradict_are_mistakes(table: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        configured(**secured(**table))


def test_none_is_no_role_of_the_server() -> None:
    tables = [{"table": "public.a", "rls": True}]
    for roles in ({"none": {"tables": tables}}, {"a": {"tables": tables, "postgres_role": "none"}}):
        with pytest.raises(ValueError, match="cannot be asked as 'none'"):
            AccessConfig(roles=roles)


async def test_a_reader_under_row_security_is_asked_for_as_a_persona() -> None:
    reader = await admitted(signed(exp=4_000_000_000, iat=None, team=[1, "ö"]), **secured())
    [grant] = reader.grants
    persona = grant.sight.persona
    assert persona is not None
    assert persona.postgres_role == "viewer"
    assert json.loads(persona.claims) == reader.claims
    assert "abc" not in repr(reader) + repr(grant) + pretty_repr(grant) + repr(persona)
    content = secured()
    content["roles"]["viewer"]["postgres_role"] = "authenticated"
    content["anonymous_role"] = "viewer"
    [grant] = (await admitted(None, **content)).grants
    assert grant.sight.persona == Persona("authenticated", '{"role":"authenticated"}')


@pytest.mark.parametrize("claim", ["a\0b", "\ud800", {"deep": ["a\0"]}])
async def test_claims_that_the_server_cannot_read_are_refused(claim: Any) -> None:
    error = await refused(signed(note=claim), **secured())
    assert (error.status, error.cause) == (403, Cause.FORBIDDEN)


async def test_readers_of_the_same_claims_see_the_same() -> None:
    token = signed()
    first, second = await admitted(token, **secured()), await admitted(token, **secured())
    other = await admitted(signed(sub="other"), **secured())
    assert first.grants == second.grants != other.grants
    assert hash(first.grants) == hash(second.grants)
