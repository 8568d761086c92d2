"""Changes are written as the clients of Supabase Realtime read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import pytest
from realtime.message import PostgresChangesMessage, ServerMessageAdapter, SystemMessage

from walstream.access import Sight
from walstream.changes import Change, Column, Layout, Operation, Relation, Transaction
from walstream.filters import parse
from walstream.live.encodings import Sighting
from walstream.live.subscriptions import Subscription
from walstream.live.views import Look, View, literals_of
from walstream.lsn import Lsn
from walstream.positions import Position
from walstream.projection import Mask, Projection
from walstream.realtime.encodings import ChannelEncoding
from walstream.realtime.frames import split
from walstream.realtime.messages import Version
from walstream.realtime.records import MAX_CHANGE_BYTES, RealtimeForm
from walstream.router import TablePattern
from walstream.values import Types

TYPES: Final = Types(lambda _: lambda text: text.decode())
COLUMNS: Final = {"id": 23, "body": 25, "raw": 17, "tags": 1009}
RELATION: Final = Relation("public", "notes")
AT: Final = Lsn.parse("0/16274F8")
TRANSACTION: Final = Transaction(7, AT, AT, "2026-08-27 10:00:00.123987+00")

NEW: Final = {"id": "1", "body": '"new"', "raw": '"0102"', "tags": '"{a,b}"'}
OLD: Final = {"id": "1", "body": '"old"', "raw": '"01"', "tags": "null"}
NEW_JSON: Final = {"id": 1, "body": "new", "raw": "0102", "tags": ["a", "b"]}
OLD_JSON: Final = {"id": 1, "body": "old", "raw": "01", "tags": None}
TYPE_NAMES: Final = {"id": "int4", "body": "text", "raw": "bytea", "tags": "_text"}

PLAIN: Final = RealtimeForm(with_position=False)
WITH_POSITION: Final = RealtimeForm(with_position=True)


def layout_of(key: Sequence[str] = ("id",), columns: Mapping[str, int] = COLUMNS) -> Layout:
    return Layout(RELATION, list(columns), [*columns.values()], list(key), TYPES, columns=columns)


LAYOUT: Final = layout_of()


def change_of(
    operation: Operation,
    new: Mapping[str, str] | None = None,
    old: Mapping[str, str] | None = None,
    layout: Layout = LAYOUT,
    **more: Any,
) -> Change:
    sent = columns_of(new, layout)
    return Change(operation, layout, TRANSACTION, 3, sent, columns_of(old, layout), **more)


def columns_of(values: Mapping[str, str] | None, layout: Layout) -> list[Column] | None:
    if values is None:
        return None
    return [
        Column(name, msgspec.Raw(text.encode()), layout.columns[name])
        for name, text in values.items()
    ]


INSERT: Final = change_of(Operation.INSERT, NEW)
UPDATE: Final = change_of(Operation.UPDATE, NEW, OLD)
DELETE: Final = change_of(Operation.DELETE, None, OLD)


def view_of(
    layout: Layout = LAYOUT,
    projection: Projection | None = None,
    condition: str | None = None,
    **asked: Any,
) -> View:
    subscription = Subscription(TablePattern.parse("public.notes"), **asked)
    sight = Sight("public.notes", projection, None if condition is None else parse(condition))
    normalised = {one: one.text for one in literals_of(subscription, sight, layout)}
    return View(subscription, sight, layout, normalised)


def written(
    change: Change, look: Look = Look.WHOLE, *, form: RealtimeForm = PLAIN, **seen: Any
) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(
        form.write(view_of(change.layout, **seen), change, look), object_pairs_hook=_no_key_twice
    )
    return data


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


def listed(names: Mapping[str, str] = TYPE_NAMES) -> list[dict[str, str]]:
    return [{"name": name, "type": type_name} for name, type_name in names.items()]


HEAD: Final = {
    "schema": "public",
    "table": "notes",
    "columns": listed(),
    "commit_timestamp": "2026-08-27T10:00:00.123Z",
    "errors": None,
}


# What each operation tells


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (INSERT, {"type": "INSERT", "record": NEW_JSON}),
        (change_of(Operation.READ, NEW), {"type": "INSERT", "record": NEW_JSON}),
        (UPDATE, {"type": "UPDATE", "record": NEW_JSON, "old_record": OLD_JSON}),
        (DELETE, {"type": "DELETE", "old_record": OLD_JSON}),
    ],
    ids=["insert", "read", "update", "delete"],
)
def test_an_operation_is_written_with_the_rows_that_it_has(
    change: Change, expected: dict[str, Any]
) -> None:
    assert written(change) == HEAD | expected


def test_of_an_old_row_there_is_what_the_replica_identity_sends() -> None:
    update = change_of(Operation.UPDATE, NEW, {"id": "1"})
    assert written(update)["old_record"] == {"id": 1}
    assert written(change_of(Operation.UPDATE, NEW))["old_record"] == {}
    assert written(change_of(Operation.DELETE, None, {"id": "1"}))["old_record"] == {"id": 1}


def test_an_unchanged_value_that_was_not_sent_is_missing_and_its_column_is_listed() -> None:
    sent = {name: value for name, value in NEW.items() if name != "body"}
    data = written(change_of(Operation.UPDATE, sent, {"id": "1"}, unchanged=("body",)))
    assert data["record"] == {"id": 1, "raw": "0102", "tags": ["a", "b"]}
    assert data["columns"] == listed()


@pytest.mark.parametrize(
    ("timestamp", "expected"),
    [
        ("2026-08-27 10:00:00+00", "2026-08-27T10:00:00.000Z"),
        ("2026-08-27 10:00:00.0009+00", "2026-08-27T10:00:00.000Z"),
        ("2026-08-27 10:00:00.999999+00", "2026-08-27T10:00:00.999Z"),
        ("2026-08-27 01:30:00.5+05:30", "2026-08-26T20:00:00.500Z"),
    ],
)
def test_the_time_of_the_commit_is_of_utc_and_in_milliseconds(
    timestamp: str, expected: str
) -> None:
    change = Change(
        Operation.INSERT, LAYOUT, Transaction(7, AT, AT, timestamp), 1, columns_of(NEW, LAYOUT)
    )
    assert written(change)["commit_timestamp"] == expected


def test_names_may_have_any_characters() -> None:
    name = 'a "b"\\\n€'
    layout = layout_of((name,), {name: 25})
    data = written(change_of(Operation.INSERT, {name: '"x"'}, layout=layout))
    assert data["record"] == {name: "x"}
    assert data["columns"] == [{"name": name, "type": "text"}]


def test_a_type_that_is_not_known_has_a_name_all_the_same() -> None:
    layout = layout_of(("id",), {"id": 23, "odd": 999_999})
    data = written(change_of(Operation.INSERT, {"id": "1", "odd": '"x"'}, layout=layout))
    assert data["columns"][1] == {"name": "odd", "type": "unknown"}


@pytest.mark.parametrize("text", ['"0102"', r'"\\x0102"'])
def test_a_bytea_is_digits_alone(text: str) -> None:
    assert written(change_of(Operation.INSERT, {**NEW, "raw": text}))["record"]["raw"] == "0102"


# What the reader may see, and asked for


def test_hidden_columns_are_nowhere() -> None:
    data = written(UPDATE, projection=Projection(exclude=["body"]))
    assert "body" not in data["record"]
    assert "body" not in data["old_record"]
    assert [column["name"] for column in data["columns"]] == ["id", "raw", "tags"]


def test_selected_columns_come_with_the_key() -> None:
    data = written(UPDATE, columns=frozenset({"body"}), with_key=True)
    assert data["record"] == {"id": 1, "body": "new"}
    assert data["old_record"] == {"id": 1, "body": "old"}
    assert [column["name"] for column in data["columns"]] == ["id", "body"]


def test_a_masked_value_is_a_text_for_clients_that_convert_by_type() -> None:
    """A number's hash would be read as the number that it begins with."""
    layout = layout_of(("id",), {"id": 23, "size": 1700, "price": 1700})
    masks = {"size": Mask.parse("hash"), "price": Mask.parse("null")}
    change = change_of(Operation.INSERT, {"id": "1", "size": "2.50", "price": "3"}, layout=layout)
    data = written(change, projection=Projection(mask=masks, key=b"k" * 32))
    assert [column["type"] for column in data["columns"]] == ["int4", "text", "numeric"]
    assert isinstance(data["record"]["size"], str)
    assert data["record"]["price"] is None


