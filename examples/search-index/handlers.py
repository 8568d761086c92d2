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
    match change.operation:
        case "truncate":
            connection.execute("DELETE FROM articles")
        case "delete":
            connection.execute("DELETE FROM articles WHERE rowid = ?", [change.key["id"]])
        case "insert":
            refuse_giants(change)
            connection.execute(
                "INSERT OR REPLACE INTO articles (rowid, title, body) VALUES (?, ?, ?)",
                [change.key["id"], change.row["title"], change.row["body"]],
            )
        case "update":
            refuse_giants(change)
            for column in {"title", "body"} & change.row.keys():
                connection.execute(
                    f"UPDATE articles SET {column} = ? WHERE rowid = ?",
                    [change.row[column], change.key["id"]],
                )


def refuse_giants(change: Change) -> None:
    if len(change.row.get("body", "")) > MAX_CHARACTERS:
        raise ValueError("the body is too long for the index")
