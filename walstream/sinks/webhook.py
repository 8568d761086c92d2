"""Changes by HTTP: requests to a receiver, signed, in order, one at a time.

A change is taken when the receiver has answered with a status of 2xx. A request that fails is sent
again with the same body and the same ``webhook-id``, by which a receiver recognises that it has had
it. Statuses follow https://www.standardwebhooks.com and RFC 9110.

Neither a secret, nor what may be one (headers, a URL's user or query, what a receiver answers) gets
into a log or an error.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib.metadata import version
from pathlib import Path
from typing import Final
from urllib.parse import unquote

import httpx
import msgspec
import structlog

from walstream.changes import Change
from walstream.errors import ConfigError, SinkFailed, SinkRefused
from walstream.policy import Retry
from walstream.sinks.envelopes import Envelope, Packing, signature
from walstream.sinks.redirects import (
    MAX_REDIRECTS,
    REDIRECTS,
    RedirectRefused,
    Target,
    follow,
    origin,
)

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.sinks.webhook")

USER_AGENT: Final = f"walstream/{version('walstream')}"

WORTH_RETRYING: Final = (408, 425, 429)
"""Of the statuses 4xx: a timeout, "too early", and "too many requests". All others mean that the
same request would be refused again."""

_DRAIN_BYTES: Final = 1 << 16
_DRAIN_SECONDS: Final = 1.0
"""How much of an answer is read for the sake of the connection, which is used again then."""

_HINTS: Final = {
    401: "look at headers and secret of the sink",
    403: "look at headers and secret of the sink",
    404: "look at the sink's url",
    405: "look at the sink's url",
    410: "the receiver wants no more changes: remove the sink and its routes",
    413: "lower the sink's max_changes or max_request_bytes",
}


class ReceiverBusy(SinkFailed, Retry):
    """The receiver has told when it wants the change again."""

    def __init__(self, message: str, *, hint: str = "", delay_seconds: float) -> None:
        super().__init__(message, hint=hint)
        self.delay_seconds = delay_seconds


class WebhookOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a receiver is spoken to.

    ``read_keys`` returns the keys that sign, each for itself; it is called again at a reload.
    ``timeout_seconds`` bounds a request from its beginning to the
    end of the answer, redirects included. A receiver that wants to be asked later is asked after
    ``max_retry_after_seconds`` at the latest. ``proxy`` is for all requests; without it the
    environment names one. ``ca_file`` takes the place of the usual certificate authorities.
    """

    url: str
    headers: Mapping[str, str] = {}
    read_keys: Callable[[], tuple[bytes, ...]] = tuple
    packing: Packing = Packing()
    timeout_seconds: float = 30.0
    connect_timeout_seconds: float = 10.0
    max_retry_after_seconds: float = 300.0
    proxy: str | None = None
    ca_file: Path | None = None
    verify: bool = True
    allow_private_redirects: bool = False

    def __repr__(self) -> str:
        """Print without secrets."""
        return "WebhookOptions(...)"


