"""Books payments of one database as balances in another, each exactly once."""

import os

from psycopg import Connection

from walstream import Change, Walstream

stream = Walstream()


@stream.on(
    "public.payments",
    "insert",
    batch=500,
    transactional=os.environ["LEDGER_DSN"],
    name="ledger",
)
def book(changes: list[Change], ledger: Connection) -> None:
    with ledger.cursor() as cursor:
        cursor.executemany(
            """
            INSERT INTO balances (account, balance) VALUES (%s, %s)
            ON CONFLICT (account) DO UPDATE SET balance = balances.balance + excluded.balance
            """,
            [(change.row["account"], change.row["amount"]) for change in changes],
        )
