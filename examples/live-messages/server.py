"""The page's own server: its files, the messages that there are, and a new one."""

from __future__ import annotations

import json
import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psycopg
from psycopg.rows import dict_row

DSN = os.environ["WALSTREAM_POSTGRES_DSN"]
PUBLIC = Path(__file__).parent / "public"


class Handler(SimpleHTTPRequestHandler):
    """Whatever is not a message is a file."""

    def do_GET(self) -> None:
        """Answer with the messages of a conversation, or a file."""
        address = urlsplit(self.path)
        if address.path != "/messages":
            super().do_GET()
            return
        [conversation] = parse_qs(address.query)["conversation"]
        with psycopg.connect(DSN, row_factory=dict_row) as connection:
            rows = connection.execute(
                "SELECT * FROM messages_v2 WHERE conversation_id = %s", [conversation]
            ).fetchall()
        self._answer(rows)

    def do_POST(self) -> None:
        """Write a message; it comes to the page as a change, like everybody's."""
        said = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with psycopg.connect(DSN) as connection:
            connection.execute(
                "INSERT INTO messages_v2 (conversation_id, sender, content)"
                " VALUES (%(conversation)s, %(sender)s, %(content)s)",
                said,
            )
        self._answer({})

    def _answer(self, content: object) -> None:
        body = json.dumps(content, default=str).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=PUBLIC)).serve_forever()
