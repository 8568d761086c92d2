"""The configuration: what it refuses, and that no message holds a secret."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from walstream import config
from walstream.errors import ConfigError

SECRET = "hunter2"  # noqa: S105 - not a password of anything
DSN = f"postgresql://me:{SECRET}@host/db"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("WALSTREAM_"):
            monkeypatch.delenv(variable)


@pytest.mark.parametrize(
    "content",
    [
        {"postgres": DSN},
        {"postgres": [DSN]},
        {"postgres": {"dsn": [DSN]}},
        {"postgres": {"dsn": {"url": DSN}}},
        {"postgres": {"dsn_file": [DSN]}},
        {"postgres": {"replication_dsn": {SECRET: 5}}},
        {"postgres": {"dsn": f"{SECRET} {SECRET}"}},
        {"masking": SECRET},
        {"masking": {"key": [SECRET]}},
        {"masking": {"key_file": {"key": SECRET}}},
    ],
)
def test_what_stands_where_a_secret_belongs_is_not_printed(content: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(content)
    assert SECRET not in str(caught.value)
    assert next(iter(content)) in str(caught.value)


def test_a_number_in_the_place_of_a_secret_is_not_printed() -> None:
    with pytest.raises(ConfigError, match=r"postgres\.dsn: found a value; allowed: a string"):
        config.parse({"postgres": {"dsn": 5}})


def test_what_cannot_be_secret_is_printed() -> None:
    with pytest.raises(ConfigError, match="application_name: found 5; allowed: a string"):
        config.parse({"postgres": {"application_name": 5}})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("WALSTREAM_POSTGRES", DSN),
        ("WALSTREAM_POSTGRES", f'"{DSN}"'),
        ("WALSTREAM_MASKING", f'"{SECRET}"'),
        ("WALSTREAM_POSTGRES_DSN", f"{SECRET} {SECRET}"),
    ],
)
def test_secrets_of_the_environment_are_not_printed(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        config.parse({})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://me:hunt@er2@host/db",
        "postgresql://me:hunt@er2@host:5432,other:5433/db?sslmode=require",
        "postgres://me:hunt/er2@host/db",
        "postgres://me:1234/er2@host/db",
        "postgresql://me:hu@nt/er2@host/db",
        "postgresql://host:er2/db",
        "host=host port=er2",
    ],
)
def test_a_connection_string_whose_password_tears_it_apart_is_refused(
    tmp_path: Path, dsn: str
) -> None:
    """libpq would take the password's tail for a host, a port or a database, and name it."""
    file = tmp_path / "dsn"
    file.write_text(dsn)
    with pytest.raises(ConfigError, match="percent-encoded") as caught:
        config.parse({"postgres": {"dsn": dsn}})
    assert "er2" not in str(caught.value)
    with pytest.raises(ConfigError, match="percent-encoded") as caught:
        config.parse({"postgres": {"dsn_file": str(file)}}).postgres.catalog_dsn()
    assert "er2" not in str(caught.value)


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://me:hunt%40er2@host:5432/db",
        "postgresql://me:hunt?er2#:@host/db",
        "postgresql://me@host,[::1]:5433/db?application_name=a@b",
        "postgresql:///db?host=/tmp&user=me@realm",
        "postgresql://host/a%40b",
        "host=host,other port=5432,5433 password=hunt@er2 dbname=a@b",
        "",
    ],
)
def test_connection_strings_that_libpq_reads_as_they_are_meant_are_taken(dsn: str) -> None:
    assert config.parse({"postgres": {"dsn": dsn}}).postgres.catalog_dsn() == dsn


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "is not text in UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_of_secrets_that_cannot_be_read_are_mistakes_of_the_configuration(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    for settings in (
        {"postgres": {"dsn_file": file}},
        {"postgres": {"replication_dsn_file": file}},
    ):
        with pytest.raises(ConfigError, match=said):
            config.parse(settings).postgres.streaming_dsn()
    with pytest.raises(ConfigError, match=said):
        config.parse({"masking": {"key_file": file}}).masking.secret()


@pytest.mark.parametrize(
    "content",
    [
        {"sinks": DSN},
        {"sinks": [DSN]},
        {"sinks": {"hook": DSN}},
        {"dead_letters": DSN},
        {"dead_letters": {"dsn_file": [DSN]}},
        {"postgres": {"replication_dsn_file": [DSN]}},
        {"masking": {"key_file": [SECRET]}},
    ],
)
def test_secrets_in_the_wrong_place_are_not_printed(content: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="found a value") as caught:
        config.parse(content)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "is_shown"),
    [
        ("postgresql://me:hunter2@host/db", False),
        ("host=db password=hunter2", False),
        ("host=db password = hunter2", False),
        ("0123456789abcdef0123456789abcdef", False),
        ("Zm9v/mFyYmF6Zm9vYmFyYmF6Zm9vYmFyYmF6Zm8=", False),
        ("/run/secrets/the-dsn-of-orders-2", True),
        ("secrets/the-dsn-of-all-orders", True),
        ("the-dsn-of-all-orders-2.txt", True),
        ("dsn2", True),
    ],
)
def test_a_secret_in_the_place_of_its_file_is_not_printed(given: str, *, is_shown: bool) -> None:
    file = Path(given)
    for read in (
        config.parse({"postgres": {"dsn_file": given}}).postgres.catalog_dsn,
        config.parse({"dead_letters": {"dsn_file": given}}).dead_letters.own_dsn,
        config.parse({"masking": {"key_file": given}}).masking.secret,
    ):
        with pytest.raises(ConfigError, match=r"_file: .* cannot be read") as caught:
            read()
        assert (str(file) in str(caught.value)) == is_shown
        assert "hunter2" not in str(caught.value)


def test_a_file_of_a_secret_whose_name_no_file_has_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="is not a path"):
        config.parse({"masking": {"key_file": "a\0b"}}).masking.secret()


def test_variables_that_belong_to_no_section_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ("POSTGRES_DSN", "ROUTES", "SINKS_OUT", "TEST_DSN", "PG_BIN", "PORT", "PORT_80_TCP")
    for name in (*known, "SERVICE_HOST", "SERVICE_PORT_HTTP", "POSTGRS_DSN", "PORTS", "SLOTNAME"):
        monkeypatch.setenv(f"WALSTREAM_{name}", "x")
    monkeypatch.setenv("walstream_log_level", "info")
    monkeypatch.setenv("WALSTREAMER", "x")
    assert config.ignored_variables() == [
        "WALSTREAM_PORTS",
        "WALSTREAM_POSTGRS_DSN",
        "WALSTREAM_SLOTNAME",
    ]


def test_there_is_one_live_sink() -> None:
    """A second one's changes would reach nobody."""
    with pytest.raises(ConfigError, match=r"found 2 of type live \(a, b\); allowed: one"):
        config.parse({"sinks": {"a": {"type": "live"}, "b": {"type": "live"}}})


def test_bounds_of_a_journal_without_a_path_are_a_mistake() -> None:
    """Whoever gives them believes that there is one."""
    with pytest.raises(ConfigError, match="max_bytes is given, and no path"):
        config.parse({"journal": {"max_bytes": "2GB"}})