class WebhookSink:
    """Posts changes, so many in a request as the options say."""

    def __init__(self, name: str, options: WebhookOptions) -> None:
        self.name = name
        # What fails as one request is then tried change by change, each of which may time out.
        self.max_changes = options.packing.max_changes
        self._options = options
        self._clients: _Clients | None = None
        self._target: Target | None = None
        self._credentials: dict[str, str] = {}
        self._keys: tuple[bytes, ...] = ()
        self._one_at_a_time = asyncio.Lock()
        self._accepted: list[Change] = []

    async def open(self) -> None:
        """Prepare to connect; the receiver need not be there yet.

        Raises:
            ConfigError: the URL, a secret, the proxy or the file of authorities cannot be used.
        """
        options = self._options
        self._keys = options.read_keys()
        self._clients = _Clients(self.name, options)
        try:
            url = httpx.URL(options.url)
            self._target = Target(url.copy_with(username=None, password=None, fragment=None))
        except (httpx.InvalidURL, ValueError):
            raise ConfigError([f"sinks.{self.name}.url: is not a URL of HTTP"]) from None
        self._credentials = _basic(url) | {
            name.lower(): value for name, value in options.headers.items()
        }
        if not options.verify:
            log.warning("webhook_not_verified", sink=self.name, url=self._target.shown)

    async def take(self, changes: Sequence[Change]) -> None:
        """Post the changes.

        Where a call has failed, what the receiver has accepted of its changes is not sent again.

        Raises:
            SinkRefused: the receiver will not have them.
            SinkFailed: it has not said that it has them all.
        """
        async with self._one_at_a_time:
            for envelope in self._options.packing.pack(self._still_to_send(changes)):
                await self._post(envelope)
                self._accepted += envelope.changes
            # Of a batch whose changes come again one by one, the others are still to come.
            del self._accepted[: len(changes)]

    async def reopen(self) -> None:
        """Read the secrets again: they may have been exchanged.

        Raises:
            ConfigError: there are none; those of before sign on.
        """
        self._keys = self._options.read_keys()

    async def close(self) -> None:
        """Close the connections."""
        self._accepted.clear()
        if self._clients is not None:
            await self._clients.close()

    def _still_to_send(self, changes: Sequence[Change]) -> Sequence[Change]:
        """Leave out what was accepted in a call that failed as a whole.

        It is recognised as the very objects that were given then: from the stream again, in another
        session, changes are other objects, and are sent again.
        """
        pairs = zip(self._accepted, changes, strict=False)
        if not all(accepted is change for accepted, change in pairs):
            self._accepted.clear()
        return changes[len(self._accepted) :]

    async def _post(self, envelope: Envelope) -> None:
        """Post one request, and follow where it is redirected to.

        Raises:
            SinkFailed: it was not accepted.
        """
        assert self._target is not None  # noqa: S101 - see open
        target = self._target
        try:
            async with asyncio.timeout(self._options.timeout_seconds):
                for _ in range(MAX_REDIRECTS + 1):
                    answer = await self._request(target, envelope)
                    if answer.status_code not in REDIRECTS:
                        break
                    target = await follow(
                        target,
                        answer.headers.get("location", ""),
                        allow_private=self._options.allow_private_redirects,
                    )
                else:
                    raise RedirectRefused(  # noqa: TRY301 - of the loop above
                        f"more than {MAX_REDIRECTS} redirects, one to the next"
                    )
        except TimeoutError:
            seconds = self._options.timeout_seconds
            raise self._failure(envelope, f"no answer within {seconds:g} s", target) from None
        except RedirectRefused as refused:
            hint = "set the sink's url to where it redirects to; to follow it to a private address,"
            hint += " allow_private_redirects = true"
            raise self._failure(envelope, str(refused), target, hint=hint) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            raise self._failure(envelope, self._why(error), target) from None
        self._judge(answer, envelope, target)

    async def _request(self, target: Target, envelope: Envelope) -> httpx.Response:
        """Send one request; return status and headers of the answer."""
        assert self._clients is not None  # noqa: S101 - see open
        headers = self._headers(target, envelope)
        extensions = {}
        url = target.url
        if target.address:
            headers["host"] = url.netloc.decode("ascii")
            extensions["sni_hostname"] = url.raw_host.decode("ascii")
            url = url.copy_with(host=target.address)
        headers["content-length"] = str(len(envelope.body))
        async with self._clients.client_for(target) as client:
            with _unlogged(), _body(envelope.body) as body:
                async with client.stream(
                    "POST", url, content=body, headers=headers, extensions=extensions
                ) as response:
                    await _drain(response)
                    return response

    def _headers(self, target: Target, envelope: Envelope) -> dict[str, str]:
        message_id, now = envelope.id(self.name), int(time.time())
        headers = dict(self._credentials) if target.is_trusted else {}
        headers["content-type"] = self._options.packing.content_type
        headers["webhook-id"] = message_id
        headers["webhook-timestamp"] = str(now)
        if self._keys:
            headers["webhook-signature"] = signature(self._keys, message_id, now, envelope.body)
        return headers

    def _judge(self, answer: httpx.Response, envelope: Envelope, target: Target) -> None:
        """Return if the request was accepted.

        Raises:
            SinkRefused: trying again would not help.
            ReceiverBusy: the receiver has said when to try again.
            SinkFailed: it was not accepted.
        """
        status = answer.status_code
        if answer.is_success:
            return
        if answer.is_client_error and status not in WORTH_RETRYING:
            failure = self._failure(envelope, f"status {status}", target)
            raise SinkRefused(failure.message, hint=_HINTS.get(status, ""))
        delay = retry_after_seconds(answer.headers, now=datetime.now(UTC))
        if delay is None:
            hint = "set the sink's url to where it redirects to" if answer.is_redirect else ""
            raise self._failure(envelope, f"status {status}", target, hint=hint)
        delay = min(delay, self._options.max_retry_after_seconds)
        failure = self._failure(envelope, f"status {status}, try again in {delay:g} s", target)
        raise ReceiverBusy(failure.message, delay_seconds=delay)

    def _failure(
        self, envelope: Envelope, what: str, target: Target, *, hint: str = ""
    ) -> SinkFailed:
        assert self._target is not None  # noqa: S101 - see open
        to = self._target.shown
        if target is not self._target:
            to += f", redirected to {origin(target.url)},"
        which = f"{envelope.first} to {envelope.last}"
        return SinkFailed(
            f"sink {self.name}: {to} did not accept changes {which}: {what}", hint=hint
        )

    def _why(self, error: Exception) -> str:
        """Say what happened, in words of our own: those of others may hold anything."""
        if isinstance(error, httpx.ConnectTimeout):
            return f"no connection within {self._options.connect_timeout_seconds:g} s"
        if isinstance(error, httpx.TimeoutException):
            return f"no answer within {self._options.timeout_seconds:g} s"
        known = next(filter(None, map(_reason, _causes(error))), "")
        cut = "the connection was cut" if isinstance(error, httpx.NetworkError) else ""
        return known or cut or type(error).__name__


