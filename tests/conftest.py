"""Fixtures: a PostgreSQL server, a fresh database for each test, private clusters.

They are those of walstream's own pytest plugin, under short names. ``WALSTREAM_TEST_DSN`` names a
server to test against, by a superuser's connection string; without it a private cluster is started
from the server programs on this machine. Where there is neither, tests that need a server are
skipped, but under ``CI=true`` they fail.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests import postgres
from tests.node_packages import node_packages
from tests.postgres import Database
from walstream.cluster import PrivateCluster, ServerPrograms
from walstream.testing import StartCluster
from walstream.testing.servers import cluster_factory

__all__ = ["StartCluster"]

pytest_plugins = ["pytester"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs the tests in the background has SIGINT ignored, and so would be all programs
    # that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def logging_is_not_configured() -> Iterator[None]:
    """What the fixtures of one module configure does not reach the next one."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def logging_is_as_before() -> Iterator[None]:
    """What a command line in this process configures would log to its own, closed, stderr."""
    before = structlog.get_config() if structlog.is_configured() else None
    yield
    if before is None:
        structlog.reset_defaults()
    else:
        structlog.configure(**before)


@pytest.fixture(scope="session")
def server_programs(walstream_programs: ServerPrograms) -> ServerPrograms:
    """The server programs on this machine; without them the test is skipped."""
    return walstream_programs


@pytest.fixture(scope="session")
def cluster(walstream_cluster: PrivateCluster) -> PrivateCluster:
    """The private cluster of the session; a test must not stop it or change its settings."""
    return walstream_cluster


@pytest.fixture(scope="session")
def server_dsn(walstream_server: str) -> str:
    """A superuser's connection string of the test server: the given one or the private cluster."""
    return walstream_server


@pytest.fixture(scope="session")
def database_template(walstream_template: Database) -> str:
    """The name of the database that each test's database is a copy of."""
    return walstream_template.name


@pytest.fixture
def database(walstream_database: Database) -> Database:
    """An empty database for this test alone, dropped afterwards together with its slots."""
    return walstream_database


@pytest.fixture
def private_cluster(walstream_private_cluster: StartCluster) -> StartCluster:
    """Starts private clusters for one test, with its own settings, to be stopped and killed."""
    return walstream_private_cluster


@pytest.fixture(scope="module")
def module_private_cluster(
    server_programs: ServerPrograms, walstream_cluster_template: Path
) -> Iterator[StartCluster]:
    """As ``private_cluster``, for all tests of a module together."""
    with cluster_factory(server_programs, walstream_cluster_template) as start:
        yield start


@pytest.fixture
def wait_until() -> Callable[..., Any]:
    """``wait_until(condition, timeout_seconds=10)``: the first true answer, or a failure."""
    return postgres.wait_until


@pytest.fixture
def async_wait_until() -> Callable[..., Any]:
    """As ``wait_until``, to be awaited; the condition may be a coroutine function."""
    return postgres.async_wait_until


@pytest.fixture(scope="session")
def node_folder(request: pytest.FixtureRequest) -> Path:
    """A folder with the stock clients for Node; without node or npm the test is skipped."""
    assert request.config.cache is not None
    return node_packages(request.config.cache.mkdir("node"))
