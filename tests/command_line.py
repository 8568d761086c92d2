"""walstream as a process: started in a folder of its own, its log read back."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.postgres import wait_until


class CommandLine:
    """Runs walstream in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("WALSTREAM_")},
            "PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(folder)]),
            "COLUMNS": "200",
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "walstream", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        with (
            (self.folder / "log").open("w") as log,
            subprocess.Popen(
                [sys.executable, "-m", "walstream", *arguments],
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def log(self) -> list[dict[str, object]]:
        lines = (self.folder / "log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def wait_for(self, event: str, *, times: int = 1) -> dict[str, object]:
        """Wait until an event was logged so often, and return the last one."""
        found = wait_until(
            lambda: [line for line in self.log() if line["event"] == event][times - 1 :], 20
        )
        return found[-1]


def slot_name() -> str:
    return f"cli_{secrets.token_hex(4)}"
