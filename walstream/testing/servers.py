"""Servers for tests: private clusters that are copies of one that never runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from walstream.cluster import PrivateCluster, ServerPrograms


class StartCluster(Protocol):
    """Makes and starts a private cluster that is removed when its fixture ends."""

    def __call__(
        self,
        settings: Mapping[str, str] | None = None,
        *,
        encoding: str | None = None,
        locale: str = "C",
        loopback: bool = False,
    ) -> PrivateCluster:
        """Start it with settings; with an ``encoding`` of its own it goes through initdb."""


@contextmanager
def cluster_template(programs: ServerPrograms) -> Iterator[Path]:
    """Make the data folder of a cluster that never runs: a copy is quicker to have than initdb."""
    template = PrivateCluster(programs=programs)
    try:
        template.create()
        yield template.data
    finally:
        template.remove()


@contextmanager
def cluster_factory(programs: ServerPrograms, template: Path) -> Iterator[StartCluster]:
    """Start clusters with settings of their own, and remove them all at the end."""
    with ExitStack() as clusters:

        def start(
            settings: Mapping[str, str] | None = None,
            *,
            encoding: str | None = None,
            locale: str = "C",
            loopback: bool = False,
        ) -> PrivateCluster:
            cluster = (
                PrivateCluster(settings, loopback=loopback, template=template, programs=programs)
                if encoding is None
                else PrivateCluster(
                    settings,
                    encoding=encoding,
                    locale=locale,
                    loopback=loopback,
                    programs=programs,
                )
            )
            return clusters.enter_context(cluster)

        yield start
