"""Fixtures: a PostgreSQL server, a fresh database for each test, private clusters.

``WALSTREAM_TEST_DSN`` names a server to test against, by a superuser's connection string; without
it a private cluster is started from the server programs on this machine. Where there is neither,
tests that need a server are skipped, but under ``CI=true`` they fail.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import psycopg
import pytest
from psycopg import sql

from tests import postgres
from tests.postgres import Database, create_database, drop_database
from walstream.cluster import PrivateCluster, ServerPrograms, find_programs
from walstream.errors import ServerProgramsMissing

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs the tests in the background has SIGINT ignored, and so would be all programs
    # that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

GIVEN_DSN = os.environ.get("WALSTREAM_TEST_DSN")


class StartCluster(Protocol):
    """Makes and starts a private cluster that is removed when its fixture ends."""

    def __call__(
        self,
        settings: Mapping[str, str] | None = None,
        *,
        encoding: str | None = None,
        locale: str = "C",
        loopback: bool = False,
    ) -> PrivateCluster:
        """Start it with settings; with an ``encoding`` of its own it goes through initdb."""


@pytest.fixture(scope="session")
def server_programs() -> ServerPrograms:
    """The server programs on this machine; without them the test is skipped."""
    try:
        return find_programs()
    except ServerProgramsMissing as missing:
        if os.environ.get("CI") == "true" and GIVEN_DSN is None:
            raise
        pytest.skip(f"needs a private cluster: {missing.message}; {missing.hint}")


@pytest.fixture(scope="session")
def cluster_template(server_programs: ServerPrograms) -> Iterator[Path]:
    """The data folder of a cluster that never runs: a copy is quicker to have than initdb."""
    with _removed(PrivateCluster(programs=server_programs)) as template:
        template.create()
        yield template.data


@pytest.fixture(scope="session")
def cluster(server_programs: ServerPrograms, cluster_template: Path) -> Iterator[PrivateCluster]:
    """The private cluster of the session; a test must not stop it or change its settings."""
    with PrivateCluster(programs=server_programs, template=cluster_template) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def server_dsn(request: pytest.FixtureRequest) -> str:
    """A superuser's connection string of the test server: the given one or the private cluster."""
    if GIVEN_DSN is not None:
        return GIVEN_DSN
    private: PrivateCluster = request.getfixturevalue("cluster")
    return private.conninfo()


@pytest.fixture(scope="session")
def database_template(server_dsn: str) -> Iterator[str]:
    """The name of the database that each test's database is a copy of."""
    name = f"walstream_template_{secrets.token_hex(4)}"
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'").format(
                sql.Identifier(name)
            )
        )
    yield name
    drop_database(server_dsn, name)


@pytest.fixture
def database(server_dsn: str, database_template: str) -> Iterator[Database]:
    """An empty database for this test alone, dropped afterwards together with its slots."""
    with create_database(server_dsn, database_template) as database:
        yield database
    drop_database(server_dsn, database.name)


@pytest.fixture
def private_cluster(
    server_programs: ServerPrograms, cluster_template: Path
) -> Iterator[StartCluster]:
    """Starts private clusters for one test, with its own settings, to be stopped and killed."""
    with _cluster_factory(server_programs, cluster_template) as start:
        yield start


@pytest.fixture(scope="module")
def module_private_cluster(
    server_programs: ServerPrograms, cluster_template: Path
) -> Iterator[StartCluster]:
    """As ``private_cluster``, for all tests of a module together."""
    with _cluster_factory(server_programs, cluster_template) as start:
        yield start


@pytest.fixture
def wait_until() -> Callable[..., Any]:
    """``wait_until(condition, timeout_seconds=10)``: the first true answer, or a failure."""
    return postgres.wait_until


@pytest.fixture
def async_wait_until() -> Callable[..., Any]:
    """As ``wait_until``, to be awaited; the condition may be a coroutine function."""
    return postgres.async_wait_until


@contextmanager
def _cluster_factory(programs: ServerPrograms, template: Path) -> Iterator[StartCluster]:
    with ExitStack() as clusters:

        def start(
            settings: Mapping[str, str] | None = None,
            *,
            encoding: str | None = None,
            locale: str = "C",
            loopback: bool = False,
        ) -> PrivateCluster:
            cluster = (
                PrivateCluster(settings, loopback=loopback, template=template, programs=programs)
                if encoding is None
                else PrivateCluster(
                    settings,
                    encoding=encoding,
                    locale=locale,
                    loopback=loopback,
                    programs=programs,
                )
            )
            return clusters.enter_context(cluster)

        yield start


@contextmanager
def _removed(cluster: PrivateCluster) -> Iterator[PrivateCluster]:
    try:
        yield cluster
    finally:
        cluster.remove()
