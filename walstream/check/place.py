"""The place where walstream runs: its state file, its sinks' files, its extra packages.

Looked at as the user who asks. Nothing is opened for writing, nor locked: walstream may be running.
"""

from __future__ import annotations

import getpass
import ipaddress
import os
import shlex
import stat
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Final, assert_never
from urllib.parse import urlsplit

from walstream.check.findings import Finding, Outcome, ok, problem, skipped, warning
from walstream.check.site import Question, Site, answered
from walstream.config import FileSinkConfig, SinkConfig, StdoutSinkConfig, WebhookSinkConfig
from walstream.config.live import LiveSinkConfig
from walstream.connection import SystemIdentity
from walstream.errors import SetupError, SlotMissing
from walstream.files import lock_holders
from walstream.lineage import Lineage, Standing, verify
from walstream.lsn import ZERO, Lsn
from walstream.slots import slot_status
from walstream.state import STATE_DIRECTORY, StateFile, state_path

# ---- The state file


async def _state(site: Site) -> Outcome:
    path = state_path(site.config.state.path, site.slot_name)
    if path is None:
        return warning(
            f"not kept: neither path under [state] nor {STATE_DIRECTORY} is there, and a failover"
            " or restore while walstream does not run goes unnoticed",
            "-- set path under [state], or StateDirectory=walstream in systemd's unit",
        )
    unwritable = unwritable_folder(path)
    if unwritable is not None:
        return unwritable
    last = await StateFile(path, site.slot_name).load()
    if last is None:
        return ok(f"{path}, which the first start makes")
    return ok(f"{path}: {last.flush_lsn} on timeline {last.timeline} was confirmed")


async def _lineage(site: Site) -> Outcome | None:
    """Ask beforehand what a start asks: whether the slot goes on from what was confirmed."""
    path = state_path(site.config.state.path, site.slot_name)
    if path is None:
        return None
    try:
        last = await StateFile(path, site.slot_name).load()
    except SetupError:
        return None  # told of already
    if last is None:
        return None
    if lacking := site.lacks("catalog", "replication"):
        return skipped(lacking)
    identity = await site.replication.identify_system()
    verify(last, await _standing(site, last, identity), site.slot_name)
    return ok("the slot goes on from what was confirmed last")


async def _standing(site: Site, last: Lineage, identity: SystemIdentity) -> Standing:
    others_stream = site.config.slot.shared
    try:
        status = await slot_status(site.catalog, site.slot_name)
    except SlotMissing:
        slot_lsn = None
    else:
        slot_lsn = status.confirmed_flush_lsn or ZERO
        others_stream = others_stream or status.active  # perhaps walstream itself
    history: tuple[tuple[int, Lsn], ...] = ()
    if identity.timeline not in {1, last.timeline}:
        history = await site.replication.timeline_history(identity.timeline)
    return Standing(
        systemid=identity.systemid,
        timeline=identity.timeline,
        flush_lsn=identity.flush_lsn,
        slot_lsn=slot_lsn,
        in_recovery=site.links["replication"].in_recovery,
        others_stream=others_stream,
        history=history,
    )


# ---- Files


def unwritable_folder(path: Path) -> Outcome | None:
    """Say what keeps a file from being written, and its folder from taking new ones."""
    path = path.absolute()
    folder = path.parent
    try:
        path.stat()
    except PermissionError:
        return _closed(path)
    except OSError:
        pass  # what is not there is told below
    if not folder.exists():
        return problem(
            f"the folder {folder} is not there", f"$ mkdir -p {shlex.quote(str(folder))}"
        )
    if not folder.is_dir():
        return problem(f"{folder} is not a folder", "-- name another path")
    for place, what in ((folder, "folder"), (path, "file")):
        if place.exists() and not os.access(place, os.W_OK | (os.X_OK if what == "folder" else 0)):
            return problem(f"{_who()} may not write to the {what} {place}", _let_write(place))
    return None


def _closed(path: Path) -> Outcome:
    """Name the first folder on the way that may not be entered: nobody sees what is behind it."""
    way = reversed(path.parents)
    closed = next((one for one in way if not os.access(one, os.X_OK)), path.parent)
    mend = f"-- let {_who()} enter {closed}, or name another path"
    if closed.stat().st_uid == os.geteuid():
        mend = f"$ chmod u+rwx {shlex.quote(str(closed))}"
    return problem(f"{_who()} may not enter the folder {closed}", mend)


def _let_write(path: Path) -> str:
    if path.stat().st_uid == os.geteuid():
        rights = "u+rwx" if path.is_dir() else "u+rw"
        return f"$ chmod {rights} {shlex.quote(str(path))}"
    return f"-- let {_who()} write to {path}, or run walstream as its owner"


