"""The faults that a seed makes a script of: what networks, servers, disks and people do.

Each is done to a `Rig` that streams, or is about to, and is over when its function returns: what
is broken is whole again, but walstream need not have noticed yet.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Final, NamedTuple, TypeAlias

import psycopg
from psycopg import sql

from tests.operations.endpoint import Behaviour
from tests.operations.rig import PASSWORD, ROLE, Rig
from tests.postgres import Database, wait_until
from tests.proxy import Direction, Which
from walstream.decoder import START_OPTIONS
from walstream.errors import EX_CONFIG, EX_OK

Play: TypeAlias = Callable[[Rig, random.Random], None]


class Fault(NamedTuple):
    """What goes wrong, and how many of it are in a deck."""

    name: str
    play: Play
    cards: int


CATALOGUE: Final[list[Fault]] = []


def fault(cards: int) -> Callable[[Play], Play]:
    """Put a fault into the catalogue."""

    def put(play: Play) -> Play:
        CATALOGUE.append(Fault(play.__name__, play, cards))
        return play

    return put


def script(chance: random.Random, count: int) -> Iterator[Fault]:
    """Deal so many faults, from one shuffled deck of all of them after another."""
    deck: list[Fault] = []
    for _ in range(count):
        if not deck:
            deck = [fault for fault in CATALOGUE for _ in range(fault.cards)]
            chance.shuffle(deck)
        yield deck.pop()


def _which(chance: random.Random) -> Which:
    return chance.choice(
        (Which.ALL, Which.ALL, Which.REPLICATION, Which.REPLICATION, Which.ORDINARY)
    )


def _direction(chance: random.Random) -> Direction:
    return chance.choice((Direction.TO_SERVER, Direction.TO_CLIENT, Direction.BOTH))


def _pause(chance: random.Random, least_seconds: float, most_seconds: float) -> None:
    """Let the fault last."""
    time.sleep(chance.uniform(least_seconds, most_seconds))


# The network


@fault(cards=6)
def connections_are_cut(rig: Rig, chance: random.Random) -> None:
    rig.proxy.cut(_which(chance))


@fault(cards=4)
def a_message_is_cut_in_two(rig: Rig, chance: random.Random) -> None:
    rig.proxy.cut_after(chance.randrange(1, 5000), Which.REPLICATION, _direction(chance))


@fault(cards=4)
def the_next_connections_are_cut_while_they_are_opened(rig: Rig, chance: random.Random) -> None:
    """In the middle of authentication, of the first queries, or of the first messages."""
    for _ in range(chance.randrange(1, 4)):
        rig.proxy.cut()
        rig.proxy.cut_after(chance.randrange(1, 3000), Which.ALL, _direction(chance))
        _pause(chance, 0.0, 0.2)


@fault(cards=4)
def nothing_passes_for_a_while(rig: Rig, chance: random.Random) -> None:
    rig.proxy.stall(_which(chance), _direction(chance))
    _pause(chance, 0.1, chance.choice((0.5, 0.5, 0.5, 5.0)))
    rig.proxy.restore()


@fault(cards=2)
def nothing_passes_and_then_the_connections_are_cut(rig: Rig, chance: random.Random) -> None:
    rig.proxy.stall(_which(chance), _direction(chance))
    _pause(chance, 0.1, 0.6)
    rig.proxy.cut(_which(chance))
    _pause(chance, 0.0, 0.3)
    rig.proxy.restore()


@fault(cards=4)
def connections_are_half_closed(rig: Rig, chance: random.Random) -> None:
    direction = chance.choice((Direction.TO_SERVER, Direction.TO_CLIENT))
    rig.proxy.half_close(direction, _which(chance))


@fault(cards=2)
def one_byte_passes_at_a_time(rig: Rig, chance: random.Random) -> None:
    pause_seconds = chance.choice((0.0, 0.0005, 0.002))
    rig.proxy.trickle(pause_seconds, _which(chance), _direction(chance))
    if chance.random() < 0.5:
        rig.proxy.cut()
    _pause(chance, 0.1, 1.0)
    rig.proxy.restore()


@fault(cards=1)
def everything_comes_late(rig: Rig, chance: random.Random) -> None:
    rig.proxy.delay(chance.uniform(0.01, 0.1), _which(chance), _direction(chance))
    _pause(chance, 0.1, 0.6)
    rig.proxy.restore()


@fault(cards=2)
def new_connections_are_refused(rig: Rig, chance: random.Random) -> None:
    rig.proxy.refuse()
    rig.proxy.cut(_which(chance))
    _pause(chance, 0.1, 0.6)
    rig.proxy.restore()


# The server


@fault(cards=5)
def the_walsender_is_terminated(rig: Rig, chance: random.Random) -> None:
    rig.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_replication WHERE usename = %s", ROLE
    )


@fault(cards=1)
def the_walsender_is_cancelled(rig: Rig, chance: random.Random) -> None:
    rig.execute("SELECT pg_cancel_backend(pid) FROM pg_stat_replication WHERE usename = %s", ROLE)


@fault(cards=2)
def all_of_the_role_are_terminated(rig: Rig, chance: random.Random) -> None:
    rig.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", ROLE)


@fault(cards=2)
def the_server_is_restarted_fast(rig: Rig, chance: random.Random) -> None:
    rig.cluster.stop("fast")
    _pause(chance, 0.0, 0.3)
    rig.cluster.start()


@fault(cards=2)
def the_server_is_restarted_immediately(rig: Rig, chance: random.Random) -> None:
    rig.cluster.stop("immediate")
    rig.cluster.start()


@fault(cards=2)
def the_server_is_killed(rig: Rig, chance: random.Random) -> None:
    rig.cluster.kill()
    _pause(chance, 0.0, 0.3)
    rig.cluster.start()


@fault(cards=1)
def the_walsender_is_killed(rig: Rig, chance: random.Random) -> None:
    """As by the kernel, out of memory: the server ends all others, and recovers."""
    if walsender := rig.walsender():
        with suppress(ProcessLookupError):
            os.kill(walsender, signal.SIGKILL)
        wait_until(lambda: rig.execute("SELECT 1"))


@fault(cards=3)
def the_slot_is_taken_over_for_a_while(rig: Rig, chance: random.Random) -> None:
    """By somebody who confirms nothing."""
    rig.proxy.refuse()
    rig.proxy.cut(Which.REPLICATION)
    rig.wait_until_free()
    options = ", ".join(f"\"{name}\" '{value}'" for name, value in START_OPTIONS.items())
    start = f'START_REPLICATION SLOT "{rig.slot}" LOGICAL 0/0 ({options})'
    thief = psycopg.connect(
        rig.database.dsn, replication="database", autocommit=True, application_name="thief"
    )
    with closing(thief):
        thief.execute(start.encode())
        rig.proxy.restore()
        _pause(chance, 0.1, 0.8)


@fault(cards=1)
def the_role_may_not_connect_for_a_while(rig: Rig, chance: random.Random) -> None:
    """All that it may have is in use: somebody will let go."""
    rig.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT 0")
    rig.proxy.cut()
    _pause(chance, 0.1, 0.6)
    rig.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT -1")


@fault(cards=1)
def the_database_takes_no_connections_for_a_while(rig: Rig, chance: random.Random) -> None:
    """As before it is renamed or copied."""
    alter = f'ALTER DATABASE "{rig.database.name}" ALLOW_CONNECTIONS '
    rig.execute("SELECT 1")  # connected, for what comes next must not have to connect
    with Database(rig.cluster.conninfo()) as elsewhere:
        elsewhere.execute(alter + "false")
        try:
            rig.proxy.cut()
            _pause(chance, 0.1, 0.6)
        finally:
            elsewhere.execute(alter + "true")


@fault(cards=1)
def the_password_is_changed_for_a_while(rig: Rig, chance: random.Random) -> None:
    """Trying again does not help: a loud stop, and a start when it is right again."""
    rig.recover()
    rig.execute(f"ALTER ROLE {ROLE} PASSWORD 'another one'")
    rig.proxy.cut()
    code = rig.ended()
    rig.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(*_role()).as_string())
    assert code == EX_CONFIG, rig.log_tail()
    assert "password authentication failed" in rig.log_tail()
    rig.start()


def _role() -> tuple[sql.Identifier, sql.Literal]:
    return sql.Identifier(ROLE), sql.Literal(PASSWORD)


# The process


@fault(cards=3)
def the_process_is_killed(rig: Rig, chance: random.Random) -> None:
    rig.end(signal.SIGKILL)
    rig.start()


@fault(cards=1)
def the_process_is_killed_while_it_starts(rig: Rig, chance: random.Random) -> None:
    rig.end(signal.SIGKILL)
    rig.start()
    _pause(chance, 0.0, 1.5)
    rig.look_after()
    rig.end(signal.SIGKILL)
    rig.start()


@fault(cards=2)
def the_process_is_restarted(rig: Rig, chance: random.Random) -> None:
    rig.wait_until_streaming()
    code = rig.end(signal.SIGTERM)
    assert code in {EX_OK, 75}, rig.log_tail()
    rig.start()


@fault(cards=2)
def the_process_is_frozen(rig: Rig, chance: random.Random) -> None:
    """As a virtual machine that is moved: sometimes longer than the server waits."""
    assert rig.process is not None
    rig.process.send_signal(signal.SIGSTOP)
    _pause(chance, 0.1, chance.choice((0.5, 0.5, 4.0)))
    rig.process.send_signal(signal.SIGCONT)


@fault(cards=3)
def the_clock_jumps(rig: Rig, chance: random.Random) -> None:
    """Back to 1970 and beyond the next age; it goes on from there until the next jump."""
    rig.set_clock(chance.choice((0, 0, 3600, -3600, 86400.0 * 36500, -time.time() + 1, -5, 5)))


# What changes are written to


@fault(cards=2)
def the_disk_is_full_for_a_while(rig: Rig, chance: random.Random) -> None:
    path = rig.twins.path
    size_bytes = path.stat().st_size if path.exists() else 0
    rig.limit_files(size_bytes + chance.randrange(5000))
    _pause(chance, 0.1, 0.8)
    rig.limit_files(resource.RLIM_INFINITY)


@fault(cards=2)
def the_file_is_moved_away(rig: Rig, chance: random.Random) -> None:
    rig.rotate()


@fault(cards=2)
def the_receiver_refuses(rig: Rig, chance: random.Random) -> None:
    with rig.endpoint.refusing():
        _pause(chance, 0.1, 0.6)


@fault(cards=4)
def the_receiver_misbehaves(rig: Rig, chance: random.Random) -> None:
    """Slow, busy, silent, or failing after it has accepted."""
    behaviour = chance.choice([one for one in Behaviour if one is not Behaviour.ACCEPTS])
    with rig.endpoint.behaving(behaviour):
        _pause(chance, 0.1, chance.choice((0.6, 0.6, 1.5)))


# The configuration


@fault(cards=2)
def the_configuration_is_reloaded(rig: Rig, chance: random.Random) -> None:
    """With another log level, or with one that does not exist, which is refused."""
    level = chance.choice(("debug", "info", "warning", "loud"))
    rig.wait_until_streaming()
    rig.configure(log={"level": level})
    assert rig.process is not None
    rig.process.send_signal(signal.SIGHUP)
    _pause(chance, 0.05, 0.2)
    rig.configure()
