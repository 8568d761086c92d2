"""What a new file needs to be there after a crash of the machine; who has locked one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_LOCKS: Final = Path("/proc/locks")
"""All locks of all files; Linux has it."""


def sync_directory(directory: Path) -> None:
    """Make the names of new files durable too."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_holders(path: Path) -> Iterator[int]:
    """Give the processes that hold a lock on a file; trying to lock it could hinder them.

    None are known where the system does not tell them.
    """
    status = path.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        locks = _LOCKS.read_text(encoding="ascii")
    except OSError:  # not Linux, or hidden
        return
    for line in locks.splitlines():
        fields = line.split()
        if "->" not in fields and device in fields:
            yield int(fields[4])
