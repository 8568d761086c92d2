"""Prints the titles of the articles that a query finds: python search.py "logical replication"."""

import sqlite3
import sys
from contextlib import closing

from handlers import INDEX

with closing(sqlite3.connect(INDEX)) as connection:
    for number, title in connection.execute(
        "SELECT rowid, title FROM articles WHERE articles MATCH ? ORDER BY rank", [sys.argv[1]]
    ):
        print(number, title)
