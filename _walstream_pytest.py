"""The pytest plugin of walstream: servers, databases, and handlers on a real stream.

pytest imports this module in every project that has walstream installed: before coverage begins to
measure, with the project's own filters for warnings, and also where walstream could not be imported
(psycopg without libpq). So it stands outside of the package and imports nothing but pytest; what a
fixture needs is imported when the fixture is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from walstream import Walstream
    from walstream.cluster import PrivateCluster, ServerPrograms
    from walstream.testing import Database, HandlerStream, MakeStream, StartCluster


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare what a project can set in its pytest configuration."""
    parser.addini(
        "walstream_dsn",
        "connection string of the database that walstream_stream streams from; without it each"
        " test has a fresh one",
        default="",
    )


@pytest.fixture(scope="session")
def walstream_programs() -> ServerPrograms:
    """The newest PostgreSQL server on this machine that has wal2json; else the test is skipped."""
    from walstream.cluster import find_programs
    from walstream.errors import ServerProgramsMissing

    try:
        return find_programs()
    except ServerProgramsMissing as missing:
        if os.environ.get("CI") == "true" and not os.environ.get("WALSTREAM_TEST_DSN"):
            raise
        pytest.skip(f"needs a private cluster: {missing.message}; {missing.hint}")


@pytest.fixture(scope="session")
def walstream_cluster_template(walstream_programs: ServerPrograms) -> Iterator[Path]:
    """The data folder that private clusters are copies of."""
    from walstream.testing.servers import cluster_template

    with cluster_template(walstream_programs) as template:
        yield template


@pytest.fixture(scope="session")
def walstream_cluster(
    walstream_programs: ServerPrograms, walstream_cluster_template: Path
) -> Iterator[PrivateCluster]:
    """The private cluster of the session; a test must not stop it or change its settings."""
    from walstream.testing.servers import cluster_factory

    with cluster_factory(walstream_programs, walstream_cluster_template) as start:
        yield start()


@pytest.fixture(scope="session")
def walstream_server(request: pytest.FixtureRequest) -> str:
    """A superuser's connection string of the test server.

    It is the server that WALSTREAM_TEST_DSN names, or a private cluster. Where there is neither,
    the test is skipped; under CI=true it fails.
    """
    given = os.environ.get("WALSTREAM_TEST_DSN")
    if given:
        return given
    cluster: PrivateCluster = request.getfixturevalue("walstream_cluster")
    return cluster.conninfo()


@pytest.fixture(scope="session")
def walstream_template(walstream_server: str) -> Iterator[Database]:
    """The database that each test's database is a copy of; override it to make your tables."""
    from walstream.testing.databases import create_template, drop_database

    with create_template(walstream_server) as template:
        yield template
    drop_database(walstream_server, template.name)


@pytest.fixture
def walstream_database(walstream_server: str, walstream_template: Database) -> Iterator[Database]:
    """A fresh database for this test alone, dropped afterwards together with its slots."""
    from walstream.testing.databases import create_database, drop_database

    walstream_template.close()  # a database that somebody is connected to cannot be copied
    with create_database(walstream_server, walstream_template.name) as database:
        yield database
    drop_database(walstream_server, database.name)


@pytest.fixture
def walstream_private_cluster(
    walstream_programs: ServerPrograms, walstream_cluster_template: Path
) -> Iterator[StartCluster]:
    """Starts private clusters for one test, with its own settings, to be stopped and killed."""
    from walstream.testing.servers import cluster_factory

    with cluster_factory(walstream_programs, walstream_cluster_template) as start:
        yield start


@pytest.fixture
def walstream_dsn(request: pytest.FixtureRequest) -> str:
    """The connection string that walstream_stream uses.

    It is the ini option walstream_dsn, or that of walstream_database; override it for a database
    of your own.
    """
    given: str = request.config.getini("walstream_dsn")
    if given:
        return given
    database: Database = request.getfixturevalue("walstream_database")
    return database.dsn


@pytest.fixture
def walstream_stream(walstream_dsn: str) -> Iterator[MakeStream]:
    """Attaches handlers to a slot of their own, made at once and dropped after the test.

    ``walstream_stream(app, **configuration)`` returns a ``walstream.testing.HandlerStream``.
    """
    from walstream.testing import HandlerStream

    with ExitStack() as streams:

        def make(
            app: Walstream | None = None, *, dsn: str | None = None, **configuration: Any
        ) -> HandlerStream:
            stream = HandlerStream(dsn or walstream_dsn, app, **configuration)
            return streams.enter_context(closing(stream))

        yield make