# What the reader does not see of an update


def test_of_a_row_that_comes_into_sight_the_past_is_its_key() -> None:
    data = written(UPDATE, Look.WITHOUT_PAST)
    assert data["record"] == NEW_JSON
    assert data["old_record"] == {"id": 1}


@pytest.mark.parametrize("old", [{**OLD, "id": "2"}, {"body": '"old"'}, None])
def test_a_key_that_was_another_one_is_not_told(old: Mapping[str, str] | None) -> None:
    assert written(change_of(Operation.UPDATE, NEW, old), Look.WITHOUT_PAST)["old_record"] == {}


def test_the_key_of_the_past_is_masked_and_hidden_like_that_of_the_row() -> None:
    mask = Projection(mask={"id": Mask.parse("redact")})
    data = written(UPDATE, Look.WITHOUT_PAST, projection=mask)
    assert data["old_record"] == {"id": "[redacted]"}


def test_a_row_that_leaves_the_filter_is_whole_and_marked() -> None:
    data = written(UPDATE, Look.LEAVING)
    assert data["leaving"] is True
    assert data["record"] == NEW_JSON | {"$leaving": True}
    assert data["old_record"] == OLD_JSON


def test_a_row_that_leaves_the_sight_is_its_key() -> None:
    data = written(UPDATE, Look.LEAVING_BY_KEY)
    assert data["leaving"] is True
    assert data["type"] == "UPDATE"
    assert data["record"] == {"$leaving": True}
    assert data["old_record"] == {"id": 1}


