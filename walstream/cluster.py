"""A throwaway private PostgreSQL, for the demonstration, the benchmark and tests.

It lives in one temporary folder that only its owner can enter, listens on a socket in that folder,
and is gone when the block that made it ends::

    with PrivateCluster() as cluster:
        psycopg.connect(cluster.conninfo())

However the program ends, nothing stays behind: a watcher process waits for the program to go away,
then ends the server and removes the folder.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TypedDict

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from walstream.errors import ClusterFailed, ServerProgramsMissing

PROGRAMS_VARIABLE: Final = "WALSTREAM_PG_BIN"
"""Environment variable: the folder of the server programs to use, instead of the newest found."""

SUPERUSER: Final = "postgres"

DURABLE: Final[Mapping[str, str]] = {"fsync": "on", "full_page_writes": "on"}
"""Settings for a cluster whose data must survive a crash of the machine, at a server's cost."""

StopMode = Literal["smart", "fast", "immediate"]
"""The shutdown modes of ``pg_ctl stop -m``."""

_SIGNALS: Final[Mapping[StopMode, signal.Signals]] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}

_SETTINGS: Final[Mapping[str, str]] = {
    "wal_level": "logical",
    "max_replication_slots": "50",
    "max_wal_senders": "50",
    # The cluster is thrown away: a crash of the machine may take it along.
    "fsync": "off",
    "full_page_writes": "off",
    # Files in the data folder, not in /dev/shm, so that not even a killed server leaves them.
    "dynamic_shared_memory_type": "mmap",
    "lc_messages": "C",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d ",
}

_HBA: Final = """\
# The folder of the socket lets nobody in but the owner; the network asks for a password.
local all all trust
local replication all trust
host all all 127.0.0.1/32 scram-sha-256
host replication all 127.0.0.1/32 scram-sha-256
"""

# The version whose packages are named where no package list says better.
_USUAL_MAJOR: Final = 17

# sun_path holds 108 bytes on Linux, the last one a zero (unix(7)); 104 on macOS and the BSDs.
_SOCKET_PATH_BYTES: Final = 103

# Waits until the program that holds the other end of its standard input closes it or is gone,
# however it went. Then it removes the folder, and before that a server that nobody stopped: line 1
# of the lock file is its process id (negative while initdb runs it), line 7 ends in the id of the
# shared memory that marks the data as in use, which a killed server leaves behind (miscadmin.h).
_WATCHER: Final = """\
read -r _
lock_file=$1/data/postmaster.pid
pid=$(sed -n '1s/^-//; 1p' "$lock_file" 2>/dev/null)
segment=$(sed -n '7s/.* //p' "$lock_file" 2>/dev/null)
if [ -n "$pid" ]; then
    kill -QUIT "$pid" 2>/dev/null
    tries=100
    while [ "$tries" -gt 0 ] && kill -0 "$pid" 2>/dev/null; do
        sleep 0.1
        tries=$((tries - 1))
    done
fi
if [ -n "$segment" ]; then
    ipcrm -m "$segment" 2>/dev/null
fi
tries=10
while [ "$tries" -gt 0 ] && ! rm -rf "$1" 2>/dev/null; do
    sleep 0.2
    tries=$((tries - 1))
done
"""


