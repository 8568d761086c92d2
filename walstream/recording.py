"""Recordings: the records of a stream, with all that is needed to route them again anywhere.

A recording is a file of JSON lines. The first says what it is; types and the shapes of relations
come before the first record that needs them, records as wal2json wrote them. It ends with a whole
transaction, unless the process that wrote it was killed: then the rest is not read.

A recording holds rows as they are, unmasked: whoever may read it may read the tables.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self, TypeAlias

import msgspec

from walstream.binding import Binding
from walstream.catalog import Catalog
from walstream.changes import Begin, Change, Commit, Layout, Message, Relation
from walstream.decoder import Decoder, UnknownLayout
from walstream.errors import SinkFailed, UsageError
from walstream.filters import Literal
from walstream.offline import read_offline
from walstream.preflight import checked_literals
from walstream.router import MessageRoute, Route, Router
from walstream.values import Kind, PgType

VERSION: Final = 1
"""Of the form of recordings. A reader refuses one that it does not know."""

Routed: TypeAlias = (
    tuple[Change, list[tuple[Route, Change]]] | tuple[Message, list[tuple[MessageRoute, Message]]]
)
"""A change or a message, and where it goes."""


class _Header(msgspec.Struct, frozen=True, tag_field="line", tag="recording"):
    version: int


class _Types(msgspec.Struct, frozen=True, tag_field="line", tag="types"):
    types: list[PgType]


class _Layout(msgspec.Struct, frozen=True, tag_field="line", tag="layout", omit_defaults=True):
    """A `Layout` without its types, which are the recording's."""

    relation: Relation
    names: list[str]
    typeoids: list[int]
    key: list[str]
    columns: dict[str, int]
    ancestors: tuple[Relation, ...] = ()
    missing: tuple[str, ...] = ()
    toastable: tuple[str, ...] = ()
    is_full: bool = False
    in_catalog: bool = True


class _Record(msgspec.Struct, frozen=True, tag_field="line", tag="record"):
    record: msgspec.Raw


class _Action(msgspec.Struct, frozen=True):
    action: str


_Line: TypeAlias = _Header | _Types | _Layout | _Record

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(_Line).decode
_action_of: Final = msgspec.json.Decoder(_Action).decode


