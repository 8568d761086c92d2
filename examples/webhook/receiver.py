"""A service that takes signed changes, and does for each what is to be done exactly once.

PORT is where it listens, `secret` holds the secret that walstream signs with, and orders.sqlite3 is
its database.
"""

import base64
import hashlib
import hmac
import json
import os
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DATABASE = "orders.sqlite3"
TOLERANCE_SECONDS = 300
KEYS = [
    base64.b64decode(secret.removeprefix("whsec_"))
    for secret in Path("secret").read_text().split()  # two while they are exchanged
]


def is_genuine(headers: Mapping[str, str], body: bytes) -> bool:
    number, sent_at = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not sent_at.isdecimal() or abs(time.time() - int(sent_at)) > TOLERANCE_SECONDS:
        return False
    signed = f"{number}.{sent_at}.".encode() + body
    wanted = [
        "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in KEYS
    ]
    return any(
        hmac.compare_digest(one.encode(), signature.encode())
        for one in wanted
        for signature in headers.get("webhook-signature", "").split()
    )


def take(changes: list[dict]) -> None:
    """Do the work of the changes that are new, and remember them, in one transaction."""
    with closing(sqlite3.connect(DATABASE)) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS taken (id text PRIMARY KEY)")
        connection.execute("CREATE TABLE IF NOT EXISTS turnover (amount numeric)")
        for change in changes:
            is_new = connection.execute(
                "INSERT OR IGNORE INTO taken VALUES (?)", [change["id"]]
            ).rowcount
            if is_new and change["operation"] == "insert":
                connection.execute("INSERT INTO turnover VALUES (?)", [change["row"]["amount"]])


class Receiver(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if not is_genuine(self.headers, body):
            self.answer(401)
            return
        take(json.loads(body)["changes"])
        self.answer(204)

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8080"))
    ThreadingHTTPServer(("127.0.0.1", port), Receiver).serve_forever()
