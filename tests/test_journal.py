"""The journal: what is appended can be read, within its bounds, whatever happens."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import journals
from tests.journals import (
    HISTORY,
    ORDERS,
    TIME,
    Writers,
    change_of,
    changes_of,
    journal_at,
    layout_of,
    numbers_of,
    position_of,
    read_all,
    time_of,
    transaction_of,
)
from walstream.changes import Change, Column, Operation
from walstream.errors import SetupError, SinkFailed
from walstream.journal import Journal, JournalReader, JournalTrimmed, trim
from walstream.journal.blocks import BLOCK_BYTES, BLOCK_CHANGES, Piece
from walstream.journal.file import sizes
from walstream.journal.reader import _Blocks
from walstream.loaders import TextLoaders
from walstream.lsn import ZERO, Lsn
from walstream.positions import BEGINNING, Position
from walstream.values import Kind, PgType, Types


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
async def journal(path: Path) -> AsyncIterator[Journal]:
    opened = journal_at(path)
    await opened.open(HISTORY)
    yield opened
    await opened.close()


async def reopened(journal: Journal, history: str = HISTORY, **options: Any) -> Journal:
    await journal.close()
    again = journal_at(journal.path, **options)
    await again.open(history)
    return again


# ---- Appending and reading


async def test_what_is_appended_is_read_in_order(journal: Journal) -> None:
    await journal.append(changes_of(1, 3))
    await journal.append(changes_of(4, 2500))
    assert journal.position == position_of(2500)
    assert numbers_of(await read_all(journal)) == list(range(1, 2501))


async def test_a_new_journal_is_empty_and_begins_before_everything(journal: Journal) -> None:
    assert (journal.begins, journal.position, journal.covered) == (BEGINNING, BEGINNING, ZERO)
    assert await read_all(journal) == []
    await journal.append([])
    assert journal.position == BEGINNING


async def test_a_reader_gets_what_is_behind_one_position_up_to_the_other(journal: Journal) -> None:
    changes = [change_of(number, ordinal) for number in range(1, 400) for ordinal in (1, 2, 3)]
    for start in range(0, len(changes), 150):
        await journal.append(changes[start : start + 150])
    positions = [Position.of(change) for change in changes]
    pick = random.Random(3)  # noqa: S311 - nothing is secret
    for _ in range(30):
        after, upto = sorted(pick.sample([BEGINNING, *positions, Position.after(Lsn(777))], 2))
        read = [one async for piece in journal.read(after, upto) for one in piece]
        assert [Position.of(one) for one in read] == [
            one for one in positions if after < one <= upto
        ]


async def test_a_reader_behind_the_end_gets_nothing(journal: Journal) -> None:
    await journal.append(changes_of(1, 3))
    behind = Position.after(Lsn(10**6))
    assert [one async for one in journal.read(position_of(3), behind)] == []
    assert [one async for one in journal.read(behind, behind)] == []


async def test_changes_come_back_as_they_were(journal: Journal) -> None:
    update = change_of(1)
    update.operation = Operation.UPDATE
    update.sent_identity = msgspec.Raw(b'[{"name":"id","typeoid":20,"value":7}]')
    update.unchanged, update.leaving = ("photo",), True
    delete = change_of(2)
    delete.operation, delete.new_columns = Operation.DELETE, None
    delete.sent_identity = [Column("id", msgspec.Raw(b"2"), 20)]
    truncate = Change(Operation.TRUNCATE, layout_of("lines"), transaction_of(3), 1)
    changes = [change_of(0 + 1, 1), update, delete, truncate]
    changes[0].transaction = update.transaction
    update.ordinal = 2
    await journal.append(changes)
    again = await reopened(journal)
    read = await read_all(again)
    assert [one.to_json() for one in read] == [one.to_json() for one in changes]
    assert [one.operation for one in read] == [one.operation for one in changes]
    assert [one.key for one in read] == [one.key for one in changes]
    await again.close()


async def test_a_layout_is_the_same_object_for_all_of_its_changes(journal: Journal) -> None:
    for number in range(1, 6):
        await journal.append([change_of(number)])
    assert len({change.layout for change in await read_all(journal)}) == 1


async def test_a_layout_comes_back_whole(journal: Journal) -> None:
    layout = msgspec.structs.replace(
        ORDERS,
        ancestors=(ORDERS.relation, layout_of("whole").relation),
        columns={"id": 20, "content": 25, "photo": 17},
        missing=("photo",),
        toastable=("content", "photo"),
        is_full=True,
        in_catalog=False,
        table_columns=(("id", 20), ("content", 25), ("photo", 17)),
    )
    await journal.append([change_of(1, layout=layout)])
    [read] = await read_all(journal)
    fields = msgspec.structs.asdict
    assert {**fields(read.layout), "types": None} == {**fields(layout), "types": None}


async def test_a_type_that_has_changed_is_kept_anew(journal: Journal) -> None:
    types = Types(TextLoaders())
    types.add(PgType(99999, "mood", "public", Kind.ENUM, labels=("sad",)))
    layout = layout_of(types=types, content=99999)
    await journal.append([change_of(1, layout=layout)])
    types.add(PgType(99999, "mood", "public", Kind.ENUM, labels=("sad", "ok")))
    await journal.append([change_of(2, layout=layout)])
    found = [one.layout.types.get(99999) for one in await read_all(journal)]
    assert [one.labels for one in found if one] == [("sad",), ("sad", "ok")]


async def test_changes_out_of_order_are_refused(journal: Journal) -> None:
    await journal.append(changes_of(1, 3))
    for wrong in (changes_of(3, 4), changes_of(2, 2), [*changes_of(5, 5), *changes_of(4, 4)]):
        with pytest.raises(ValueError, match="does not come after"):
            await journal.append(wrong)
    assert numbers_of(await read_all(journal)) == [1, 2, 3]


async def test_what_a_cancelled_append_has_kept_is_not_kept_twice(journal: Journal) -> None:
    await journal.append(changes_of(1, 3))
    appending = asyncio.ensure_future(journal.append(changes_of(4, 2000)))
    await asyncio.sleep(0)
    appending.cancel()
    await journal.append(changes_of(4, 2001))
    assert numbers_of(await read_all(journal)) == list(range(1, 2002))


async def test_an_append_of_many_changes_is_read_in_pieces(journal: Journal) -> None:
    await journal.append(changes_of(1, 5000))
    pieces = [piece async for piece in journal.read(journal.begins, journal.position)]
    assert len(pieces) >= 5
    assert max(map(len, pieces)) <= BLOCK_CHANGES


async def test_large_changes_are_divided_by_their_size(journal: Journal) -> None:
    await journal.append(changes_of(1, 100, BLOCK_BYTES // 4))
    pieces = [piece async for piece in journal.read(journal.begins, journal.position)]
    assert numbers_of([one for piece in pieces for one in piece]) == list(range(1, 101))
    assert max(map(len, pieces)) <= 8


async def test_a_reader_sees_whole_appends_only_and_does_not_wait_for_them(path: Path) -> None:
    journal = journal_at(path, max_bytes=1 << 23)
    await journal.open(HISTORY)
    await journal.append(changes_of(1, 10))
    reader = JournalReader(path)
    await reader.open()
    appending = asyncio.ensure_future(journal.append(changes_of(11, 1000, 2000)))
    seen = set()
    while not appending.done():
        seen.add((await reader.state()).position)
        assert numbers_of(await read_all(reader))[-1] in {10, 1000}
    await appending
    assert seen <= {position_of(10), position_of(1000)}
    await reader.close()
    await journal.close()


async def test_a_hundred_readers_read_the_same_and_blocks_are_decoded_once(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    await journal.append(changes_of(1, 5000))
    decoded: list[int] = []

    def note(blocks: _Blocks, number: int, piece: Piece) -> None:
        decoded.append(number)
        keep(blocks, number, piece)

    keep = _Blocks._keep
    monkeypatch.setattr(_Blocks, "_keep", note)
    read = await asyncio.gather(*(read_all(journal) for _ in range(100)))
    assert {tuple(numbers_of(one)) for one in read} == {tuple(range(1, 5001))}
    assert len(decoded) == len(set(decoded))


async def test_what_is_remembered_is_bounded(path: Path, journal: Journal) -> None:
    for first in range(1, 200, 10):
        await journal.append(changes_of(first, first + 9, 1000))
    reader = JournalReader(path, cache_bytes=200_000)
    await reader.open()
    assert len(await read_all(reader)) == 200
    blocks = reader._blocks
    assert 0 < sum(one.size_bytes for one in blocks._pieces.values()) <= 200_000
    await reader.close()


# ---- Where it stands


async def test_it_stands_after_a_restart_where_it_stood(journal: Journal) -> None:
    await journal.interrupt(Lsn(50))
    await journal.append(changes_of(1, 10))
    await journal.cover(Lsn(1234))
    again = await reopened(journal)
    assert (again.begins, again.position) == (Position.after(Lsn(50)), position_of(10))
    assert again.covered == Lsn(1234)
    await again.append(changes_of(11, 12))
    assert numbers_of(await read_all(again)) == list(range(1, 13))
    await again.close()


async def test_covered_never_goes_back(journal: Journal) -> None:
    await journal.cover(Lsn(100))
    await journal.cover(Lsn(50))
    assert journal.covered == Lsn(100)


async def test_an_interruption_forgets_what_was_before(journal: Journal) -> None:
    await journal.append(changes_of(1, 2000, 100))
    await journal.interrupt(Lsn(500_000))
    behind = Position.after(Lsn(500_000))
    assert (journal.begins, journal.position) == (behind, behind)
    assert journal.covered == Lsn(500_000)
    with pytest.raises(JournalTrimmed) as caught:
        await anext(journal.read(position_of(3), behind))
    assert caught.value.begins == behind
    assert journal.vitals().bytes < 200_000
    await journal.append(changes_of(5001, 5002))
    assert numbers_of(await read_all(journal)) == [5001, 5002]


async def test_an_interruption_may_lead_back(journal: Journal) -> None:
    """A server that was restored from a backup is behind what it sent before."""
    await journal.append(changes_of(1, 100))
    await journal.interrupt(Lsn(5000))
    await journal.append(changes_of(51, 60))
    assert numbers_of(await read_all(journal)) == list(range(51, 61))


async def test_who_reads_across_an_interruption_is_told(journal: Journal) -> None:
    await journal.append(changes_of(1, 3000))
    reading = journal.read(journal.begins, journal.position)
    await anext(reading)
    await journal.interrupt(Lsn(1))
    await journal.append(changes_of(1, 3000))
    with pytest.raises(JournalTrimmed):
        await anext(reading)


async def test_other_rules_begin_anew_and_leave_nothing_on_disk(path: Path) -> None:
    journal = journal_at(path)
    await journal.open("slot@1 old rules")
    secret = [change_of(number, content=f"secret{number}" * 50) for number in range(1, 500)]
    await journal.append(secret)
    blobs = sqlite3.connect(path).execute("SELECT data FROM blocks").fetchall()
    assert blobs
    again = await reopened(journal, "slot@1 new rules")
    assert (again.begins, again.position, again.covered) == (BEGINNING, BEGINNING, ZERO)
    assert await read_all(again) == []
    written = b"".join(one.read_bytes() for one in path.parent.glob("journal*"))
    assert all(blob[100:200] not in written for (blob,) in blobs)
    assert len(written) < 100_000
    await again.append(changes_of(1, 2))
    await (await reopened(again, "slot@1 new rules")).close()


async def test_opening_it_again_only_compares_the_rules(journal: Journal) -> None:
    await journal.append(changes_of(1, 3))
    await journal.open(HISTORY)
    assert journal.position == position_of(3)
    await journal.open("slot@1 others")
    assert journal.position == BEGINNING


async def test_what_is_of_another_slot_is_not_forgotten_without_being_asked(
    journal: Journal,
) -> None:
    """A configuration with a wrong slot must not cost the history of the right one."""
    await journal.append(changes_of(1, 3))
    with pytest.raises(SetupError, match=r"3 changes of slot@1, and this is other@1"):
        await journal.open("other@1 rules")
    assert journal.position == position_of(3)
    await journal.open("other@1 rules", accept_gap=True)
    assert journal.position == BEGINNING


async def test_a_closed_journal_can_be_opened_again(journal: Journal) -> None:
    await journal.append(changes_of(1, 3))
    await journal.close()
    with pytest.raises(SinkFailed, match="not open"):
        await journal.append(changes_of(4, 4))
    await journal.open(HISTORY)
    await journal.append(changes_of(4, 4))
    assert numbers_of(await read_all(journal)) == [1, 2, 3, 4]


# ---- Times


async def test_a_time_leads_to_what_was_committed_then_and_later(journal: Journal) -> None:
    await journal.append(changes_of(1, 1500))
    await journal.append(changes_of(1501, 1600))
    for number in (2, 3, 999, 1000, 1001, 1500, 1501, 1600):
        assert await journal.position_before(time_of(number)) == position_of(number - 1)
    assert await journal.position_before(time_of(1) + timedelta(seconds=0.5)) == position_of(1)
    assert await journal.position_before(time_of(1601)) == position_of(1600)


async def test_a_time_before_its_beginning_is_not_reached(journal: Journal) -> None:
    assert await journal.position_before(datetime.now(UTC) - timedelta(hours=1)) is None
    assert await journal.position_before(datetime.now(UTC) + timedelta(hours=1)) == BEGINNING
    await journal.append(changes_of(10, 20))
    assert await journal.position_before(time_of(9)) is None
    assert await journal.position_before(time_of(10)) == BEGINNING
    assert await journal.position_before(time_of(11)) == position_of(10)


async def test_a_time_of_what_was_trimmed_is_not_reached(path: Path, journal: Journal) -> None:
    for number in range(1, 6):
        await journal.append([change_of(number)])
    trim(path, before=time_of(3))
    await journal.cover(Lsn(1))
    assert journal.begins == position_of(2)
    assert await journal.position_before(time_of(2)) is None
    assert await journal.position_before(time_of(3)) == position_of(2)


async def test_times_that_go_back_leave_nothing_out(journal: Journal) -> None:
    seconds = [10, 30, 20, 40, 35, 50]
    for number, second in enumerate(seconds, start=1):
        its = transaction_of(number, TIME + timedelta(seconds=second))
        await journal.append([change_of(number, transaction=its)])
    for second in range(10, 52):
        before = await journal.position_before(TIME + timedelta(seconds=second))
        assert before is not None
        first = next((n for n, one in enumerate(seconds, start=1) if one >= second), 7)
        assert before == (position_of(first - 1) if first > 1 else BEGINNING)


# ---- Bounds


async def pushed(journal: Journal, first: int, last: int, size_bytes: int = 500) -> int:
    """Append in batches; return the largest that the files were."""
    most = 0
    pick = random.Random(first)  # noqa: S311 - nothing is secret
    while first <= last:
        upto = min(first + pick.choice([1, 1, 20, 300]), last)
        await journal.append(changes_of(first, upto, size_bytes))
        most = max(most, journal.vitals().bytes, sizes(journal.path).total_bytes)
        first = upto + 1
    return most


@pytest.mark.parametrize("durable", [False, True])
async def test_the_files_stay_within_their_bound(path: Path, *, durable: bool) -> None:
    max_bytes = 2 << 20
    journal = journal_at(path, max_bytes=max_bytes, durable=durable)
    await journal.open(HISTORY)
    most = await pushed(journal, 1, 12_000)
    assert max_bytes // 2 < most <= max_bytes
    kept = numbers_of(await read_all(journal))
    assert kept == list(range(kept[0], 12_001))
    assert journal.begins == position_of(kept[0] - 1)
    vitals = journal.vitals()
    assert (vitals.changes, vitals.appended) == (len(kept), 12_000)
    assert len(kept) * 500 > max_bytes // 2
    with pytest.raises(JournalTrimmed):
        await anext(journal.read(position_of(1), position_of(2)))
    await journal.close()
    assert path.stat().st_size <= max_bytes


async def test_small_appends_stay_within_it_too(path: Path) -> None:
    journal = journal_at(path, max_bytes=1 << 20)
    await journal.open(HISTORY)
    for number in range(1, 1501):
        await journal.append(changes_of(number, number, 1000))
        assert sizes(path).total_bytes <= 1 << 20
    kept = numbers_of(await read_all(journal))
    assert kept == list(range(kept[0], 1501))
    assert len(kept) > 300
    await journal.close()


async def test_of_an_append_that_is_too_large_the_end_is_kept(path: Path) -> None:
    journal = journal_at(path, max_bytes=1 << 20)
    await journal.open(HISTORY)
    await journal.append(changes_of(1, 10))
    await journal.append(changes_of(11, 5000, 1000))
    assert sizes(path).total_bytes <= 1 << 20
    kept = numbers_of(await read_all(journal))
    assert kept == list(range(kept[0], 5001))
    assert (journal.begins, journal.position) == (position_of(kept[0] - 1), position_of(5000))
    await journal.close()


async def test_a_change_that_is_too_large_is_passed_over(path: Path) -> None:
    journal = journal_at(path, max_bytes=1 << 20)
    await journal.open(HISTORY)
    await journal.append(changes_of(1, 10))
    await journal.append(changes_of(11, 11, 1 << 20))
    assert (journal.begins, journal.position) == (position_of(11), position_of(11))
    assert sizes(path).total_bytes <= 1 << 20
    await journal.append(changes_of(12, 13))
    assert numbers_of(await read_all(journal)) == [12, 13]
    await journal.close()


async def test_a_smaller_bound_holds_from_the_start(journal: Journal) -> None:
    await pushed(journal, 1, 10_000)
    assert journal.vitals().bytes > 3 << 20
    again = await reopened(journal, max_bytes=1 << 20)
    assert again.vitals().bytes <= 1 << 20
    kept = numbers_of(await read_all(again))
    assert kept == list(range(kept[0], 10_001))
    await again.close()


async def test_what_is_too_old_goes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time_of(100).timestamp()
    monkeypatch.setattr(time, "time", lambda: now)
    journal = journal_at(path, max_age_seconds=50)
    await journal.open(HISTORY)
    await journal.append(changes_of(1, 40))
    assert (journal.begins, journal.position) == (position_of(40), position_of(40))
    for number in range(41, 101):
        await journal.append([change_of(number)])
    assert journal.begins == position_of(49)
    vitals = journal.vitals()
    assert (vitals.oldest_time, vitals.newest_time) == (time_of(50), time_of(100))
    assert vitals.oldest_seconds == 50
    now += 20
    await journal.cover(Lsn(1))
    assert journal.begins == position_of(69)
    now += 1000
    again = await reopened(journal, max_age_seconds=50)
    assert again.begins == again.position == position_of(100)
    assert again.vitals().oldest_time is None
    await again.close()


async def test_layouts_that_no_block_needs_go_too(path: Path) -> None:
    journal = journal_at(path, max_bytes=1 << 20)
    await journal.open(HISTORY)
    stays = layout_of("stays")
    for number in range(1, 250):
        passing = layout_of(f"passing{number}")
        await journal.append(
            [
                change_of(2 * number, layout=passing, content=os.urandom(6000).hex()),
                change_of(2 * number + 1, layout=stays),
            ]
        )
    read = await read_all(journal)
    needed = len({change.relation for change in read})
    [(kept,)] = sqlite3.connect(path).execute("SELECT count(*) FROM layouts").fetchall()
    assert needed <= kept < 2 * needed + 20 < 250
    await journal.close()


async def test_restarts_keep_a_layout_once(journal: Journal) -> None:
    for number in range(1, 5):
        await journal.append([change_of(number, layout=layout_of())])
        journal = await reopened(journal)
    [(kept,)] = sqlite3.connect(journal.path).execute("SELECT count(*) FROM layouts").fetchall()
    assert kept == 1
    assert len(await read_all(journal)) == 4
    await journal.close()


async def test_a_reader_that_does_not_end_is_told_of(path: Path) -> None:
    journal = journal_at(path, max_bytes=1 << 20)
    await journal.open(HISTORY)
    await journal.append(changes_of(1, 10))
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM state").fetchall()
    with pytest.raises(SinkFailed, match="another process reads from it") as caught:
        await pushed(journal, 11, 5000)
    assert "fuser" in caught.value.hint
    assert sizes(path).total_bytes <= 1 << 20
    assert "reads" in journal.vitals().failure
    reader.close()
    await pushed(journal, journal.position.end_lsn // 100 + 1, 5001)
    assert journal.vitals().failure == ""
    await journal.close()


# ---- Trimming beside


@pytest.mark.parametrize("keep_bytes", [0, 300_000])
async def test_trimming_keeps_so_many_bytes(path: Path, journal: Journal, keep_bytes: int) -> None:
    await pushed(journal, 1, 3000)
    before, after = trim(path, keep_bytes=keep_bytes)
    assert before.changes == 3000
    assert sizes(path).total_bytes <= max(keep_bytes, 60_000)
    kept = numbers_of(
        [one async for piece in journal.read(after.begins, journal.position) for one in piece]
    )
    assert kept == list(range(3001 - after.changes, 3001))
    assert (len(kept) > 200) == (keep_bytes > 0)


async def test_who_writes_notices_that_it_was_trimmed(path: Path, journal: Journal) -> None:
    await journal.append(changes_of(1, 2000))
    trim(path)
    with pytest.raises(JournalTrimmed):
        await anext(journal.read(position_of(5), position_of(7)))
    assert journal.begins == journal.position == position_of(2000)
    await journal.append(changes_of(2001, 2002))
    assert numbers_of(await read_all(journal)) == [2001, 2002]
    assert journal.vitals().changes == 2
    trim(path)
    await journal.append(changes_of(2003, 2003))
    assert journal.begins == position_of(2002)


async def test_trimming_again_and_again_beside_a_writer_leaves_no_gap(path: Path) -> None:
    journal = journal_at(path, max_bytes=4 << 20)
    await journal.open(HISTORY)
    stopped = False

    async def keep_trimming() -> None:
        while not stopped:
            await asyncio.to_thread(trim, path, keep_bytes=100_000)

    trimming = asyncio.ensure_future(keep_trimming())
    for first in range(1, 6000, 60):
        await journal.append(changes_of(first, first + 59, 300))
        kept = []
        with suppress(JournalTrimmed):
            kept = numbers_of(await read_all(journal))
        assert not kept or kept == list(range(kept[0], first + 60))
    stopped = True
    await trimming
    await journal.cover(Lsn(1))  # it sees there what the last one has removed
    kept = numbers_of(await read_all(journal))
    assert kept == list(range(kept[0], 6001))
    assert journal.vitals().changes == len(kept)
    await journal.close()


# ---- The file


async def test_the_files_are_for_their_owner_only(path: Path, journal: Journal) -> None:
    await journal.append(changes_of(1, 10))
    found = list(path.parent.iterdir())
    assert len(found) == 4, "with the log, its index, and the lock"
    assert {stat.S_IMODE(one.stat().st_mode) for one in found} == {0o600}


async def refused(work: Awaitable[object]) -> SetupError:
    with pytest.raises(SetupError) as caught:
        await work
    assert caught.value.hint
    return caught.value


OPENING: Final = """
import asyncio, sys
from tests.journals import *
async def main(path):
    journal = journal_at(Path(path))
    try:
        await journal.open(HISTORY)
    except Exception as error:
        print(type(error).__name__, error)
    reader = JournalReader(Path(path))
    await reader.open()
    print(numbers_of(await read_all(reader)))
