"""The state file: what it keeps, and how files that cannot be used are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from walstream.errors import SetupError
from walstream.lineage import Lineage
from walstream.lsn import Lsn
from walstream.state import StateFile, state_path

LINEAGE = Lineage("7290000000000000001", 3, Lsn(0x16274F8))


async def test_what_was_recorded_is_loaded_by_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "orders.json"
    assert await StateFile(path, "orders").load() is None
    await StateFile(path, "orders").record(LINEAGE)
    assert await StateFile(path, "orders").load() == LINEAGE
    assert [file.name for file in tmp_path.iterdir()] == ["orders.json"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not a state file"),
        ("[]", "not a state file"),
        ('{"slot":"orders","systemid":"7","timeline":1,"flush_lsn":"x"}', "not a state file"),
        (
            '{"slot":"other","systemid":"7","timeline":1,"flush_lsn":"0/1"}',
            "that of the slot other",
        ),
    ],
)
async def test_a_file_that_is_not_its_own_is_refused(
    tmp_path: Path, content: str, says: str
) -> None:
    path = tmp_path / "state.json"
    path.write_text(content)
    with pytest.raises(SetupError, match=says):
        await StateFile(path, "orders").load()


async def test_a_folder_that_is_not_there_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="No such file or directory"):
        await StateFile(tmp_path / "missing" / "state.json", "orders").verify_writable()


async def test_a_disk_that_fails_later_is_told_once(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "folder" / "state.json", "orders")
    with capture_logs() as logs:
        await state.record(LINEAGE)
        await state.record(LINEAGE)
    assert [line["event"] for line in logs] == ["state_not_written"]


async def test_what_is_forgotten_is_gone(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "state.json", "orders")
    await state.record(LINEAGE)
    state.forget()
    assert await state.load() is None


def test_the_folder_is_systemds_unless_a_path_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert state_path(None, "orders") is None
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/walstream:/var/lib/other")
    assert state_path(None, "orders") == Path("/var/lib/walstream/orders.json")
    assert state_path(Path("own.json"), "orders") == Path("own.json")
