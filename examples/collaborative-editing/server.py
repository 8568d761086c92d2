"""The page's own server: its files, and a reminder by its id, to be read and updated."""

from __future__ import annotations

import json
import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

DSN = os.environ["WALSTREAM_POSTGRES_DSN"]
PUBLIC = Path(__file__).parent / "public"
FIELDS = {"title", "notes", "is_done"}


class Handler(SimpleHTTPRequestHandler):
    """Whatever is not a reminder is a file."""

    def do_GET(self) -> None:
        """Answer with a reminder, or a file."""
        if not self.path.startswith("/reminders/"):
            super().do_GET()
            return
        with psycopg.connect(DSN, row_factory=dict_row) as connection:
            found = connection.execute("SELECT * FROM reminders WHERE id = %s", [self._id()])
            row = found.fetchone()
        if row is None:
            self.send_error(404)
        else:
            self._answer(row)

    def do_PATCH(self) -> None:
        """Update the fields that are given; everybody gets it as a change."""
        fields = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not fields or not fields.keys() <= FIELDS:
            self.send_error(400)
            return
        columns = [
            sql.SQL("{} = {}").format(sql.Identifier(name), sql.Placeholder(name))
            for name in fields
        ]
        query = sql.SQL("UPDATE reminders SET {}, updated_at = now() WHERE id = %(id)s")
        with psycopg.connect(DSN) as connection:
            connection.execute(
                query.format(sql.SQL(", ").join(columns)), fields | {"id": self._id()}
            )
        self._answer({})

    def _id(self) -> int:
        return int(self.path.rpartition("/")[2])

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
