"""``walstream access``: tokens for trying things out."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Annotated, Any, Final

import msgspec
import typer

from walstream.access import Gate, ReaderRefused
from walstream.access.keys import pyjwt
from walstream.cli.options import ConfigFile, load_config
from walstream.config import Config
from walstream.config.access import AccessConfig
from walstream.errors import UsageError
from walstream.placeholders import ClaimPath

app = typer.Typer(help="Who may read changes by HTTP.", no_args_is_help=True)

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@app.command()
def token(
    role: Annotated[str, typer.Option(metavar="ROLE", help="One of the configuration's roles.")],
    claim: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TEXT",
            help="A claim; NAME:=JSON for one that is no text. NAME may be a path such as"
            " app_metadata.team. May be given several times.",
        ),
    ] = None,
    expires: Annotated[
        str, typer.Option(metavar="TIME", help="How long it holds: 90s, 30m, 1h, 7d.")
    ] = "1h",
    config: ConfigFile = None,
) -> None:
    """Print a token that is signed with the secret of the configuration, to try things out.

    It is what an auth provider would make; issuer and audience are those of the configuration.
    Whoever has it may do what the role may, until it expires.
    """
    settings = load_config(config, None)
    secret = settings.access.signing_secret()
    if secret is None:
        raise UsageError(
            "the configuration has no secret to sign with",
            hint="only secret or secret_file under [access] can sign; with public keys tokens come"
            " from whoever has the private one",
        )
    if role not in settings.access.roles:
        known = ", ".join(settings.access.roles) or "none"
        raise UsageError(f"there is no role {role!r}", hint=f"the roles are: {known}")
    claims = _claims(settings.access, role, claim or [], _seconds(expires))
    algorithm = settings.access.allowed_algorithms[0]
    made: str = pyjwt().encode(claims, secret, algorithm=algorithm)
    asyncio.run(_verify(settings, made))
    typer.echo(made)


def _claims(
    access: AccessConfig, role: str, given: list[str], lifetime_seconds: int
) -> dict[str, Any]:
    now = int(time.time())
    claims: dict[str, Any] = {"iat": now, "exp": now + lifetime_seconds}
    if access.issuer is not None:
        claims["iss"] = access.issuer
    if access.audience is not None:
        claims["aud"] = access.audience[0]
    for text in given:
        _put(claims, *_claim(text))
    _put(claims, ClaimPath.parse(access.role_claim), role)
    return claims


def _claim(text: str) -> tuple[ClaimPath, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise UsageError(f"--claim: found {name!r}", hint="write NAME=TEXT or NAME:=JSON")
    try:
        path = ClaimPath.parse(name.removesuffix(":"))
        return path, msgspec.json.decode(value) if name.endswith(":") else value
    except msgspec.DecodeError:
        raise UsageError(
            f"--claim {name}: what stands behind = is not JSON",
            hint="""text is quoted in JSON, and again for the shell: --claim 'teams:=["a","b"]'""",
        ) from None
    except ValueError as error:
        raise UsageError(f"--claim: {error}") from None


def _put(claims: dict[str, Any], path: ClaimPath, value: Any) -> None:
    *above, last = path.names
    place = claims
    for name in above:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise UsageError(f"--claim {path}: {name} is a value, and has nothing inside of it")
    place[last] = value


def _seconds(text: str) -> int:
    matched = re.fullmatch(r"([1-9]\d{0,8})([smhd])", text)
    if matched is None:
        raise UsageError(f"--expires: found {text!r}", hint="write 90s, 30m, 1h or 7d")
    return int(matched[1]) * _UNITS[matched[2]]


async def _verify(settings: Config, made: str) -> None:
    """Refuse to make what would be refused: a condition on rows may need a claim."""
    gate = Gate(settings.access, masking_key=settings.masking.secret())
    try:
        await gate.admit(made)
    except ReaderRefused as refused:
        raise UsageError(
            f"with these claims the token would be refused: {refused.reason}",
            hint="give the claim by --claim NAME=TEXT; exp cannot be one",
        ) from None
    finally:
        await gate.close()