def test_of_a_delete_that_row_security_hides_there_is_the_key() -> None:
    assert written(DELETE, Look.BY_KEY) == HEAD | {"type": "DELETE", "old_record": {"id": 1}}


# Errors


def test_a_table_without_a_key_shows_no_new_rows() -> None:
    layout = layout_of(())
    expected = HEAD | {
        "type": "INSERT",
        "columns": [],
        "record": {},
        "errors": ["Error 400: Bad Request, no primary key"],
    }
    assert written(change_of(Operation.INSERT, NEW, layout=layout)) == expected
    update = written(change_of(Operation.UPDATE, NEW, OLD, layout=layout))
    assert update == expected | {"type": "UPDATE", "old_record": {}}
    delete = written(change_of(Operation.DELETE, None, OLD, layout=layout))
    assert delete == HEAD | {"type": "DELETE", "old_record": OLD_JSON}


def test_a_hidden_key_hides_the_row() -> None:
    hidden = Projection(exclude=["id"])
    data = written(INSERT, projection=hidden)
    assert data == HEAD | {
        "type": "INSERT",
        "columns": [],
        "record": {},
        "errors": ["Error 401: Unauthorized"],
    }
    assert written(UPDATE, projection=hidden)["old_record"] == {}
    key_only = written(change_of(Operation.DELETE, None, {"id": "1"}), projection=hidden)
    assert key_only["old_record"] == {}
    assert key_only["errors"] is None


def test_a_key_of_which_one_column_is_hidden_hides_the_row() -> None:
    change = change_of(Operation.INSERT, NEW, layout=layout_of(("id", "body")))
    data = written(change, projection=Projection(exclude=["body"]))
    assert data["errors"] == ["Error 401: Unauthorized"]


TOO_LARGE: Final = '"%s"' % ("x" * MAX_CHANGE_BYTES)
WIDE: Final = {"id": 23, "large": 25, "limit": 25, "over": 25, "none": 25}
WIDE_VALUES: Final = {
    "id": "1",
    "large": TOO_LARGE,
    "limit": '"%s"' % ("l" * 62),
    "over": '"%s"' % ("o" * 63),
    "none": "null",
}


@pytest.mark.parametrize("asked", [{}, {"columns": frozenset({"id", "limit", "over", "none"})}])
def test_of_a_change_that_is_too_large_short_values_are_left(asked: dict[str, Any]) -> None:
    """Its size counts, and not that of what the client asked for."""
    layout = layout_of(("id",), WIDE)
    data = written(change_of(Operation.UPDATE, WIDE_VALUES, WIDE_VALUES, layout=layout), **asked)
    assert data["errors"] == ["Error 413: Payload Too Large"]
    assert data["record"] == data["old_record"] == {"id": 1, "limit": "l" * 62}
    assert len(data["columns"]) == len(asked.get("columns", WIDE))


