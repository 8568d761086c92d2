"""``/realtime/v1/api/broadcast``: something is said in a channel, by HTTP.

A list of messages comes to the path itself, one message to ``/<topic>/events/<event>`` below it.
They are heard by those who are in the channel, and answered with 202, as the clients of Supabase
Realtime expect. Of a list either all messages are said or none.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from walstream.access import Reader
from walstream.access.refusals import ReaderRefused
from walstream.gateway.answers import NO_STORE, Answering, refused, refusing
from walstream.gateway.tokens import api_key_of, token_of
from walstream.live.subscriptions import RequestRefused
from walstream.realtime.channels import PREFIX
from walstream.realtime.messages import (
    MAX_BINARY_NAME_BYTES,
    MAX_TOPIC_CHARACTERS,
    Malformed,
    verify_json,
)
from walstream.realtime.rates import Rates
from walstream.realtime.services import Services
from walstream.realtime.tally import Reason, Tally

PATHS: Final = ("/realtime/v1/api/broadcast", "/api/broadcast")

_LIST_HINT: Final = (
    'send {"messages": [{"topic": "room1", "event": "x", "payload": {}, "private": false}]}'
)
_NO_LIST: Final = "the body is no list of messages in JSON"
_MISTAKE: Final = re.compile(
    r"(?:Object missing required field `(\w+)`|Expected `([^`]+)`, got `([^`]+)`)"
    r"(?: - at `\$\.([^`]+)`)?"
)
_NOT_PERSISTENT: Final = (b"null", b"false")
_BINARY: Final = "application/octet-stream"
_MARK: Final = "/api/broadcast/"

_BAD_REQUEST: Final = 400
_FORBIDDEN: Final = 403
_NOT_FOUND: Final = 404
_TOO_LARGE: Final = 413
_UNPROCESSABLE: Final = 422
_TOO_MANY: Final = 429


class _Saying(msgspec.Struct, frozen=True):
    """What is to be said, and where."""

    topic: str
    event: str
    payload: msgspec.Raw
    private: bool | None = False
    persist: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def content(self) -> bytes:
        return bytes(self.payload)


class _Sayings(msgspec.Struct, frozen=True):
    messages: list[_Saying]


def broadcast_routes(services: Services) -> list[Route]:
    """Make the paths; there are none unless the configuration wants them."""
    if not services.config.enabled:
        return []
    broadcasts = _Broadcasts(services)
    say_all = refusing(_telling(broadcasts.say_all, services.refusals))
    say_one = refusing(_telling(broadcasts.say_one, services.refusals))
    return [
        route
        for path in PATHS
        for route in (
            Route(path, say_all, methods=["POST"]),
            Route(path + "/{rest:path}", say_one, methods=["POST"]),
        )
    ]


def _telling(answering: Answering, refusals: Tally) -> Answering:
    async def answer(request: Request) -> Response:
        try:
            return await answering(request)
        except ReaderRefused:
            refusals.add(Reason.HTTP)
            raise
        except RequestRefused as error:
            refusals.add(Reason.HTTP)
            response = refused(error.status, error.message, error.hint)
            if error.status == _TOO_MANY:
                response.headers["Retry-After"] = "1"
            return response

    return answer


class _Broadcasts:
    """Says what is handed in, if all of it may be said."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._config = services.config
        self._rates = Rates(self._config.messages_per_second, 1.0)

    async def say_all(self, request: Request) -> Response:
        reader = await self._reader(request)
        body = await _body(request, self._config.max_frame_bytes)
        places = {f"messages[{n}].": saying for n, saying in enumerate(_sayings(body))}
        return self._say(request, reader, places)

    async def say_one(self, request: Request) -> Response:
        reader = await self._reader(request)
        topic, event = _names(request)
        if "persist" in request.query_params or "persist[ttl]" in request.query_params:
            raise _not_stored("")
        body = await _body(request, self._config.max_broadcast_bytes)
        is_json = request.headers.get("content-type", "").partition(";")[0].strip() != _BINARY
        is_private = request.query_params.get("private", "").lower() == "true"
        saying = _Saying(topic, event, msgspec.Raw(body), is_private)
        return self._say(request, reader, {"": saying}, is_json=is_json)

    async def _reader(self, request: Request) -> Reader:
        return await self._services.gate.admit(_token_of(request))

    def _say(
        self,
        request: Request,
        reader: Reader,
        sayings: Mapping[str, _Saying],
        *,
        is_json: bool = True,
    ) -> Response:
        """Say all of them, by their places in what was sent, unless there is a mistake in one."""
        for place, saying in sayings.items():
            self._verify(place, saying, reader, is_json=is_json)
        self._count(request, reader, len(sayings))
        for saying in sayings.values():
            self._services.rooms.broadcast(
                (PREFIX + saying.topic, bool(saying.private)),
                saying.event,
                saying.content,
                is_json=is_json,
            )
        return Response(status_code=202, headers=NO_STORE)

    def _verify(self, place: str, saying: _Saying, reader: Reader, *, is_json: bool) -> None:
        for key, name in (("topic", saying.topic), ("event", saying.event)):
            _verify_name(f"{place}{key}", name, is_json=is_json)
        if bytes(saying.persist) not in _NOT_PERSISTENT:
            raise _not_stored(place)
        most = self._config.max_broadcast_bytes
        if len(saying.content) > most:
            raise _too_large(f"{place}payload", most)
        self._verify_right(place, saying, reader)
        if is_json:
            try:
                verify_json(saying.content)
            except Malformed as error:
                raise RequestRefused(_BAD_REQUEST, f"{place}payload: found {error}") from None

    def _verify_right(self, place: str, saying: _Saying, reader: Reader) -> None:
        if not saying.private:
            if not self._config.public_channels:
                reason = f"{place}private: there are only private channels here"
                raise RequestRefused(_FORBIDDEN, reason, hint="send it with private: true")
        elif not self._services.topics.may_write(reader, saying.topic):
            reason = f"{place}topic: the role {reader.role!r} may not write there"
            raise RequestRefused(_FORBIDDEN, reason, hint="[[realtime.private]] says who may")

    def _count(self, request: Request, reader: Reader, count: int) -> None:
        most = self._config.messages_per_second
        if count > most:
            reason = f"messages: found {count}; allowed: {most}"
            hint = "send fewer at once; realtime.messages_per_second is the bound"
            raise RequestRefused(_UNPROCESSABLE, reason, hint=hint)
        sender = (
            request.client and request.client.host,
            reader.role,
            str(reader.claims.get("sub")),
        )
        if not self._rates.take(sender, time.monotonic(), count):
            raise RequestRefused(_TOO_MANY, "Too many requests", hint="try again in a second")


