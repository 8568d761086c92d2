"""Keeps a full-text index of articles up to date."""

import sqlite3
from contextlib import closing

from walstream import Change, Walstream

INDEX = "articles.sqlite3"
MAX_CHARACTERS = 1_000_000

stream = Walstream()


@stream.on(
    "public.articles",
    batch=500,
    linger_seconds=0.1,
    on_failure="dead_letter",
    name="search_index",
)
def index(changes: list[Change]) -> None:
    with closing(sqlite3.connect(INDEX)) as connection, connection:  # one transaction
        connection.execute("CREATE VIRTUAL TABLE IF NOT EXISTS articles USING fts5 (title, body)")
        for change in changes:
            apply(change, connection)


def apply(change: Change, connection: sqlite3.Connection) -> None:
    if change.operation == "truncate":
        connection.execute("DELETE FROM articles")
        return
    number = change.key["id"]
    if change.operation == "update" and change.identity["id"] == number:
        texts = {name: change.row[name] for name in ("title", "body") if name in change.row}
        settings = ", ".join(f"{name} = ?" for name in texts)
        refuse_giants(texts)
        connection.execute(
            f"UPDATE articles SET {settings} WHERE rowid = ?", [*texts.values(), number]
        )
        return
    if "id" in change.identity:
        connection.execute("DELETE FROM articles WHERE rowid = ?", [change.identity["id"]])
    if change.operation != "delete":
        refuse_giants(change.row)
        connection.execute(
            "INSERT OR REPLACE INTO articles (rowid, title, body) VALUES (?, ?, ?)",
            [number, change.row["title"], change.row["body"]],
        )