@pytest.mark.parametrize("operation", [Operation.INSERT, Operation.UPDATE, Operation.DELETE])
def test_the_bound_is_that_of_the_record_that_realtime_reads(operation: Operation) -> None:
    layout = layout_of(("id",), {"id": 23, "body": 25})

    def record_bytes(values: Mapping[str, str]) -> int:
        columns = [
            {"name": name, "type": TYPE_NAMES[name], "typeoid": oid, "value": json.loads(value)}
            for (name, oid), value in zip(layout.columns.items(), values.values(), strict=True)
        ]
        record = {
            "pk": [{"name": "id", "type": "int4"}],
            "table": "notes",
            "action": str(operation)[0].upper(),
            "schema": "public",
            "timestamp": TRANSACTION.commit_timestamp,
        }
        if operation is not Operation.DELETE:
            record["columns"] = columns
        if operation is not Operation.INSERT:
            record["identity"] = columns
        return len(json.dumps(record))

    rows = 2 if operation is Operation.UPDATE else 1
    room = (MAX_CHANGE_BYTES - record_bytes({"id": "1", "body": '""'})) // rows
    for length, errors in ((room, None), (room + 1, ["Error 413: Payload Too Large"])):
        values = {"id": "1", "body": f'"{"x" * length}"'}
        is_large = record_bytes(values) > MAX_CHANGE_BYTES
        assert is_large is (errors is not None)
        new = None if operation is Operation.DELETE else values
        old = None if operation is Operation.INSERT else values
        assert written(change_of(operation, new, old, layout=layout))["errors"] == errors