class _Identity(TypedDict, total=False):
    """Whom a subprocess runs as; empty for ourselves."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True, slots=True)
class ServerPrograms:
    """One installation of PostgreSQL's server that has wal2json.

    ``folder`` holds initdb, postgres and their kind; ``version`` is (15, 20), or (19, 0) for a
    version still in development.
    """

    folder: Path
    version: tuple[int, int]

    def path(self, program: str) -> str:
        """The path of one of the programs, for a subprocess."""
        return str(self.folder / program)


def find_programs() -> ServerPrograms:
    """The newest installation that has wal2json, or the one that WALSTREAM_PG_BIN names.

    Raises:
        ServerProgramsMissing: there is none; the hint is the command that installs it.
    """
    named = os.environ.get(PROGRAMS_VARIABLE)
    folders = [Path(named).absolute()] if named else list(_installed_folders())
    servers = [folder for folder in folders if _has_server(folder)]
    usable = [folder for folder in servers if _has_wal2json(folder)]
    if usable:
        # max() takes the first of equals: what pg_config names goes before what merely exists.
        return max(map(_programs_in, usable), key=lambda programs: programs.version)
    if named:
        raise ServerProgramsMissing(
            f"{PROGRAMS_VARIABLE} is {named}, where "
            + ("the server has no wal2json" if servers else "initdb and postgres are not found"),
            hint=f"name the folder of a server that has wal2json, or unset {PROGRAMS_VARIABLE}",
        )
    if servers:
        newest = max(map(_programs_in, servers), key=lambda programs: programs.version)
        raise ServerProgramsMissing(
            f"wal2json is not installed for the PostgreSQL server in {newest.folder}",
            hint=_install_command(f"postgresql-{newest.version[0]}-wal2json"),
        )
    major = _packaged_major()
    raise ServerProgramsMissing(
        "no PostgreSQL server is installed on this machine",
        hint=_install_command(f"postgresql-{major}", f"postgresql-{major}-wal2json"),
    )


class PrivateCluster:
    """One private PostgreSQL server and its data, made by initdb or copied from ``template``.

    ``settings`` go into postgresql.conf over the defaults, which are wal_level=logical, 50 slots
    and walsenders, and no fsync. The attribute ``settings`` may be changed: it holds from the next
    start on. Where the server knows ``output_plugin_libraries``, wal2json is put into it. Settings
    made by ALTER SYSTEM go before all of these, as on any server.

    It listens on a socket in its folder, and with ``loopback`` on a free port of 127.0.0.1 too,
    where it asks for ``password``. ``template`` is the ``data`` folder of a stopped cluster of the
    same server version; ``encoding`` and ``locale`` are then those of the template.

    As root the server runs as the user postgres, or nobody, since it refuses to run as root.
    """

    def __init__(
        self,
        settings: Mapping[str, str] | None = None,
        *,
        encoding: str = "UTF8",
        locale: str = "C.UTF-8",
        loopback: bool = False,
        template: Path | None = None,
        programs: ServerPrograms | None = None,
    ) -> None:
        self.settings: dict[str, str] = dict(settings or {})
        self.programs = programs or find_programs()
        self.password = secrets.token_urlsafe(16)
        self._encoding = encoding
        self._locale = locale
        self._template = template
        self._user = _unprivileged_user()
        # The name is chosen here and the folder made in create(), so that there is no moment in
        # which a folder exists that remove() does not know of.
        self.folder = _temporary_parent(self._user) / f"walstream-{secrets.token_hex(6)}"
        self.data = self.folder / "data"
        self.log = self.folder / "server.log"
        self.port = _free_port() if loopback else 5432
        self._loopback = loopback
        self._created = False
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the server; a cluster that does not start is removed."""
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave nothing behind."""
        self.remove()

    def create(self) -> None:
        """Make the folder and the data in it, without starting the server; once only.

        Raises:
            ClusterFailed: initdb or the copy of the template failed.
        """
        if self._created:
            return
        try:
            self._watcher = _start_watcher(self.folder)
            self.folder.mkdir(mode=0o700)
            self._give_away(self.folder)
            self._make_data()
            self._write("pg_hba.conf", _HBA)
            self._append("postgresql.conf", "include 'walstream.conf'\n")
            self._write("walstream.conf", "")
        except BaseException:
            self.remove()
            raise
        self._created = True

    def start(self, timeout_seconds: float = 60.0) -> None:
        """Start the server and wait until it takes connections.

        Raises:
            ClusterFailed: it ended, or was not ready in time; the message has the end of its log.
        """
        if self.running:
            return
        self.create()
        self._write("walstream.conf", _as_configuration(self._effective_settings()))
        try:
            self._process = self._spawn_server()
            self._wait_until_ready(timeout_seconds)
            if self._loopback:
                self._set_password()
        except BaseException:
            self.kill()
            raise

    def stop(self, mode: StopMode = "fast", timeout_seconds: float = 60.0) -> None:
        """Stop the server as ``pg_ctl stop -m`` does, and wait until it is gone.

        Raises:
            ClusterFailed: it still runs when the time is over.
        """
        if self._process is None:
            return
        # send_signal() looks first whether the process is still there to take it.
        self._process.send_signal(_SIGNALS[mode])
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise ClusterFailed(
                f"the private cluster did not stop ({mode}) in {timeout_seconds:g} seconds\n"
                f"{self.log_tail()}"
            ) from None
        self._process = None
        self._clear_lock_file()

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start, with the settings as they are now."""
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """End every server process at once, as a power cut would: no checkpoint, no farewell.

        The next start replays the WAL.
        """
        if self._process is None:
            return
        # Stopped, it starts no backend that would not be in the list of its children.
        self._process.send_signal(signal.SIGSTOP)
        backends = _children(self._process.pid)
        self._process.kill()
        for pid in backends:
            _kill(pid)
        self._process.wait()
        self._process = None
        _wait_until_gone(backends)
        self._clear_lock_file()

    def remove(self) -> None:
        """Stop the server, whatever it is doing, and remove all that there is of it."""
        try:
            with contextlib.suppress(ClusterFailed):
                self.stop("immediate", timeout_seconds=10.0)
        finally:
            self.kill()
            self._dismiss_watcher()
            self._created = False

    @property
    def running(self) -> bool:
        """Whether the server process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the server (the postmaster).

        Raises:
            ClusterFailed: it does not run.
        """
        if self._process is None or self._process.poll() is not None:
            raise ClusterFailed("the private cluster is not running")
        return self._process.pid

    @property
    def knows_output_plugin_libraries(self) -> bool:
        """Whether this server has the setting of CVE-2026-6471's fix; asked of a stopped cluster.

        A server that does not know the setting does not start with it in its configuration.
        """
        self.create()
        asked = self._run_unchecked(
            self.programs.path("postgres"), "-C", "output_plugin_libraries", "-D", self.data
        )
        return asked.returncode == 0

    def conninfo(
        self, dbname: str = "postgres", user: str = SUPERUSER, **parameters: str | int
    ) -> str:
        """A libpq connection string that reaches a database through the socket."""
        target: dict[str, str | int] = {"host": str(self.folder), "port": self.port}
        return make_conninfo("", **{**target, "dbname": dbname, "user": user, **parameters})

    def loopback_conninfo(
        self, dbname: str = "postgres", user: str = SUPERUSER, **parameters: str | int
    ) -> str:
        """A libpq connection string that reaches a database over TCP; needs ``loopback``.

        It holds the superuser's password; other users' passwords are the caller's ``parameters``.
        """
        target: dict[str, str | int] = {"host": "127.0.0.1"}
        if user == SUPERUSER:
            target["password"] = self.password
        return self.conninfo(dbname, user, **{**target, **parameters})

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of the server's log; empty when there is none."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def _make_data(self) -> None:
        if self._template is not None:
            self._run("cp", "-a", self._template, self.data)
            return
        self._run(
            self.programs.path("initdb"),
            f"--pgdata={self.data}",
            f"--username={SUPERUSER}",
            f"--encoding={self._encoding}",
            f"--locale={self._locale}",
            "--auth=trust",
            "--no-sync",
            "--no-instructions",
        )

    def _effective_settings(self) -> dict[str, str]:
        settings = {
            **_SETTINGS,
            "listen_addresses": "127.0.0.1" if self._loopback else "",
            "port": str(self.port),
            "unix_socket_directories": str(self.folder),
        }
        if "output_plugin_libraries" not in self.settings and self.knows_output_plugin_libraries:
            settings["output_plugin_libraries"] = "pgoutput, test_decoding, wal2json"
        return {**settings, **self.settings}

    def _spawn_server(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [self.programs.path("postgres"), "-D", str(self.data)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=_environment(),
                # A Ctrl-C in the terminal is for us: we stop the server when we are done with it.
                start_new_session=True,
                **self._identity(),
            )

    def _wait_until_ready(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not self._is_ready():
            if not self.running:
                raise ClusterFailed(f"the private cluster did not start\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ClusterFailed(
                    f"the private cluster was not ready in {timeout_seconds:g} seconds\n"
                    f"{self.log_tail()}"
                )
            time.sleep(0.01)

    def _is_ready(self) -> bool:
        # Line 1 is the server's process id (an earlier one may have left its file), line 8 its
        # state, which pg_ctl waits for too (miscadmin.h).
        lines = _lines(self.data / "postmaster.pid")
        return (
            len(lines) >= 8  # noqa: PLR2004 - the line number of the state, as said above
            and lines[0] == str(self.pid)
            and lines[7].strip() == "ready"
        )

    def _set_password(self) -> None:
        alter = sql.SQL("ALTER ROLE {} PASSWORD {}").format(
            sql.Identifier(SUPERUSER), sql.Literal(self.password)
        )
        with psycopg.connect(self.conninfo(), autocommit=True) as connection:
            connection.execute(alter)

    def _clear_lock_file(self) -> None:
        """Forget a server that is gone: its process id may soon be that of another process."""
        lock_file = self.data / "postmaster.pid"
        lines = _lines(lock_file)
        if len(lines) >= 7 and lines[6].strip():  # noqa: PLR2004 - the line of the shared memory
            # As its owner: root in a container may not. Without the program it is left to the next
            # server that starts in this folder, or to the end of the machine: some fifty bytes.
            with contextlib.suppress(FileNotFoundError):
                self._run_unchecked("ipcrm", "-m", lines[6].split()[1])
        lock_file.unlink(missing_ok=True)

    def _dismiss_watcher(self) -> None:
        """Let it do its work: remove the folder, and a server that we lost sight of."""
        if self._watcher is None:
            return
        if self._watcher.stdin is not None:
            self._watcher.stdin.close()
        self._watcher.wait()
        self._watcher = None

    def _write(self, name: str, text: str) -> None:
        path = self.data / name
        path.write_text(text, encoding="utf-8")
        self._give_away(path)

    def _append(self, name: str, text: str) -> None:
        with (self.data / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def _give_away(self, path: Path) -> None:
        if self._user is not None:
            os.chown(path, self._user.pw_uid, self._user.pw_gid)

    def _identity(self) -> _Identity:
        if self._user is None:
            return {}
        return {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}

    def _run(self, *command: str | Path) -> None:
        done = self._run_unchecked(*command)
        if done.returncode != 0:
            raise ClusterFailed(f"{Path(command[0]).name} failed\n{done.stderr.strip()}")

    def _run_unchecked(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            cwd=self.folder,
            env=_environment(),
            start_new_session=True,
            **self._identity(),
        )


def _installed_folders() -> Iterator[Path]:
    """Where server programs may be, the likeliest first."""
    pg_config = shutil.which("pg_config")
    if pg_config is not None:
        with contextlib.suppress(subprocess.CalledProcessError):
            yield Path(_output_of(pg_config, "--bindir"))
    postgres = shutil.which("postgres")
    if postgres is not None:
        yield Path(postgres).resolve().parent
    # Debian keeps every version in a folder of its own, none of them in the PATH.
    yield from Path("/usr/lib/postgresql").glob("*/bin")


def _has_server(folder: Path) -> bool:
    return all(os.access(folder / program, os.X_OK) for program in ("initdb", "postgres"))


def _has_wal2json(folder: Path) -> bool:
    pg_config = folder / "pg_config"
    library = (
        Path(_output_of(str(pg_config), "--pkglibdir"))
        if pg_config.exists()
        else folder.parent / "lib"
    )
    return (library / "wal2json.so").exists() or (library / "wal2json.dylib").exists()


def _programs_in(folder: Path) -> ServerPrograms:
    # It prints: postgres (PostgreSQL) 15.20 (Debian 15.20-0+deb12u1), or 19devel.
    printed = _output_of(str(folder / "postgres"), "--version")
    numbers = re.search(r"\) (\d+)(?:\.(\d+))?", printed)
    if numbers is None:
        raise ClusterFailed(f"{folder / 'postgres'} says {printed!r} where its version should be")
    return ServerPrograms(folder, (int(numbers[1]), int(numbers[2] or 0)))


def _output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def _install_command(*packages: str) -> str:
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}apt-get install {' '.join(packages)}"


def _packaged_major() -> int:
    """The newest version of which Debian's or Ubuntu's package lists have server and wal2json."""
    apt_cache = shutil.which("apt-cache")
    if apt_cache is None:
        return _USUAL_MAJOR
    listed = _output_of(apt_cache, "pkgnames", "postgresql-").split()
    plugins = [re.fullmatch(r"postgresql-(\d+)-wal2json", name) for name in listed]
    majors = [int(found[1]) for found in plugins if found and f"postgresql-{found[1]}" in listed]
    return max(majors, default=_USUAL_MAJOR)


def _unprivileged_user() -> pwd.struct_passwd | None:
    """Whom the server runs as in our place: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _temporary_parent(user: pwd.struct_passwd | None) -> Path:
    """Where the folder goes: short enough for a socket, and open to the user of the server."""
    usual = Path(tempfile.gettempdir()).resolve()
    socket_name = "/walstream-0123456789ab/.s.PGSQL.65535"
    fits = len(os.fsencode(usual)) + len(socket_name) <= _SOCKET_PATH_BYTES
    if fits and (user is None or _open_to_all(usual)):
        return usual
    return Path("/tmp")  # noqa: S108 - the folder made in it is private and has a random name


def _open_to_all(folder: Path) -> bool:
    return all(path.stat().st_mode & stat.S_IXOTH for path in (folder, *folder.parents))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _start_watcher(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["/bin/sh", "-c", _WATCHER, "walstream-watcher", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def _environment() -> dict[str, str]:
    """Ours, without what libpq and the server would read from it, and with English messages."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {**inherited, "LC_ALL": "C"}


def _as_configuration(settings: Mapping[str, str]) -> str:
    return "".join(f"{name} = {_quoted(value)}\n" for name, value in settings.items())


def _quoted(value: str) -> str:
    # guc-file.l: a backslash escapes, a quote is doubled.
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []


def _children(pid: int) -> list[int]:
    """The processes started by another; none where the system has no /proc."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for line in _lines(listed) for child in line.split()]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _wait_until_gone(pids: Sequence[int], timeout_seconds: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while any(map(_is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    # proc(5): the state stands behind the program's name in parentheses. A zombie holds nothing.
    status = _lines(Path(f"/proc/{pid}/stat"))
    return bool(status) and status[0].rpartition(")")[2].split()[0] != "Z"
