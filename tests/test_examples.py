"""The services of ``examples/`` do what they say, as processes of their own on a real Postgres."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest

from tests.postgres import Database, create_database, drop_database, wait_until
from tests.test_documents import ROOT
from walstream import config

EXAMPLES: Final = ROOT / "examples"


class Service:
    """A copy of an example's folder, with its tables in a database and a slot of its own."""

    def __init__(self, name: str, folder: Path, database: Database) -> None:
        self.folder = folder / name
        shutil.copytree(EXAMPLES / name, self.folder, ignore=shutil.ignore_patterns("__pycache__"))
        self.database = database
        self.slot = f"example_{secrets.token_hex(4)}"
        database.execute((self.folder / "schema.sql").read_text())
        self.environment = {
            **{key: value for key, value in os.environ.items() if "WALSTREAM_" not in key},
            "WALSTREAM_POSTGRES_DSN": database.dsn,
            "WALSTREAM_SLOT_NAME": self.slot,
            "WALSTREAM_HANDLERS_BACKOFF_SECONDS": "0.05",
        }

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[str]]:
        """As its README says; it streams inside of the block, and is told to stop at its end."""
        process = self.start("-m", "walstream", "run")
        try:
            wait_until(lambda: self.is_streaming() or process.poll() is not None, 20)
            yield process
            process.terminate()
            process.wait(20)
        finally:
            process.kill()
            _, errors = process.communicate()
            sys.stderr.write(errors)  # shown with a test that fails
        assert process.returncode in (0, -signal.SIGKILL), errors

    def is_streaming(self) -> bool:
        return self.database.execute(
            # Active without a position it is while it is being made.
            "SELECT active AND confirmed_flush_lsn IS NOT NULL FROM pg_replication_slots"
            " WHERE slot_name = %s",
            self.slot,
        ) == [(True,)]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def walstream(self, *arguments: str, code: int = 0) -> str:
        process = self.start("-m", "walstream", *arguments)
        output, errors = process.communicate(timeout=30)
        assert process.returncode == code, errors
        return output

    def python(self, *arguments: str) -> str:
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        return output


ServiceOf = Callable[[str], Service]


@pytest.fixture
def service_of(database: Database, tmp_path: Path) -> ServiceOf:
    """Sets up the example of a name."""
    return lambda name: Service(name, tmp_path, database)


def test_every_example_is_told_and_tested() -> None:
    names = {folder.name for folder in EXAMPLES.iterdir() if folder.is_dir()}
    told = (EXAMPLES / "README.md").read_text()
    browsed = Path(__file__).parent / "browser" / "test_supabase_examples.py"
    tested = Path(__file__).read_text() + browsed.read_text().replace("site_of(", "service_of(")
    for name in names:
        assert f"[{name}]({name})" in told
        assert f'service_of("{name}")' in tested
        assert (EXAMPLES / name / "README.md").is_file()


def test_every_example_has_a_slot_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(EXAMPLES.glob("*/walstream.toml"))
    for variable in [name for name in os.environ if name.startswith("WALSTREAM_")]:
        monkeypatch.delenv(variable)
    assert len({config.load(file).slot.name for file in files}) == len(files)
    assert all(config.load(file).slot.create for file in files)


# ---- audit-log


def test_the_audit_log_has_every_change_and_no_secret(service_of: ServiceOf) -> None:
    service = service_of("audit-log")
    service.write("masking.key", secrets.token_hex(32))
    log = service.folder / "audit.jsonl"
    with service.running():
        service.database.execute(
            """
            INSERT INTO customers (name, email, card_number, password_hash)
            VALUES ('Ada', 'ada@example.org', '4111111111111111', 'scrypt:aa'),
                   ('Ben', 'ada@example.org', NULL, 'scrypt:bb');
            UPDATE customers SET name = 'Ada L.' WHERE name = 'Ada';
            DELETE FROM customers;
            """
        )
        wait_until(lambda: log.exists() and len(log.read_text().splitlines()) == 5)
    changes = [json.loads(line) for line in log.read_text().splitlines()]
    assert [change["operation"] for change in changes] == [
        *("insert", "insert", "update", "delete", "delete"),
    ]
    update = changes[2]
    assert (update["identity"]["name"], update["row"]["name"]) == ("Ada", "Ada L.")
    assert update["row"]["card_number"] == "************1111"
    assert changes[0]["row"]["email"] == changes[1]["row"]["email"] != "ada@example.org"
    for secret in ("scrypt", "ada@example.org", "41111111"):
        assert secret not in log.read_text()


