"""The dashboard at ``/``: one page, for everybody, with nothing of the database in it.

What it shows it asks for as any other client does, with the token of who looks at it. The page is
one document: its style and script stand in it, and are the only ones that its policy lets run.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_STYLE: Final = "/* dashboard.css */"
_SCRIPT: Final = "/* dashboard.js */"


def dashboard_route() -> Route:
    """Make the path; it answers GET and HEAD."""
    page, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        # Asked for each time, and sent only when it is another one.
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(page).hexdigest()[:32]}"',
    }

    async def dashboard(request: Request) -> Response:
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(page, headers=headers, media_type="text/html")

    return Route("/", dashboard)


def _page() -> tuple[bytes, str]:
    """Put the page together; return it with its policy."""
    style, script = _text("dashboard.css"), _text("dashboard.js")
    page = _text("dashboard.html").replace(_STYLE, style).replace(_SCRIPT, script)
    policy = (
        "default-src 'none'",
        f"style-src '{_hash(style)}'",
        f"script-src '{_hash(script)}'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return page.encode(), "; ".join(policy)


def _text(name: str) -> str:
    return resources.files("walstream.gateway").joinpath("static", name).read_text("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
