"""Somebody who shops: every second a new order, and now and then one is paid or cancelled."""

import itertools
import random
import signal
import sys
import time

import psycopg

TABLE = """
CREATE TABLE IF NOT EXISTS orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer text NOT NULL,
    amount numeric(10, 2) NOT NULL,
    status text NOT NULL DEFAULT 'new',
    updated_at timestamptz NOT NULL DEFAULT now()
)
"""
CUSTOMERS = ["Ada", "Ben", "Cem", "Dana"]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    pick = random.Random().choice
    with psycopg.connect(autocommit=True) as connection:  # PGHOST, PGUSER, PGPASSWORD
        connection.execute(TABLE)
        for number in itertools.count(1):
            order = connection.execute(
                "INSERT INTO orders (customer, amount) VALUES (%s, %s) RETURNING id",
                [pick(CUSTOMERS), number % 90 + 9.99],
            ).fetchone()
            if number % 2 == 0:
                connection.execute(
                    "UPDATE orders SET status = %s, updated_at = now() WHERE id = %s",
                    [pick(["paid", "cancelled"]), order[0]],
                )
            # What is old goes, so that the demo may run for days.
            connection.execute("DELETE FROM orders WHERE id = %s", [order[0] - 1000])
            time.sleep(1)


main()