def _who() -> str:
    """Name the user; in a container it may be a number that nobody has given a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # from Python 3.13 on the latter
        return f"the user {os.geteuid()}"


# ---- Sinks


async def check_sinks(site: Site) -> list[Finding]:
    """Look at each sink of the configuration, without calling anybody."""
    return [
        Finding.of("sinks", name, outcome)
        for name, sink in site.config.sinks.items()
        if (outcome := await answered(site, _sink(site, name, sink))) is not None
    ]


async def _sink(site: Site, name: str, sink: SinkConfig) -> Outcome:
    outcome = await _judge_sink(site, name, sink)
    if all(route.to != name for route in site.config.routes):
        return warning(
            "no route leads to it", f"-- name it in a [[routes]], or remove [sinks.{name}]"
        )
    return outcome


async def _judge_sink(site: Site, name: str, sink: SinkConfig) -> Outcome:
    match sink:
        case StdoutSinkConfig():
            return ok("the standard output")
        case FileSinkConfig():
            return await _file(site, sink)
        case WebhookSinkConfig():
            return _webhook(name, sink)
        case LiveSinkConfig():
            return _live(site)
        case _:
            assert_never(sink)


def _live(site: Site) -> Outcome:
    if site.config.http.listen is None:
        return warning(
            "clients by HTTP, and nothing listens for them", "-- write listen under [http]"
        )
    if not site.config.access.roles:
        return warning(
            "clients by HTTP, and nobody may read anything", "-- write roles into [access]"
        )
    return ok(f"clients by HTTP at {site.config.http.listen}")


async def _file(site: Site, sink: FileSinkConfig) -> Outcome:
    path = sink.path.absolute()
    same = Counter(
        one.path.absolute() for one in site.config.sinks.values() if isinstance(one, FileSinkConfig)
    )
    if same[path] > 1:
        return problem(f"{path} is another sink's, too", "-- give each sink a file of its own")
    unwritable = unwritable_folder(path)
    if unwritable is not None:
        return unwritable
    if not path.exists():
        return ok(f"{path}, which the first start makes")
    if not stat.S_ISREG(path.stat().st_mode):
        return problem(f"{path} is not a regular file", "-- name another path")
    return await _locked(site, path)


async def _locked(site: Site, path: Path) -> Outcome:
    """Look who writes to a file; when somebody streams, it is taken for the same process."""
    holder = next(lock_holders(path), None)
    if holder is None:
        return ok(str(path))
    is_known = not site.lacks("catalog", "slot")
    if is_known and not (await slot_status(site.catalog, site.slot_name)).active:
        return problem(
            f"PID {holder} has locked {path}, and nobody streams from the slot",
            f"-- end PID {holder}, or give each process a file of its own",
        )
    return ok(f"{path}, which PID {holder} writes to now")


def _webhook(name: str, sink: WebhookSinkConfig) -> Outcome:
    """Look at the configuration; the receiver is not called."""
    if sink.ca_file is not None and not os.access(sink.ca_file, os.R_OK):
        return problem(
            f"ca_file {sink.ca_file} cannot be read", f"-- see to it, under [sinks.{name}]"
        )
    url = urlsplit(sink.url.get_secret_value())
    shown = f"{url.scheme}://{url.hostname}"
    if url.scheme == "http" and not is_local(url.hostname or ""):
        return warning(
            f"{shown}: rows cross the network unencrypted",
            f"-- use https in url under [sinks.{name}]",
        )
    if not sink.verify:
        return warning(
            f"{shown}: whoever answers there is believed (verify = false)",
            f"-- remove verify under [sinks.{name}]; ca_file names an authority of one's own",
        )
    if not sink.signing_keys(name) and not sink.headers:
        return warning(
            f"{shown}: nothing tells the receiver that a request is walstream's",
            f"-- set secret under [sinks.{name}]: echo whsec_$(openssl rand -base64 32)",
        )
    return ok(f"{shown}, which is not called now")


def is_local(host: str) -> bool:
    """Whether a host, by name or address, is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# ---- Packages

_EXTRAS: Final = {
    "http": ("starlette", "uvicorn", "prometheus_client", "jwt"),
    "tracing": ("opentelemetry.sdk",),
    "webhook": ("httpx",),
}


async def _extras(site: Site) -> Outcome | None:
    """Look whether what is configured is installed."""
    wanted = {
        "http": site.config.http.listen is not None,
        "tracing": site.config.tracing.enabled,
        "webhook": any(sink.type == "webhook" for sink in site.config.sinks.values()),
    }
    extras = [extra for extra, is_wanted in wanted.items() if is_wanted]
    missing = [extra for extra in extras if not all(map(_is_there, _EXTRAS[extra]))]
    if missing:
        return problem(
            f"what the configuration asks for is not installed: {', '.join(missing)}",
            f'$ pip install "walstream[{",".join(missing)}]"',
        )
    return ok(f"{', '.join(extras)}: installed") if extras else None


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False


QUESTIONS: Final = (
    Question("here", "state", _state),
    Question("here", "lineage", _lineage),
    Question("here", "extras", _extras),
)