def test_the_audit_log_is_rotated(service_of: ServiceOf) -> None:
    service = service_of("audit-log")
    service.write("masking.key", secrets.token_hex(32))
    text = (service.folder / "walstream.toml").read_text()
    service.write("walstream.toml", text.replace("1GB", "1kB"))
    add = "INSERT INTO customers (name, email, password_hash) VALUES (%s, 'x', 'y')"
    with service.running():
        for number in range(10):
            service.database.execute(add, str(number))
        wait_until(lambda: names_in(service.folder) == [str(number) for number in range(10)])
        wait_until(lambda: list(service.folder.glob("audit-*.jsonl.gz")))


def names_in(folder: Path) -> list[str]:
    """Read the whole stream, in the order of the files' names."""
    try:
        packed = [gzip.decompress(file.read_bytes()) for file in sorted(folder.glob("*.gz"))]
        plain = [file.read_bytes() for file in sorted(folder.glob("audit*.jsonl"))]
    except FileNotFoundError:  # packed at this moment
        return []
    lines = b"".join([*packed, *plain]).splitlines()
    return sorted({json.loads(line)["row"]["name"] for line in lines}, key=int)


# ---- cache-invalidation


def test_pages_of_changed_products_are_purged(service_of: ServiceOf) -> None:
    service = service_of("cache-invalidation")
    with cache() as (url, purged):
        service.environment["CACHE_URL"] = url
        with service.running():
            service.database.execute(
                """
                INSERT INTO products SELECT n, 'thing', n FROM generate_series(1, 20) n;
                UPDATE products SET id = 100 WHERE id = 7;
                DELETE FROM products WHERE id = 9;
                TRUNCATE products;
                """
            )
            wait_until(lambda: "/products/*" in purged)
    assert sorted(purged[:-1]) == sorted(
        f"/products/{number}" for number in [*range(1, 21), 100, 7, 9]
    )


@contextmanager
def cache() -> Iterator[tuple[str, list[str]]]:
    """A web cache that notes what is purged, refuses once, and has not kept page 3."""
    purged: list[str] = []
    refusals = iter([503])

    class Cache(BaseHTTPRequestHandler):
        def do_PURGE(self) -> None:
            status = next(refusals, 404 if self.path == "/products/3" else 200)
            if status != 503:
                purged.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Cache) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", purged
        finally:
            server.shutdown()


# ---- search-index


def test_the_search_index_follows_and_refused_articles_wait(service_of: ServiceOf) -> None:
    service = service_of("search-index")
    long = "slots and walsenders " + secrets.token_hex(20_000)
    with service.running():
        service.database.execute(
            "INSERT INTO articles (title, body) VALUES ('Old', %s), ('Cats', 'purr'), ('X', 'x')",
            long,
        )
        service.database.execute(
            "UPDATE articles SET title = 'Replication' WHERE title = 'Old';"
            "DELETE FROM articles WHERE title = 'X'"
        )
        wait_until(lambda: found(service, "walsenders") == "1 Replication\n")
        assert found(service, "purr") == "2 Cats\n"
        assert found(service, "x") == ""
        service.database.execute(
            "INSERT INTO articles (title, body) VALUES ('Giant', repeat('giant ', 200000));"
            "UPDATE articles SET title = 'Small giant', body = 'giant' WHERE title = 'Giant';"
            "INSERT INTO articles (title, body) VALUES ('Dwarf', 'no giant')"
        )
        wait_until(lambda: found(service, "giant") == "5 Dwarf\n")
        letters = service.walstream("dead-letters", "list", "--json").splitlines()
    assert [json.loads(letter)["parked"] for letter in letters] == [False, True]
    handlers = (service.folder / "handlers.py").read_text()
    service.write("handlers.py", handlers.replace("1_000_000", "2_000_000"))
    service.walstream("dead-letters", "replay", "--all", "--yes")
    assert found(service, "giant") == "4 Small giant\n5 Dwarf\n"


def found(service: Service, query: str) -> str:
    if not (service.folder / "articles.sqlite3").exists():
        return ""
    output = service.python("search.py", query)
    return "".join(sorted(output.splitlines(keepends=True)))


