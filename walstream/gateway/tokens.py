"""Where a request carries its token: in the header, or where that cannot be set in the query.

An `EventSource` of a browser can set no header; for it there is ``?token=``. Whoever logs addresses
of requests must leave the query out.
"""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.types import Scope


def token_of(scope: Scope) -> str | None:
    """Return the bearer token of a request or a WebSocket; None where there is none.

    ``Authorization: Bearer`` counts before ``?token=``. Another scheme is left to whoever stands in
    between, and counts as none.
    """
    connection = HTTPConnection(scope)
    scheme, _, credentials = connection.headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return connection.query_params.get("token") or None


def api_key_of(connection: HTTPConnection) -> str | None:
    """Return the key of an application, where Supabase's clients carry it; None without one."""
    return connection.headers.get("x-api-key") or connection.query_params.get("apikey") or None