class Recorder:
    """Writes a recording, to a file that nobody else may read."""

    def __init__(
        self,
        path: Path,
        *,
        limit: int | None = None,
        on_full: Callable[[], object] = lambda: None,
    ) -> None:
        """Make the file.

        Args:
            path: where there is no file yet.
            limit: nothing is written after the transaction in which there were so many changes.
            on_full: called once, when that is reached.

        Raises:
            UsageError: there is a file already, or it cannot be made.
        """
        self._path = path
        self._file = _made(path)
        self._limit = limit
        self.on_full = on_full
        self._position = 0
        self._boundary = 0
        self._inside = False
        self._pending = 0
        self._written: dict[int, PgType] = {}
        self.changes = 0
        self._write(_Header(VERSION))
        self._boundary = self._position

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; when nothing came but an error, nothing is left behind."""
        self.close()
        if exception is not None and not self.changes:
            self._path.unlink()

    @property
    def is_full(self) -> bool:
        """Whether there are as many changes as were wished for."""
        return self._limit is not None and self.changes >= self._limit

    def record(
        self, record: bytes | memoryview, decoded: Begin | Change | Commit | Message
    ) -> None:
        """Write a record.

        Args:
            record: in UTF-8.
            decoded: what it says; of a change the layout has been written.

        Raises:
            SinkFailed: it cannot be written.
        """
        if self.is_full:
            return
        if type(decoded) is Begin:
            self._drop_unfinished()
            self._inside = True
        self._write(_Record(msgspec.Raw(bytes(record))))
        self._pending += type(decoded) is Change
        if type(decoded) is Commit or not self._inside:
            self._end_transaction()

    def layout(self, layout: Layout) -> None:
        """Write the shape of the records that follow, and the types that it needs.

        Raises:
            SinkFailed: it cannot be written.
        """
        if self.is_full:
            return
        types = layout.types
        known = [pg_type for oid in types.learned() if (pg_type := types.get(oid)) is not None]
        new = [pg_type for pg_type in known if self._written.get(pg_type.oid) != pg_type]
        if new:
            self._written |= {pg_type.oid: pg_type for pg_type in new}
            self._write(_Types(sorted(new, key=_builds_on_less)))
        fields = {name: getattr(layout, name) for name in _Layout.__struct_fields__}
        self._write(_Layout(**fields))

    def close(self) -> None:
        """End the file with the last whole transaction.

        Raises:
            SinkFailed: it cannot be written.
        """
        if self._file.closed:
            return
        try:
            try:
                self._drop_unfinished()
            finally:
                self._file.close()
        except OSError as error:
            raise self._failed(error) from None

    def _end_transaction(self) -> None:
        self._inside = False
        self._boundary = self._position
        self.changes += self._pending
        self._pending = 0
        if self.is_full:
            self.on_full()

    def _drop_unfinished(self) -> None:
        """Cut off a transaction whose end has not come, and what was learned for it."""
        self._inside = False
        self._pending = 0
        if self._position == self._boundary:
            return
        try:
            self._file.seek(self._boundary)
            self._file.truncate()
        except OSError as error:  # what was held back is written first
            raise self._failed(error) from None
        self._position = self._boundary
        self._written.clear()

    def _write(self, line: _Line) -> None:
        encoded = _encode(line) + b"\n"
        try:
            self._file.write(encoded)
        except OSError as error:
            raise self._failed(error) from None
        self._position += len(encoded)

    def _failed(self, error: OSError) -> SinkFailed:
        return SinkFailed(
            f"the recording {self._path} cannot be written: {error.strerror}",
            hint="see to its disk, or name a file on another one; what was written up to the last"
            " whole transaction can be read",
        )


class RecordingBinding(Binding):
    """A binding that records what it routes.

    Changes of tables that no route wants are left out. What filters drop is there.
    """

    def __init__(  # noqa: D417 - the others are those of a binding
        self,
        catalog: Catalog,
        decoder: Decoder,
        router: Router,
        *,
        follow_partitions: bool,
        recorder: Recorder,
    ) -> None:
        """Start with nothing known.

        Args:
            recorder: takes the recording.
        """
        super().__init__(catalog, decoder, router, follow_partitions=follow_partitions)
        self._encoding = decoder.encoding
        self._recorder = recorder
        self._undecided: bytes | memoryview = b""

    def decode(self, record: memoryview | bytes) -> Begin | Change | Commit | Message | None:
        """Decode a record; all but changes are recorded."""
        decoded = super().decode(record)
        if decoded is not None:
            self._decoded(record, decoded)
        return decoded

    async def learn(self, record: memoryview | bytes) -> Begin | Change | Commit | Message:
        """Look up the relation of a record."""
        decoded = await super().learn(record)
        self._decoded(record, decoded)
        return decoded

    def route(self, change: Change) -> list[tuple[Route, Change]] | None:
        """Route the change that was decoded last; it is recorded."""
        routed = super().route(change)
        if routed is not None:
            self._keep(change)
        return routed

    async def route_anew(self, change: Change) -> list[tuple[Route, Change]]:
        """Route the change that was decoded last, after asking the catalog; it is recorded."""
        routed = await super().route_anew(change)
        self._keep(change)
        return routed

    async def _layout(self, question: UnknownLayout) -> Layout:
        layout = await super()._layout(question)
        self._recorder.layout(layout)
        return layout

    def _decoded(
        self, record: memoryview | bytes, decoded: Begin | Change | Commit | Message
    ) -> None:
        if type(decoded) is Change:
            self._undecided = record  # until it is routed, its layout can become another
        else:
            self._recorder.record(self._in_utf8(record), decoded)

    def _keep(self, change: Change) -> None:
        if self._router.wanting(change.layout):
            self._recorder.record(self._in_utf8(self._undecided), change)

    def _in_utf8(self, record: memoryview | bytes) -> bytes:
        if self._encoding is None:
            return bytes(record)
        return bytes(record).decode(self._encoding).encode()


class Recording:
    """A recording that was made before."""

    def __init__(self, path: Path) -> None:
        """Look through the whole file.

        Raises:
            UsageError: it cannot be read, or is no recording.
        """
        self.path = path
        self._whole_bytes = 0
        self.types: list[PgType] = []
        self.newest: dict[Relation, _Layout] = {}
        self._look_through()

    def lines(self) -> Iterator[_Layout | _Record]:
        """Iterate over shapes and records, up to the end of the last whole transaction."""
        with self.path.open("rb") as file:
            position = 0
            for line in file:
                position += len(line)
                if position > self._whole_bytes:
                    return
                decoded = _decode(line)
                if isinstance(decoded, _Layout | _Record):
                    yield decoded

    def _look_through(self) -> None:
        try:
            with self.path.open("rb") as file:
                self._whole_bytes = self._whole(file)
        except OSError as error:
            message = f"{self.path} cannot be read: {error.strerror}"
            raise UsageError(message) from None

    def _whole(self, file: BinaryIO) -> int:
        """Note what there is; return where the last whole transaction ends."""
        types: dict[int, PgType] = {}
        inside, position, whole = False, 0, 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            position += len(line)
            decoded = self._decoded(line, number)
            if isinstance(decoded, _Types):
                types |= {pg_type.oid: pg_type for pg_type in decoded.types}
            elif isinstance(decoded, _Layout):
                self.newest[decoded.relation] = decoded
            elif isinstance(decoded, _Record):
                action = _action_of(decoded.record).action
                inside = (inside or action == "B") and action != "C"
            whole = whole if inside else position
        if not whole:
            raise self._refused(1)
        self.types = sorted(types.values(), key=_builds_on_less)
        return whole

    def _decoded(self, line: bytes, number: int) -> _Line:
        try:
            decoded: _Line = _decode(line)
            if isinstance(decoded, _Record):
                _action_of(decoded.record)
        except (msgspec.DecodeError, UnicodeError):
            raise self._refused(number) from None
        if (number == 1) is not isinstance(decoded, _Header):
            raise self._refused(number)
        if isinstance(decoded, _Header) and decoded.version != VERSION:
            message = f"{self.path} is a recording of version {decoded.version}, not of {VERSION}"
            raise UsageError(message, hint="record again with this version of walstream")
        return decoded

    def _refused(self, number: int) -> UsageError:
        return UsageError(
            f"{self.path}, line {number}: not what a recording holds",
            hint="recordings are made by walstream tail --record FILE",
        )


class RecordedCatalog(Catalog):
    """Answers what routing asks of a catalog from a recording."""

    def __init__(self, types: Iterable[PgType], dsn: str | None = None) -> None:
        """Learn the recording's types.

        Args:
            types: those that others are built on first.
            dsn: a server that reads the values of filters; None to read them here.
        """
        super().__init__(dsn or "", application_name="walstream test")
        self._has_server = dsn is not None
        self._recorded: dict[Any, _Layout] = {}
        learned = list(types)
        self._loaders.register(learned)
        for pg_type in learned:
            self.types.add(pg_type)

    def learn(self, layout: _Layout) -> bool:
        """Take the next shape; return whether one of its names and types was there before."""
        identifying = _identifying(layout)
        was_known = identifying in self._recorded
        self._recorded[identifying] = layout
        return was_known

    async def layout(self, question: UnknownLayout) -> Layout:
        """Return the shape as it was recorded.

        Raises:
            UsageError: the recording does not have it.
        """
        recorded = self._recorded.get(_identifying(question))
        if recorded is None:
            message = f"the recording has a record of {question.relation} before its shape"
            raise UsageError(message, hint="record again; a recording cannot be put together")
        return Layout(types=self.types, **msgspec.structs.asdict(recorded))

    async def wait_until_visible(self, xid: int) -> None:
        """There is nothing to wait for."""

    async def renew_types(self) -> None:
        """The recording has no newer ones."""

    async def normalise(
        self, literals: Sequence[Literal], *, remember: bool = True
    ) -> dict[Literal, str]:
        """Read a filter's values, without a server if there is none.

        Raises:
            UsageError: only a server can read one of them.
            FilterError: the server says that it is not of its column's type.
        """
        if self._has_server:
            return await super().normalise(literals, remember=remember)
        return {literal: self._read(literal) for literal in literals}

    def _read(self, literal: Literal) -> str:
        text = read_offline(literal, self.types)
        if text is None:
            raise UsageError(
                f"only a server can read {literal.text!r}, the value of a filter, as"
                f" {literal.type_name}, the type of column {literal.column!r}",
                hint="give --dsn: a server with that type is asked, and nothing is written there",
            )
        return text


async def replay(
    recording: Recording, router: Router, *, dsn: str | None = None
) -> AsyncGenerator[Routed, None]:
    """Route what was recorded, in its order.

    Args:
        recording: as it was read.
        router: with the routes to try.
        dsn: a server that reads the values of filters; None to read them here.

    Raises:
        UsageError: only a server can read a value, or the recording is not whole.
        FilterError, RelationMissing: a route does not fit its table.
        DecodeError: a record is not one of wal2json's.
    """
    catalog = RecordedCatalog(recording.types, dsn)
    decoder = Decoder()
    binding = Binding(catalog, decoder, router, follow_partitions=False)
    try:
        await _verify(recording, router, catalog)
        for line in recording.lines():
            if isinstance(line, _Record):
                item = await decode_record(binding, bytes(line.record))
                if item is not None:
                    yield await find_routes(binding, router, item)
            elif catalog.learn(line):
                decoder.forget()
                router.unbind()
    finally:
        await catalog.close()


async def decode_record(binding: Binding, record: bytes) -> Change | Message | None:
    """Decode a record; None for what begins and ends transactions.

    Raises:
        WalstreamError: as the binding's methods.
    """
    decoded = binding.decode(record)
    if decoded is None:
        decoded = await binding.learn(record)
    return decoded if isinstance(decoded, Change | Message) else None


async def find_routes(binding: Binding, router: Router, item: Change | Message) -> Routed:
    """Find the routes of what was decoded last.

    Raises:
        WalstreamError: as the binding's methods.
    """
    if isinstance(item, Message):
        return item, router.route_message(item)
    routed = binding.route(item)
    return item, await binding.route_anew(item) if routed is None else routed


async def _verify(recording: Recording, router: Router, catalog: RecordedCatalog) -> None:
    """Check the routes that name one table against the newest shape of it."""
    for route in router.routes:
        relation = route.pattern.relation
        layout = recording.newest.get(relation) if relation is not None else None
        if layout is not None:
            found = checked_literals(route, layout.columns, catalog.types, layout.relation)
            await catalog.normalise(found)


def _identifying(one: _Layout | UnknownLayout) -> Any:
    return one.relation, tuple(one.names), tuple(one.typeoids), tuple(one.key)


def _builds_on_less(pg_type: PgType) -> tuple[bool, int]:
    """Domains last: they take over the loader of what they are over."""
    return pg_type.kind is Kind.DOMAIN, pg_type.oid


def _made(path: Path) -> BinaryIO:
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
    except FileExistsError:
        message = f"{path} is there already"
        raise UsageError(message, hint="remove it, or name another file") from None
    except OSError as error:
        message = f"{path} cannot be made: {error.strerror}"
        raise UsageError(message) from None
