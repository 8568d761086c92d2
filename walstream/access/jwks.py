"""Keys from a JWK Set that changes: by HTTP, or in a file.

It is read when the first token comes. Keys that are known are used also while it cannot be read
anew, which is tried in the background once they are old. A token that names a key that is not known
has it read at once, but not more often than every some seconds, however many such tokens come.
"""

from __future__ import annotations

import asyncio
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import structlog

from walstream.access.keys import Key, key_set
from walstream.access.refusals import UNAVAILABLE, Cause, ReaderRefused, unknown
from walstream.worker import Worker

log: structlog.stdlib.BoundLogger = structlog.get_logger("walstream.access")

OLD_SECONDS: Final = 600.0
"""A key that was taken back is believed at most as long as that, and until the next token."""

PAUSE_SECONDS: Final = 30.0
"""How soon the set is read again otherwise: when that failed, or for a key that is not in it."""

RETRY_SECONDS: Final = 5.0
"""How soon the set is read again when it could not be read and there are no older keys."""

FETCH_SECONDS: Final = 10.0
MAX_BYTES: Final = 1 << 20

_PIECE_BYTES: Final = 1 << 16


class Jwks:
    """Keeps a JWK Set."""

    def __init__(
        self,
        source: str,
        fetch: Callable[[], bytes],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read nothing yet.

        Args:
            source: where it is, for the log.
            fetch: reads it, in a thread; raises OSError, ValueError or HTTPException.
            clock: gives seconds.
        """
        self.source = source
        self._fetch = fetch
        self._clock = clock
        self._worker = Worker("walstream jwks")
        self._keys: Sequence[Key] | None = None
        self._read_at = self._tried_at = float("-inf")
        self._failure = ""
        self._reading: asyncio.Task[None] | None = None

    async def key(self, algorithm: str, kid: str | None) -> Key:
        """Return the key that a token names; one that names none is for the only key there is.

        Raises:
            ReaderRefused: 401, there is no such key; 503, the set cannot be read now.
        """
        if self._keys is not None and self._clock() - self._read_at > OLD_SECONDS:
            self._read_soon()
        found = self._find(algorithm, kid)
        if found is None:
            reading = self._read_soon()
            if reading is not None:
                await _done(reading)
                found = self._find(algorithm, kid)
        if found is not None:
            return found
        if self._failure or self._keys is None:
            raise ReaderRefused(
                UNAVAILABLE,
                "the keys that tokens are verified with cannot be read now",
                hint="try again in some seconds",
            )
        raise unknown(
            "the token is not signed by a key that is known here"
            if kid is not None
            else "the token does not name its key (kid)",
            Cause.SIGNATURE,
        )

    async def read(self) -> list[Key]:
        """Read it now, and return its keys.

        Raises:
            ValueError: it cannot be read; says why.
        """
        reading = self._reading or self._begin()
        await _done(reading)
        if self._failure:
            raise ValueError(self._failure)
        return list(self._keys or ())

    async def close(self) -> None:
        """Stop reading."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            await asyncio.wait([reading])

    def _find(self, algorithm: str, kid: str | None) -> Key | None:
        fitting = [key for key in self._keys or () if algorithm in key.algorithms]
        if kid is None:
            return fitting[0] if len(fitting) == 1 else None
        return next((key for key in fitting if key.kid == kid), None)

    def _read_soon(self) -> asyncio.Task[None] | None:
        """Begin to read, unless that goes on already; None when it was tried just now."""
        if self._reading is not None:
            return self._reading
        pause = RETRY_SECONDS if self._keys is None else PAUSE_SECONDS
        return self._begin() if self._clock() - self._tried_at >= pause else None

    def _begin(self) -> asyncio.Task[None]:
        self._tried_at = self._clock()
        self._reading = asyncio.create_task(self._read(), name="jwks")
        return self._reading

    async def _read(self) -> None:
        try:
            keys, left_out = key_set(await self._worker.call(self._fetch))
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._failure = _why(error)
            known = len(self._keys or ())
            log.warning("jwks_unreadable", source=self.source, reason=self._failure, keys=known)
        else:
            self._keys, self._failure, self._read_at = keys, "", self._clock()
            log.info("jwks_read", source=self.source, keys=len(keys), left_out=left_out)
        finally:
            self._reading = None


async def _done(reading: asyncio.Task[None]) -> None:
    """Wait for the reading that others wait for, too: it goes on when one of them is cancelled."""
    await asyncio.wait([reading])
    if not reading.cancelled():
        reading.result()


def jwks_of_url(url: str) -> Jwks:
    """Make the set that is at an address."""
    return Jwks(urlsplit(url).hostname or "", lambda: download(url))


def jwks_of_file(path: Path) -> Jwks:
    """Make the set that is in a file, which may be replaced."""
    return Jwks(str(path), path.read_bytes)


def download(url: str, *, seconds: float = FETCH_SECONDS, max_bytes: int = MAX_BYTES) -> bytes:
    """Read what is at an address; redirects are not followed.

    Raises:
        OSError: it cannot be read, or not in time.
        HTTPException: the answer is none of HTTP.
        ValueError: it is too long.
    """
    deadline = time.monotonic() + seconds
    opener = urllib.request.build_opener(_NoRedirects())
    request = urllib.request.Request(  # noqa: S310 - the configuration takes no scheme but HTTP's
        url, headers={"Accept": "application/json", "User-Agent": "walstream"}
    )
    content = bytearray()
    with opener.open(request, timeout=seconds) as response:
        while piece := response.read1(_PIECE_BYTES):
            content += piece
            if len(content) > max_bytes:
                raise ValueError(f"the answer is longer than {max_bytes} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError
    return bytes(content)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow none: the keys are believed because of their address."""


def _why(error: Exception) -> str:
    """Say what went wrong, without the address, which may hold a token of its own."""
    match error:
        case urllib.error.HTTPError():
            error.close()
            return f"HTTP {error.code}"
        case urllib.error.URLError(reason=OSError() as reason):
            return _why(reason)
        case TimeoutError():
            return "there was no answer in time"
        case OSError(strerror=str(reason)):
            return reason
        case ValueError():
            return str(error)
        case _:
            return type(error).__name__
