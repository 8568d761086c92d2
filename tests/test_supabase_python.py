"""The stock client ``realtime`` for Python, which speaks version 1.0.0 of the protocol."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import Database
from tests.proxy import Proxy
from tests.supabase_service import SupabaseService, module_service, supabase_service
from tests.supabase_tests import (
    AccessTests,
    ChangesTests,
    ReturnTests,
    RoomsTests,
    client_of,
    every_change_comes_once,
    rejoins_after_a_restart,
)
from tests.told import PythonClient, Told

pytest.importorskip("realtime")


@pytest.fixture(scope="module")
def service(
    server_dsn: str, database_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SupabaseService]:
    with module_service(tmp_path_factory.mktemp("service"), server_dsn, database_template) as it:
        yield it


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonClient]:
    with PythonClient(sys.executable, tmp_path_factory.mktemp("python") / "log") as program:
        yield program


@pytest.fixture
def told(program: PythonClient) -> Iterator[Told]:
    yield program
    program.close_all()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy("host=127.0.0.1 port=1", is_postgres=False) as proxy:
        yield proxy


class TestChanges(ChangesTests):
    pass


class TestRooms(RoomsTests):
    pass


class TestAccess(AccessTests):
    pass


class TestReturn(ReturnTests):
    pass


def test_a_channel_is_not_lost_when_the_client_joins_anew_after_an_error(
    told: Told, service: SupabaseService
) -> None:
    """It does so a second after each system message of an error."""
    table = service.table("id int PRIMARY KEY")
    channel = client_of(told, service).channel(service.topic()).on_changes("right", table=table)
    channel.on_changes("wrong", table=table, filter="nope=eq.1").subscribe()
    channel.wait_for_joins(3)
    service.execute(f"INSERT INTO {table} VALUES (1)")
    channel.wait_for(lambda it: it.ids("right") == [1])
    assert "CLOSED" not in channel.statuses


def test_a_restart_of_walstream(
    told: Told, database: Database, proxy: Proxy, tmp_path: Path
) -> None:
    rejoins_after_a_restart([told], database, proxy, tmp_path)


def test_connections_that_are_cut_lose_and_double_nothing(
    told: Told, database: Database, proxy: Proxy, tmp_path: Path
) -> None:
    with supabase_service(tmp_path, database, proxy) as service:
        every_change_comes_once([told], service)