asyncio.run(main(sys.argv[1]))
"""


async def test_another_process_may_read_and_not_write(path: Path, journal: Journal) -> None:
    await journal.append(changes_of(1, 3))
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", OPENING, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert done.stderr == ""
    assert (
        f"SetupError another process, PID {os.getpid()}, writes the journal {path}" in done.stdout
    )
    assert "[1, 2, 3]" in done.stdout
    await journal.append(changes_of(4, 4))
    error = await refused(journal_at(path).open(HISTORY))
    assert "writes the journal" in error.message


async def test_a_folder_that_is_missing_is_not_made(tmp_path: Path) -> None:
    error = await refused(journal_at(tmp_path / "none" / "journal").open(HISTORY))
    assert "none" in error.message


async def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    error = await refused(journal_at(tmp_path / "journal").open(HISTORY))
    assert "not a regular file" in error.message


async def test_the_database_of_another_program_is_left_alone(path: Path) -> None:
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE t (i int)")
    other.close()
    before = path.read_bytes()
    error = await refused(journal_at(path).open(HISTORY))
    assert "another program" in error.message
    assert path.read_bytes() == before


async def test_the_journal_of_a_later_version_is_refused(path: Path, journal: Journal) -> None:
    await journal.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    error = await refused(journal_at(path).open(HISTORY))
    assert "schema version 99" in error.message


@pytest.mark.parametrize("damage", ["no database", "page", "state"])
async def test_a_corrupt_file_is_refused_and_left(
    path: Path, journal: Journal, damage: str
) -> None:
    await journal.append(changes_of(1, 100, 1000))
    await journal.close()
    if damage == "no database":
        path.write_bytes(b"What is this? " * 1000)
    elif damage == "page":
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * 4096 * 6)
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("DELETE FROM state")
        connection.close()
    before = path.read_bytes()
    error = await refused(journal_at(path).open(HISTORY))
    assert "corrupt" in error.message
    assert "move the file away" in error.hint
    assert path.read_bytes() == before


async def test_a_corrupt_block_is_told_of_and_what_is_appended_is_kept(
    path: Path, journal: Journal
) -> None:
    await journal.append(changes_of(1, 10))
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE blocks SET data = x'00112233'")
    connection.close()
    with pytest.raises(SinkFailed, match="corrupt"):
        await read_all(journal)
    await journal.append(changes_of(11, 12))
    read = [one async for piece in journal.read(position_of(10), journal.position) for one in piece]
    assert numbers_of(read) == [11, 12]


async def test_a_file_that_was_moved_away_leaves_nothing_behind(
    path: Path, journal: Journal
) -> None:
    await journal.append(changes_of(1, 10))
    path.rename(path.with_name("moved"))
    with pytest.raises(SinkFailed, match="removed or replaced"):
        await journal.append(changes_of(11, 12))
    again = await reopened(journal)
    assert (again.begins, again.position) == (BEGINNING, BEGINNING)
    assert await read_all(again) == []
    await again.close()


# ---- What fails


@pytest.fixture
def file_limit() -> Iterator[Any]:
    """Limits how large files may get, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit or soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_is_told_of_and_nothing_of_the_append_is_kept(
    path: Path, journal: Journal, file_limit: Any
) -> None:
    await journal.append(changes_of(1, 100))
    file_limit(max(sizes(path)) + 100_000)
    try:
        for _ in range(2):
            with pytest.raises(SinkFailed, match="disk full") as caught:
                await journal.append(changes_of(101, 2000, 1000))
            assert "ulimit" in caught.value.hint
            assert journal.position == position_of(100)
            assert journal.vitals().failure == "disk full"
            assert numbers_of(await read_all(journal)) == list(range(1, 101))
    finally:
        file_limit(None)
    await journal.append(changes_of(101, 2000, 1000))
    assert journal.vitals().failure == ""
    again = await reopened(journal)
    assert numbers_of(await read_all(again)) == list(range(1, 2001))
    await again.close()