def _token_of(request: Request) -> str | None:
    """Return the user's token if there is one, and otherwise the key of the application."""
    return token_of(request.scope) or request.headers.get("apikey") or api_key_of(request)


async def _body(request: Request, most: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise _too_large("the body", most)
    return bytes(body)


def _too_large(what: str, most: int) -> RequestRefused:
    return RequestRefused(_TOO_LARGE, f"{what} has more than {most} bytes")


def _sayings(body: bytes) -> list[_Saying]:
    try:
        return msgspec.json.decode(body, type=_Sayings).messages
    except msgspec.ValidationError as error:
        reason = _mistake(str(error))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        reason = _NO_LIST
    raise RequestRefused(_UNPROCESSABLE, reason, hint=_LIST_HINT)


def _mistake(told: str) -> str:
    """Say which field is missing or wrong, and the types; msgspec quotes no values of these."""
    matched = _MISTAKE.fullmatch(told)
    if matched is None:
        return _NO_LIST
    missing, expected, found, place = matched.groups(default="")
    if missing:
        return f"{place}.{missing}: is missing".removeprefix(".")
    return f"{place or 'the body'}: found {found}; allowed: {expected}"


def _not_stored(place: str) -> RequestRefused:
    return RequestRefused(_UNPROCESSABLE, f"{place}persist: broadcasts are not stored here")


def _names(request: Request) -> tuple[str, str]:
    """Read topic and event; in either a slash is written %2F, and means itself."""
    raw: bytes | None = request.scope.get("raw_path")
    path = request.scope["path"] if raw is None else raw.decode("latin-1").partition("?")[0]
    parts = path.partition(_MARK)[2].split("/")
    match parts:
        case [topic, "events", event]:
            return (topic, event) if raw is None else (_unquoted(topic), _unquoted(event))
        case _:
            hint = "ask for .../api/broadcast/<topic>/events/<event>"
            raise RequestRefused(_NOT_FOUND, "nothing is answered at this path", hint=hint)


def _unquoted(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise RequestRefused(_BAD_REQUEST, "the path is not UTF-8") from None


def _verify_name(key: str, name: str, *, is_json: bool) -> None:
    if not name:
        raise RequestRefused(_UNPROCESSABLE, f"{key}: is empty")
    if len(name) > MAX_TOPIC_CHARACTERS:
        reason = f"{key}: has more than {MAX_TOPIC_CHARACTERS} characters"
        raise RequestRefused(_UNPROCESSABLE, reason)
    most = MAX_BINARY_NAME_BYTES - len(PREFIX)
    if not is_json and len(name.encode()) > most:
        reason = f"{key}: has more than {most} bytes, which is too long with a payload in binary"
        raise RequestRefused(_UNPROCESSABLE, reason)
