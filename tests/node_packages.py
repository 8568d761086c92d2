"""A folder with the npm packages of tests/node/package.json, kept for the next run."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

NODE: Final = Path(__file__).parent / "node"


def node_packages(folder: Path) -> Path:
    """Install what the lock file says into a folder, with the scripts beside it.

    Without node or npm the test is skipped, but under CI it fails. Several processes may come at
    once: one installs.
    """
    if shutil.which("node") is None or shutil.which("npm") is None:
        skip("needs node and npm")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for script in NODE.glob("*.mjs"):
            shutil.copy(script, folder)
        if not _is_installed(folder):
            _install(folder)
    return folder


def skip(reason: str) -> None:
    """Skip the test; under CI it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def _is_installed(folder: Path) -> bool:
    """Whether the hidden lock file, which npm writes last, has what ours has.

    Of programs for other machines, which are optional, it has none.
    """
    installed = folder / "node_modules" / ".package-lock.json"
    return installed.exists() and _versions(installed) == _versions(NODE / "package-lock.json")


def _versions(lock: Path) -> dict[str, str]:
    packages = json.loads(lock.read_text())["packages"]
    return {
        name: one["integrity"] for name, one in packages.items() if name and not one.get("optional")
    }


def _install(folder: Path) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(NODE / name, folder)
    done = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],  # noqa: S607
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if done.returncode:
        skip("npm cannot install the packages of tests/node/package.json")