async def test_after_a_full_disk_a_kill_leaves_only_what_was_kept(
    path: Path, journal: Journal, file_limit: Any, tmp_path: Path
) -> None:
    """What a long append has written until the disk was full is not seen, and goes."""
    await journal.append(changes_of(1, 100))
    changes = changes_of(101, 8000, 3000)
    file_limit(5 << 20)
    with pytest.raises(SinkFailed, match="disk full"):
        await journal.append(changes)
    file_limit(None)
    assert sqlite3.connect(path).execute("SELECT max(id) FROM blocks").fetchone() > (3,)
    copied = tmp_path / "copied"
    copied.mkdir()
    for one in path.parent.glob("journal*"):
        if one.is_file():
            (copied / one.name).write_bytes(one.read_bytes())
    again = journal_at(copied / "journal")
    await again.open(HISTORY)
    assert numbers_of(await read_all(again)) == list(range(1, 101))
    await again.append(changes_of(101, 200))
    assert numbers_of(await read_all(again)) == list(range(1, 201))
    await again.close()


@pytest.mark.parametrize(
    ("spoil", "mend", "word"),
    [
        ("PRAGMA max_page_count = 20", "PRAGMA max_page_count = 1000000", "disk full"),
        ("PRAGMA query_only = ON", "PRAGMA query_only = OFF", "read-only"),
    ],
)
async def test_what_sqlite_refuses_is_told_of_and_tried_again(
    journal: Journal, spoil: str, mend: str, word: str
) -> None:
    await journal.append(changes_of(1, 10))
    connection = journal._writer._connection
    assert connection is not None
    connection.execute(spoil).fetchall()
    with pytest.raises(SinkFailed, match=word) as caught:
        await journal.append(changes_of(11, 1000, 1000))
    assert caught.value.hint
    assert journal.vitals().failure == word
    connection.execute(mend).fetchall()
    await journal.append(changes_of(11, 1000, 1000))
    assert numbers_of(await read_all(journal)) == list(range(1, 1001))
    assert journal.vitals().failure == ""


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    with journals.writers() as started:
        yield started