def test_a_value_filled_in_from_the_old_row_was_sent_once() -> None:
    half = '"%s"' % ("x" * (MAX_CHANGE_BYTES * 2 // 3))
    sent = Layout(RELATION, ["id"], [23], ["id"], TYPES, columns={"id": 23, "body": 25})
    values = {"id": "1", "body": half}
    assert written(change_of(Operation.UPDATE, values, values, layout=sent))["errors"] is None


# Positions


@pytest.mark.parametrize(
    ("change", "place"), [(INSERT, "record"), (UPDATE, "record"), (DELETE, "old_record")]
)
def test_the_position_stands_in_the_record(change: Change, place: str) -> None:
    data = written(change, form=WITH_POSITION)
    assert data[place]["$position"] == "0/16274F8:3"
    assert str(data).count("$position") == 1


def test_there_is_a_position_where_there_is_no_row() -> None:
    change = change_of(Operation.INSERT, NEW, layout=layout_of(()))
    assert written(change, form=WITH_POSITION)["record"] == {"$position": "0/16274F8:3"}
    data = written(UPDATE, Look.LEAVING_BY_KEY, form=WITH_POSITION)
    assert data["record"] == {"$leaving": True, "$position": "0/16274F8:3"}
    nothing = change_of(Operation.DELETE, None, {"id": "1"})
    hidden = Projection(exclude=["id"])
    data = written(nothing, form=WITH_POSITION, projection=hidden)
    assert data["old_record"] == {"$position": "0/16274F8:3"}


# Frames


def messages(frames: bytes, version: Version) -> list[Any]:
    found = []
    for is_text, payload in split(frames):
        assert is_text
        message = json.loads(payload)
        if version is Version.V2:
            join_ref, ref, topic, event, content = message
            assert join_ref is None
            message = {"ref": ref, "topic": topic, "event": event, "payload": content}
        assert message.keys() == {"ref", "topic", "event", "payload"}
        found.append(message)
    return found


VERSIONS: Final = pytest.mark.parametrize("version", list(Version))
IDS: Final = (101, 7, 99, 7)
ONE: Final = PLAIN.write(view_of(), INSERT, Look.WHOLE)
OTHER: Final = PLAIN.write(view_of(columns=frozenset({"id"})), INSERT, Look.WHOLE)


@VERSIONS
@pytest.mark.parametrize(
    ("sightings", "expected"),
    [
        ([(0, ONE)], [([101], ONE)]),
        ([(2, ONE)], [([99], ONE)]),
        ([(2, ONE), (0, ONE)], [([101, 99], ONE)]),
        ([(1, ONE), (3, ONE)], [([7], ONE)]),
        ([(2, ONE), (1, OTHER), (0, ONE)], [([101, 99], ONE), ([7], OTHER)]),
    ],
)
def test_each_way_to_see_a_change_is_one_frame_with_the_ids_of_all_that_see_it_so(
    version: Version, sightings: list[Sighting], expected: list[tuple[list[int], bytes]]
) -> None:
    encoding = ChannelEncoding(version, "realtime:röom", IDS)
    assert messages(encoding.address(sightings), version) == [
        {
            "ref": None,
            "topic": "realtime:röom",
            "event": "postgres_changes",
            "payload": {"ids": ids, "data": json.loads(body)},
        }
        for ids, body in expected
    ]


@pytest.mark.parametrize("size", [0, 60, 125, 126, 65_000, 65_535, 65_536, 1_000_000])
def test_frames_of_all_sizes_can_be_read(size: int) -> None:
    body = json.dumps({"x": "y" * size}).encode()
    encoding = ChannelEncoding(Version.V2, "realtime:x", (1,))
    (message,) = messages(encoding.address([(0, body)]), Version.V2)
    assert message["payload"]["data"] == {"x": "y" * size}


def test_encodings_are_alike_when_all_that_makes_their_bytes_is() -> None:
    one = ChannelEncoding(Version.V2, "realtime:a", (1, 2))
    assert one == ChannelEncoding(Version.V2, "realtime:a", (1, 2))
    assert hash(one) == hash(ChannelEncoding(Version.V2, "realtime:a", (1, 2)))
    others = [
        ChannelEncoding(Version.V1, "realtime:a", (1, 2)),
        ChannelEncoding(Version.V2, "realtime:b", (1, 2)),
        ChannelEncoding(Version.V2, "realtime:a", (2, 1)),
        ChannelEncoding(Version.V2, "realtime:a", (1, 2), with_position=True),
    ]
    assert one not in others
    assert one.form is others[0].form
    assert one.form is not others[3].form


@VERSIONS
@pytest.mark.parametrize("reason", ["interrupted", "changed", "trimmed", "foreign"])
def test_what_may_be_missing_is_told_of_the_subscription(version: Version, reason: str) -> None:
    encoding = ChannelEncoding(version, "realtime:room1", (1,))
    content = {"reason": reason, "begins": "0/10", "position": "0/20"}
    (message,) = messages(encoding.note("reset", content, Position.parse("0/20")), version)
    assert message["event"] == "system"
    payload = message["payload"]
    text = payload.pop("message")
    assert "0/10" in text
    assert "0/20" in text
    # The client for Python would join anew after an error, from the same position.
    status = "ok" if version is Version.V1 else "error"
    assert payload == {"channel": "room1", "extension": "postgres_changes", "status": status}


@pytest.mark.parametrize("event", ["position", "end"])
def test_other_notes_and_signs_of_life_are_for_the_protocol_and_not_for_a_channel(
    event: str,
) -> None:
    encoding = ChannelEncoding(Version.V2, "realtime:room1", (1,))
    assert encoding.note(event, {}, None) == encoding.heartbeat == b""


# Clients of others


@pytest.mark.parametrize("form", [PLAIN, WITH_POSITION], ids=["plain", "position"])
@pytest.mark.parametrize("key", [("id",), ()], ids=["key", "no key"])
@pytest.mark.parametrize(
    ("operation", "look"),
    [
        (Operation.INSERT, Look.WHOLE),
        *[(Operation.UPDATE, look) for look in Look],
        (Operation.DELETE, Look.WHOLE),
    ],
)
def test_the_python_client_takes_each_frame(
    operation: Operation, look: Look, key: tuple[str, ...], form: RealtimeForm
) -> None:
    new = None if operation is Operation.DELETE else NEW
    old = None if operation is Operation.INSERT else OLD
    change = change_of(operation, new, old, layout=layout_of(key))
    body = form.write(view_of(change.layout), change, look)
    frame = ChannelEncoding(Version.V1, "realtime:room1", (5, 6)).address([(0, body), (1, body)])
    ((_, text),) = split(frame)
    message = ServerMessageAdapter.validate_json(text)
    assert isinstance(message, PostgresChangesMessage)
    assert message.payload["ids"] == [5, 6]
    assert message.payload["data"]["type"] == operation.upper()


def test_the_python_client_takes_what_is_told_of_a_gap() -> None:
    encoding = ChannelEncoding(Version.V1, "realtime:room1", (1,))
    content = {"reason": "trimmed", "begins": "0/10", "position": "0/20"}
    ((_, text),) = split(encoding.note("reset", content, Position.parse("0/20")))
    message = ServerMessageAdapter.validate_json(text)
    assert isinstance(message, SystemMessage)
    assert message.payload.status == "ok"