def retry_after_seconds(headers: Mapping[str, str], *, now: datetime) -> float | None:
    """Return how long a receiver wants to be left alone; None when it does not say.

    RFC 9110, 10.2.3: "Retry-After = HTTP-date / delay-seconds". A date is seen from the receiver's
    own clock, if it tells the time.

    Args:
        headers: of the answer.
        now: the time here.
    """
    said = headers.get("retry-after", "").strip()
    if said.isascii() and said.isdecimal():
        return float(said) if len(said) < 10 and int(said) > 0 else None  # noqa: PLR2004 - 30 years
    until = _date(said)
    if until is None:
        return None
    seconds = (until - (_date(headers.get("date", "")) or now)).total_seconds()
    return seconds if seconds > 0 else None


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)


def _basic(url: httpx.URL) -> dict[str, str]:
    """Return a URL's user and password as a header, which can be left out for other hosts."""
    if not url.userinfo:
        return {}
    user, _, password = url.userinfo.partition(b":")
    pair = f"{unquote(user)}:{unquote(password)}".encode()
    return {"authorization": f"Basic {base64.b64encode(pair).decode()}"}


class _Body(httpx.AsyncByteStream):
    """The body of a request, which can be let go of."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.data


@contextlib.contextmanager
def _body(data: bytes) -> Iterator[_Body]:
    """Make a body that is let go of at the end of the block.

    httpx' responses and requests refer to each other in circles: they stay until the collector of
    cycles comes, which may be after hundreds of requests, and so would their bodies.
    """
    body = _Body(data)
    try:
        yield body
    finally:
        body.data = b""


async def _drain(response: httpx.Response) -> None:
    """Read a short answer to its end; after a long or slow one the connection is closed."""
    with contextlib.suppress(TimeoutError, httpx.HTTPError, httpx.StreamError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            size = 0
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size > _DRAIN_BYTES:
                    return


def _reason(error: BaseException) -> str:
    """Say what is known to hold nothing secret; nothing when that is not known."""
    reason = ""
    match error:
        case ssl.SSLCertVerificationError():
            reason = f"its certificate is not accepted: {error.verify_message}"
        case ssl.SSLError():
            reason = f"no TLS: {error.reason}"
        case socket.gaierror():
            reason = f"its name cannot be resolved: {error.strerror}"
        case OSError(errno=int(number)):
            reason = os.strerror(number)
        case httpx.ProxyError():
            status = str(error)[:3]
            reason = f"the proxy answered {status if status.isdecimal() else 'something else'}"
        case httpx.RemoteProtocolError():
            reason = "no answer, or none of HTTP"
    return reason


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        yield error
        error = error.__cause__ or error.__context__


class _Clients:
    """The client of the receiver, which keeps its connection, and those of redirects."""

    def __init__(self, sink: str, options: WebhookOptions) -> None:
        self._sink = sink
        self._options = options
        self._tls = self._tls_context()
        self._client = self._new()

    @contextlib.asynccontextmanager
    async def client_for(self, target: Target) -> AsyncIterator[httpx.AsyncClient]:
        """Lend a client.

        One of its own for a redirect: connections are told apart by address, and two hosts may
        share one.
        """
        if not target.address:
            yield self._client
            return
        async with self._new() as client:
            yield client

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _new(self) -> httpx.AsyncClient:
        options = self._options
        try:
            return httpx.AsyncClient(
                verify=self._tls,
                proxy=options.proxy,
                timeout=httpx.Timeout(
                    options.timeout_seconds, connect=options.connect_timeout_seconds
                ),
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
                headers={
                    "user-agent": USER_AGENT,
                    "accept-encoding": "identity",
                },
            )
        except (ImportError, ValueError, httpx.InvalidURL):
            where = "proxy" if options.proxy else "a proxy of the environment (HTTPS_PROXY, ...)"
            raise ConfigError(
                [f"sinks.{self._sink}: {where} is not one that can be used"],
                hint="it begins with http:// or https://; socks5:// needs pip install httpx[socks]",
            ) from None

    def _tls_context(self) -> ssl.SSLContext:
        options = self._options
        try:
            if options.ca_file is None:
                return httpx.create_ssl_context(verify=options.verify)
            return ssl.create_default_context(cafile=options.ca_file)
        except (OSError, ValueError) as error:
            raise self._unreadable_authorities(error) from None

    def _unreadable_authorities(self, error: OSError | ValueError) -> ConfigError:
        own, named = self._options.ca_file, os.environ.get("SSL_CERT_FILE")
        if isinstance(error, ssl.SSLError):
            why = "holds no certificates"
        elif isinstance(error, OSError):
            why = f"cannot be read: {error.strerror}"
        else:  # a NUL in its name
            why = "is not a path"
        if own is not None:
            return ConfigError(
                [f"sinks.{self._sink}.ca_file: {str(own)!r} {why}"],
                hint="it is a file of certificates in PEM that this process may read",
            )
        where = f"SSL_CERT_FILE: {named!r}" if named else "the file of the package certifi"
        return ConfigError(
            [f"sinks.{self._sink}: certificate authorities: {where} {why}"],
            hint="name a file of certificates in PEM that this process may read in SSL_CERT_FILE,"
            " or in the sink's ca_file",
        )


# ---- What others log

_is_ours: ContextVar[bool] = ContextVar("is_ours", default=False)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep httpx from logging the request, with its URL at level info and its headers at debug.

    Only for this sink: the program around may use httpx for itself.
    """
    token = _is_ours.set(True)
    try:
        yield
    finally:
        _is_ours.reset(token)


def _is_of_others(_: logging.LogRecord) -> bool:
    return not _is_ours.get()


for _name in (
    "httpx",
    *[f"httpcore.{part}" for part in ("connection", "http11", "proxy", "socks")],
):
    logging.getLogger(_name).addFilter(_is_of_others)