async def verify_after_kill(path: Path, told: int) -> None:
    """All that an append returned for is there, nothing twice, nothing left out."""
    journal = journal_at(path, max_bytes=1 << 20)
    await journal.open(HISTORY)
    kept = numbers_of(await read_all(journal))
    assert kept == list(range(kept[0], kept[-1] + 1))
    assert kept[-1] >= told
    assert journal.position == position_of(kept[-1])
    assert journal.begins in {position_of(kept[0] - 1), BEGINNING}
    assert journal.vitals().changes == len(kept)
    assert sizes(path).total_bytes <= 1 << 20
    await journal.close()


def killed_again_and_again(writers: Writers, path: Path, times: int) -> None:
    pick = random.Random(times)  # noqa: S311 - nothing is secret
    for number in range(times):
        lines, seconds = pick.randrange(1, 20), pick.uniform(0, 0.03)
        told = writers.run(path, lines=lines, seconds=seconds, durable=bool(number % 2))
        asyncio.run(verify_after_kill(path, told))


def test_what_was_appended_before_a_kill_is_there(writers: Writers, path: Path) -> None:
    killed_again_and_again(writers, path, 15)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_what_was_appended_before_two_hundred_kills_is_there(writers: Writers, path: Path) -> None:
    killed_again_and_again(writers, path, 200)


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_a_day_of_changes_stays_within_the_bounds(path: Path) -> None:
    """Three millions of rows of half a kilobyte that cannot be compressed much."""
    max_bytes = 64 << 20
    journal = journal_at(path, max_bytes=max_bytes)
    await journal.open(HISTORY)
    batch = changes_of(1, 500, 500)
    before = peak_bytes = 0
    for number in range(6000):
        for place, change in enumerate(batch, start=number * 500 + 1):
            change.transaction = transaction_of(place)
        await journal.append(batch)
        assert sizes(path).total_bytes <= max_bytes
        if number == 1000:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if not number % 500:
            assert len(await read_all(journal)) == journal.vitals().changes
    peak_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert peak_bytes < 200 << 20
    await journal.close()


