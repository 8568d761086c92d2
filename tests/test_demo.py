"""The demonstration: what it shows, that its sums agree, and that it leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.postgres import wait_until
from walstream.cluster import PROGRAMS_VARIABLE, ServerPrograms
from walstream.demo import Balance, _verify
from walstream.demo.workload import Tally
from walstream.errors import EX_CONFIG, EX_SOFTWARE, StreamBroken
from walstream.lsn import ZERO, Lsn
from walstream.summary import RouteSummary, Summary


def start(*options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "walstream", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def figures(output: str, name: str) -> list[int]:
    """The numbers of a line of the balance."""
    [line] = re.findall(rf"^{name} .*", output, re.MULTILINE)
    return [int(number) for number in re.findall(r"\b\d+\b(?!/)", line)]


def assert_sums_agree(output: str) -> None:
    changes, transactions, _ = figures(output, "committed")
    delivered, *by_handler = figures(output, "delivered")
    filtered, *by_reason = figures(output, "filtered")
    assert delivered + filtered == changes >= transactions
    assert sum(by_handler) == delivered == output.count("\nwalstream  ")
    assert sum(by_reason) == filtered


def assert_nothing_is_left(output: str) -> None:
    [folder] = re.findall(r"runs in (/\S+)\.$", output, re.MULTILINE)
    assert not Path(folder).exists()
    assert wait_until(lambda: not [pid for pid in running() if folder in command_line(pid)])


def running() -> list[str]:
    return [entry.name for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_it_shows_what_three_handlers_get_and_that_nothing_is_missing(
    server_programs: ServerPrograms,
) -> None:
    demo = start("--seconds", "4")
    output, errors = demo.communicate()
    assert (demo.returncode, errors) == (0, "")
    assert (
        '@stream.on("public.messages_v2", "insert", where="conversation_id=eq.kitchen")' in output
    )
    for shown in (
        "walstream  insert messages_v2        Ada: Did anyone feed the cat?",
        "walstream  update reminders          Ben, it is time: buy cat food",
        "walstream  delete user_interactions  of Ada to message 3",
        "app        Ben writes in the kitchen (rolled back)",
    ):
        assert shown in output
    assert "never sent" not in output
    assert_sums_agree(output)
    assert_nothing_is_left(output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_early_with_everything_delivered(
    server_programs: ServerPrograms, number: signal.Signals
) -> None:
    demo = start("--seconds", "60")
    assert demo.stdout is not None
    seen = ""
    while "walstream  insert" not in seen:
        line = demo.stdout.readline()
        assert line, "it ended by itself"
        seen += line
    demo.send_signal(number)
    rest, errors = demo.communicate(timeout=30)
    assert (demo.returncode, errors) == (0, "")
    assert_sums_agree(seen + rest)
    assert_nothing_is_left(seen + rest)


def test_a_reader_that_goes_away_leaves_nothing_behind(server_programs: ServerPrograms) -> None:
    demo = start("--seconds", "60")
    assert demo.stdout is not None
    seen = ""
    while "walstream  insert" not in seen:
        seen += demo.stdout.readline()
    demo.stdout.close()
    demo.wait(30)
    assert demo.stderr is not None
    assert demo.stderr.read() == ""
    demo.stderr.close()
    assert_nothing_is_left(seen)


def test_environment_variables_do_not_lead_it_to_a_real_database(
    server_programs: ServerPrograms,
) -> None:
    demo = start("--seconds", "0.1", WALSTREAM_POSTGRES_DSN="host=nowhere.invalid")
    output, _ = demo.communicate()
    assert demo.returncode == 0
    assert_nothing_is_left(output)


def test_without_server_programs_it_says_what_to_install(tmp_path: Path) -> None:
    demo = start(**{PROGRAMS_VARIABLE: str(tmp_path)})
    _, errors = demo.communicate()
    assert demo.returncode == EX_CONFIG
    assert errors.startswith("ServerProgramsMissing: ")
    assert "hint: " in errors


def balance(*, changes: int = 5, matched: int = 3, delivered: int = 3) -> Balance:
    """What a run gives that has committed 5 changes, 3 of them for the handler."""
    summary = Summary(
        transactions=5,
        changes=changes,
        delivered=delivered,
        retries=0,
        sessions=1,
        lost=0,
        flush_lsn=ZERO,
        routes=(RouteSummary("handler", matched, 0, 0),),
        destinations=(),
    )
    committed = Tally(transactions=5, changes=5, wanted=Counter({"handler": 3}))
    return Balance(committed, summary, Lsn(0), Lsn(0))


def test_a_balance_that_agrees_is_accepted() -> None:
    _verify(balance())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (balance(changes=4), "the stream had to get 5 changes that were committed, and got 4"),
        (balance(matched=2), "handler had to get 3 changes that were committed, and got 2"),
        (balance(delivered=4), "all handlers together had to get 3 changes .*, and got 4"),
    ],
)
def test_a_missing_change_is_our_bug(wrong: Balance, sentence: str) -> None:
    with pytest.raises(StreamBroken, match=sentence) as caught:
        _verify(wrong)
    assert caught.value.exit_code == EX_SOFTWARE