# ---- exactly-once-ledger

PAYMENTS: Final = 6000
ACCOUNTS: Final = 7


@pytest.fixture
def ledger(server_dsn: str) -> Iterator[Database]:
    """Another database, for balances."""
    with create_database(server_dsn, "template1") as database:
        yield database
    drop_database(server_dsn, database.name)


def test_balances_are_right_after_every_kill(service_of: ServiceOf, ledger: Database) -> None:
    service = service_of("exactly-once-ledger")
    service.environment["LEDGER_DSN"] = ledger.dsn
    ledger.execute((service.folder / "ledger.sql").read_text())
    with service.running():
        pass
    for _ in range(3):
        service.database.execute(
            "INSERT INTO payments (account, amount) SELECT n %% %s, n / 100.0"
            " FROM generate_series(1, %s) n",
            ACCOUNTS,
            PAYMENTS,
        )
        before = booked(ledger)
        with service.running() as process:
            wait_until(partial(is_booked_more_than, ledger, before), 20)
            process.kill()
    with service.running():
        wait_until(lambda: booked(ledger) == 3 * PAYMENTS * (PAYMENTS + 1) / 200, 20)
    assert ledger.execute("TABLE balances ORDER BY account") == service.database.execute(
        "SELECT account, sum(amount) FROM payments GROUP BY account ORDER BY account"
    )


def is_booked_more_than(ledger: Database, amount: float) -> bool:
    return booked(ledger) > amount


def booked(ledger: Database) -> float:
    [(total,)] = ledger.execute("SELECT coalesce(sum(balance), 0) FROM balances")
    return float(total)


# ---- webhook


def test_the_webhook_counts_every_order_once(service_of: ServiceOf) -> None:
    service = service_of("webhook")
    service.write("secret", "whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0\n")
    port = free_port()
    service.environment["PORT"] = str(port)
    text = (service.folder / "walstream.toml").read_text()
    service.write("walstream.toml", text.replace("8080", str(port)))
    with service.running():
        service.database.execute(
            "INSERT INTO orders (customer, amount) VALUES ('Ada', 10), ('Ben', 2.5);"
            "UPDATE orders SET status = 'paid'"
        )
        receiver = service.start("receiver.py")
        try:
            wait_until(lambda: turnover(service) == [(2, 12.5, 4)])
            assert post(port, {}) == 401
            assert post(port, {"webhook-id": "x", "webhook-timestamp": "1"}) == 401
        finally:
            receiver.kill()
            receiver.communicate()
    assert turnover(service) == [(2, 12.5, 4)]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def turnover(service: Service) -> list[tuple[Any, ...]]:
    """Orders, their sum, and how many changes were taken."""
    if not (service.folder / "orders.sqlite3").exists():
        return []
    connection = sqlite3.connect(service.folder / "orders.sqlite3")
    try:
        return connection.execute(
            "SELECT count(*), sum(amount), (SELECT count(*) FROM taken) FROM turnover"
        ).fetchall()
    except sqlite3.OperationalError:  # no tables yet
        return []
    finally:
        connection.close()


def post(port: int, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/changes", body=b'{"changes":[]}', headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status


# ---- live-dashboard


def test_the_live_page_gets_the_messages_of_its_conversation(service_of: ServiceOf) -> None:
    """What the page asks for; in a browser tests/browser/test_live_pages.py opens it."""
    service = service_of("live-dashboard")
    port = free_port()
    service.environment["WALSTREAM_HTTP_LISTEN"] = f"127.0.0.1:{port}"
    [origin, *_] = config.load(service.folder / "walstream.toml").http.cors_origins
    with service.running():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        query = "table=public.messages_v2&operations=insert&where=conversation_id=eq.%22abc-123%22"
        connection.request("GET", f"/changes?{query}", headers={"Origin": origin})
        answer = connection.getresponse()
        assert answer.getheader("access-control-allow-origin") == origin
        service.database.execute(
            """
            INSERT INTO messages_v2 (conversation_id, sender, content)
            VALUES ('another', 'Ben', 'not asked for'), ('abc-123', 'Ada', 'Hello')
            """
        )
        lines = iter(answer.readline, b"")
        [change] = next([line] for line in lines if b'"operation"' in line)
        assert json.loads(change.removeprefix(b"data: "))["row"]["content"] == "Hello"
        connection.close()