# ---- Whatever is done to it


class Model:
    """What a journal is to be: blocks of changes, each an append."""

    def __init__(self) -> None:
        self.covered = ZERO
        self.forget(BEGINNING)

    def forget(self, begins: Position) -> None:
        self.begins = self.position = begins
        self.blocks: list[list[Change]] = []

    def append(self, changes: Sequence[Change]) -> None:
        if changes:
            self.blocks.append(list(changes))
            self.position = Position.of(changes[-1])

    def trim(self, before: datetime | None) -> None:
        while self.blocks and (before is None or newest(self.blocks[0]) < before):
            self.begins = Position.of(self.blocks.pop(0)[-1])

    @property
    def changes(self) -> list[Change]:
        return [change for block in self.blocks for change in block]


def newest(changes: Sequence[Change]) -> datetime:
    return max(change.commit_time for change in changes)


STEPS: Final = st.lists(
    st.tuples(st.just("append"), st.lists(st.integers(1, 3), max_size=5))
    | st.tuples(st.just("append"), st.lists(st.integers(1, 3), max_size=5))
    | st.tuples(st.sampled_from(["interrupt", "cover", "trim"]), st.integers(0, 30))
    | st.tuples(st.sampled_from(["trim all", "reopen", "other rules"]), st.none()),
    max_size=15,
)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@given(steps=STEPS)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_journal_does_what_the_model_does(
    runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("model") / "journal"
    runner.run(compare(path, steps))


async def compare(path: Path, steps: list[tuple[str, Any]]) -> None:
    model, rules = Model(), 0
    journal = journal_at(path)
    await journal.open("slot@1 0")
    for step, argument in steps:
        number = model.position.end_lsn // 100 + 1
        if step == "append":
            made = [
                change_of(number + place, ordinal + 1)
                for place, count in enumerate(argument)
                for ordinal in range(count)
            ]
            model.append(made)
            await journal.append(made)
        elif step == "interrupt":
            model.forget(Position.after(Lsn(argument * 100)))
            model.covered = Lsn(argument * 100)
            await journal.interrupt(Lsn(argument * 100))
        elif step == "cover":
            model.covered = max(model.covered, Lsn(argument * 100))
            await journal.cover(Lsn(argument * 100))
        elif step == "trim":
            model.trim(time_of(argument))
            trim(path, before=time_of(argument))
            await journal.cover(Lsn(model.covered + 1))
            model.covered = Lsn(model.covered + 1)
        elif step == "trim all":
            model.trim(None)
            trim(path)
            await journal.close()
            await journal.open(f"slot@1 {rules}")
        elif step == "reopen":
            journal = await reopened(journal, f"slot@1 {rules}")
        else:
            rules += 1
            model = Model()
            journal = await reopened(journal, f"slot@1 {rules}")
        await self_check(journal, model)
    await journal.close()


async def self_check(journal: Journal, model: Model) -> None:
    assert (journal.begins, journal.position) == (model.begins, model.position)
    assert journal.covered == model.covered
    assert journal.vitals().changes == len(model.changes)
    read = await read_all(journal)
    assert [one.to_json() for one in read] == [one.to_json() for one in model.changes]
    for number in (1, 10, 25):
        time = time_of(number)
        before = await journal.position_before(time)
        if before is not None:
            behind = [one for one in model.changes if Position.of(one) > before]
            assert [one for one in model.changes if one.commit_time >= time] == behind
            assert model.begins <= before <= model.position


async def test_an_overrun_is_told(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row that is larger than there is room for takes everything with it."""
    journal = journal_at(path, max_bytes=1 << 20)
    await journal.open(HISTORY)
    await journal.append(changes_of(1, 20))
    await journal.append(changes_of(30, 30, size_bytes=1 << 20))
    assert journal.begins == position_of(30)
    assert "journal_overrun" in capsys.readouterr().out
    await journal.close()
