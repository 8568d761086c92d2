"""From records to changes, without a server."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.changes import (
    Begin,
    Change,
    Commit,
    Layout,
    Message,
    Operation,
    Relation,
    Transaction,
    UnchangedValueError,
)
from walstream.decoder import Decoder, UnknownLayout, question_of
from walstream.errors import DecodeError
from walstream.lsn import Lsn
from walstream.values import Types

ORDERS = {"id": 23, "note": 25, "big": 25}
BEGIN = {
    "action": "B",
    "xid": 737,
    "timestamp": "2026-11-22 12:51:35.2096+00",
    "lsn": "0/16274C8",
    "nextlsn": "0/16274F8",
}
COMMIT = {**BEGIN, "action": "C"}


def record(action: str, **members: Any) -> bytes:
    """Write a record as wal2json does."""
    head = {"action": action, "xid": 737, "schema": "public", "table": "orders"}
    return json.dumps({**head, **members}).encode()


def columns(**values: Any) -> list[dict[str, Any]]:
    """Write columns or an identity."""
    return [
        {"name": name, "typeoid": ORDERS[name], "value": value} for name, value in values.items()
    ]


KEY = [{"name": "id", "typeoid": 23}]


def loader(oid: int) -> Any:
    """Stand in for psycopg's loaders: numbers are numbers, the rest is text."""
    return int if oid == 23 else (lambda text: bytes(text).decode())


def answer(question: UnknownLayout) -> Layout:
    """Answer as a catalog would in which only ``note`` and ``big`` can be TOASTed."""
    return Layout(
        relation=question.relation,
        names=question.names,
        typeoids=question.typeoids,
        key=question.key,
        types=Types(loader),
        columns=ORDERS,
        missing=tuple(name for name in ("note", "big") if name not in question.names),
    )


class Reader:
    """Decodes as the stream does: asks for layouts that are not known."""

    def __init__(self, **options: Any) -> None:
        self.decoder = Decoder(**options)
        self.questions: list[UnknownLayout] = []

    def decode(self, data: bytes) -> Any:
        """Decode one record."""
        try:
            return self.decoder.decode(data)
        except UnknownLayout as question:
            self.questions.append(question)
            self.decoder.learn(answer(question))
            return self.decoder.decode(data)

    def change(self, data: bytes) -> Change:
        """Decode one change, inside a transaction."""
        if not self.decoder.in_transaction:
            self.decode(json.dumps(BEGIN).encode())
        decoded = self.decode(data)
        assert isinstance(decoded, Change)
        return decoded


@pytest.fixture
def reader() -> Reader:
    """A decoder between two transactions."""
    return Reader()


def test_begin_and_commit_carry_the_transaction(reader: Reader) -> None:
    """Both positions of the commit record, the xid, and the time of the commit."""
    begin = reader.decode(json.dumps(BEGIN).encode())
    assert isinstance(begin, Begin)
    assert begin.transaction.xid == 737
    assert begin.transaction.commit_lsn == Lsn.parse("0/16274C8")
    assert begin.transaction.end_lsn == Lsn.parse("0/16274F8")
    assert begin.transaction.commit_time == datetime(2026, 11, 22, 12, 51, 35, 209600, tzinfo=UTC)
    assert reader.decoder.in_transaction
    commit = reader.decode(json.dumps(COMMIT).encode())
    assert isinstance(commit, Commit)
    assert commit.transaction is begin.transaction
    assert not reader.decoder.in_transaction


def test_an_insert_has_a_row_and_no_identity(reader: Reader) -> None:
    """The key is the primary key's columns of the new row."""
    change = reader.change(record("I", columns=columns(id=1, note="a", big=None), pk=KEY))
    assert change.operation is Operation.INSERT
    assert change.relation == Relation("public", "orders")
    assert change.root is None
    assert dict(change.row) == {"id": 1, "note": "a", "big": None}
    assert dict(change.identity) == {}
    assert change.key == {"id": 1}
    assert change.id == "0/16274F8:1"
    assert (change.xid, change.commit_lsn, change.end_lsn) == (737, 0x16274C8, 0x16274F8)
    assert change.commit_time.year == 2026


def test_changes_of_a_transaction_are_counted_from_one(reader: Reader) -> None:
    """Rows can share an LSN, so the id needs an ordinal; each transaction starts anew."""
    data = record("I", columns=columns(id=1, note="a", big=None), pk=KEY)
    assert [reader.change(data).ordinal for _ in range(3)] == [1, 2, 3]
    reader.decode(json.dumps(COMMIT).encode())
    assert reader.change(data).ordinal == 1


def test_a_delete_has_an_identity_and_no_row(reader: Reader) -> None:
    """Its key comes from the identity."""
    change = reader.change(record("D", identity=columns(id=1), pk=KEY))
    assert change.operation is Operation.DELETE
    assert (dict(change.row), dict(change.identity), change.key) == ({}, {"id": 1}, {"id": 1})


def test_a_truncate_has_neither(reader: Reader) -> None:
    """Nor a key."""
    change = reader.change(record("T"))
    assert change.operation is Operation.TRUNCATE
    assert (dict(change.row), dict(change.identity), change.key) == ({}, {}, {})


def test_an_unchanged_value_is_marked_when_the_identity_is_the_key(reader: Reader) -> None:
    """It is never null; asking for it says what to do."""
    change = reader.change(
        record("U", columns=columns(id=2, note="b"), identity=columns(id=1), pk=KEY)
    )
    assert change.unchanged == ("big",)
    assert dict(change.row) == {"id": 2, "note": "b"}
    assert dict(change.identity) == {"id": 1}
    assert change.key == {"id": 2}
    assert change.row.get("big", "default") == "default"
    with pytest.raises(UnchangedValueError, match="REPLICA IDENTITY FULL"):
        change.row["big"]


def test_an_unchanged_value_comes_from_a_full_identity(reader: Reader) -> None:
    """The row is whole then, in the order of the table."""
    change = reader.change(
        record(
            "U", columns=columns(id=1, big="y"), identity=columns(id=1, note="a", big="x"), pk=KEY
        )
    )
    assert change.unchanged == ()
    assert list(change.row.items()) == [("id", 1), ("note", "a"), ("big", "y")]
    assert change.identity["big"] == "x"


def test_a_whole_update_is_passed_on_as_it_is(reader: Reader) -> None:
    """The usual case does not build anything new."""
    change = reader.change(
        record("U", columns=columns(id=1, note="b", big="x"), identity=columns(id=1), pk=KEY)
    )
    assert change.unchanged == ()
    assert dict(change.row) == {"id": 1, "note": "b", "big": "x"}


def test_each_shape_is_asked_for_once(reader: Reader) -> None:
    """Also a changed key or type is a new shape."""
    shapes = [
        record("I", columns=columns(id=1, note="a", big=None), pk=KEY),
        record("I", columns=columns(id=1, note="a"), pk=KEY),
        record("I", columns=columns(id=1, note="a", big=None), pk=[]),
        record("I", columns=[{"name": "id", "typeoid": 20, "value": 1}], pk=KEY),
    ]
    for data in [*shapes, *shapes]:
        reader.change(data)
    assert len(reader.questions) == len(shapes)
    assert str(reader.questions[0]) == "public.orders"
    reader.decoder.forget()
    reader.change(shapes[0])
    assert len(reader.questions) == len(shapes) + 1


def test_a_question_names_the_identity_too(reader: Reader) -> None:
    """The catalog is younger than the record, and may not know the columns any more."""
    reader.change(
        record("U", columns=columns(id=1), identity=columns(id=1, note="a", big="x"), pk=KEY)
    )
    (question,) = reader.questions
    assert question.identity_names == ["id", "note", "big"]
    assert question.identity_typeoids == [23, 25, 25]


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (record("U", columns=columns(id=1, note="b", big="x"), identity=columns(id=1), pk=KEY), 3),
        (record("D", identity=columns(id=1), pk=KEY), 1),
        (record("T"), 0),
    ],
)
def test_a_change_can_be_asked_for_again(reader: Reader, data: bytes, names: int) -> None:
    """Its table may have become a partition since."""
    question = question_of(reader.change(data))
    assert str(question.relation) == "public.orders"
    assert len(question.names) == names


def test_a_transactional_message_takes_an_ordinal(reader: Reader) -> None:
    """It stands among the changes of its transaction."""
    reader.decode(json.dumps(BEGIN).encode())
    data = json.dumps(
        {"action": "M", "lsn": "0/10", "transactional": True, "prefix": "p", "content": "c"}
    ).encode()
    message = reader.decode(data)
    assert isinstance(message, Message)
    assert (message.prefix, message.content, message.id) == ("p", "c", "0/16274F8:1")


def test_another_message_stands_alone(reader: Reader) -> None:
    """It can come before the transaction around it, and outside of any."""
    data = json.dumps(
        {"action": "M", "lsn": "0/10", "transactional": False, "prefix": "p", "content": "c"}
    ).encode()
    message = reader.decode(data)
    assert isinstance(message, Message)
    assert (message.transaction, message.id) == (None, "0/10")


def test_text_in_the_databases_encoding_is_read() -> None:
    """wal2json sends text in the encoding of the database, whatever the client asked for."""
    reader = Reader(encoding="latin1")
    data = record("I", columns=columns(id=1, note="?", big=None), pk=KEY)
    change = reader.change(data.replace(b"?", b"\xe9\xdf"))
    assert change.row["note"] == "éß"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'{"action":"X"}',
        b'{"action":"B"}',
        b"\xff",
        record("I", columns=[{"name": "id"}], pk=KEY),
        b"[" * 100_000,
    ],
)
def test_what_is_no_record_is_refused_without_showing_it(reader: Reader, data: bytes) -> None:
    """The message holds the length, never the text."""
    with pytest.raises(DecodeError, match=f"a record of {len(data)} bytes"):
        reader.decode(data)


def test_bytes_that_are_not_in_the_encoding_are_refused() -> None:
    """Without the bytes in the message."""
    with pytest.raises(DecodeError, match="wal2json's: UnicodeDecodeError\n"):
        Decoder(encoding="ascii").decode(b'{"action":"\xe9"}')


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([record("T")], "outside of a transaction"),
        ([json.dumps(BEGIN).encode()] * 2, "inside another one"),
        ([json.dumps(COMMIT).encode()], "not that of the transaction before"),
        (
            [json.dumps(BEGIN).encode(), json.dumps({**COMMIT, "nextlsn": "0/1"}).encode()],
            "not that of the transaction before",
        ),
        ([json.dumps({**BEGIN, "lsn": "x"}).encode()], "is not an LSN"),
        (
            [b'{"action":"M","lsn":"x","transactional":false,"prefix":"","content":""}'],
            "is not an LSN",
        ),
    ],
)
def test_records_out_of_order_are_refused(
    reader: Reader, records: list[bytes], reason: str
) -> None:
    """A gap in the stream must not pass for a transaction."""
    *before, last = records
    for data in before:
        reader.decode(data)
    with pytest.raises(DecodeError, match=reason):
        reader.decode(last)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
OBJECTS = st.dictionaries(st.sampled_from(["name", "typeoid", "value"]) | st.text(), SCALARS)
JSON = SCALARS | OBJECTS | st.lists(SCALARS) | st.lists(OBJECTS) | st.lists(st.lists(OBJECTS))
MEMBERS = st.dictionaries(
    st.sampled_from(
        ["schema", "table", "columns", "identity", "pk", "lsn", "nextlsn", "xid", "timestamp"]
    ),
    JSON,
)


@given(MEMBERS, st.sampled_from("BCIUDTMX"))
def test_any_json_decodes_or_raises_the_decoders_error(
    members: dict[str, Any], action: str
) -> None:
    """Nothing else is raised, whatever comes."""
    decoder = Decoder()
    with contextlib.suppress(DecodeError, UnknownLayout):
        decoder.decode(json.dumps({"action": action, **members}).encode())


@given(st.binary())
def test_any_bytes_decode_or_raise_the_decoders_error(data: bytes) -> None:
    """Nothing else is raised, whatever comes."""
    with pytest.raises(DecodeError):
        Decoder().decode(data)


def test_rows_and_changes_print_without_values(reader: Reader) -> None:
    """They may end up in a log."""
    change = reader.change(record("I", columns=columns(id=1, note="secret", big=None), pk=KEY))
    assert repr(change) == "Change(insert public.orders 0/16274F8:1)"
    assert repr(change.row) == "Row(id, note, big)"


def test_a_row_is_a_mapping(reader: Reader) -> None:
    """Values are loaded once; what is not there is a KeyError."""
    row = reader.change(record("I", columns=columns(id=1, note="a", big=None), pk=KEY)).row
    assert row["id"] is row["id"]
    assert (len(row), list(row), "note" in row) == (3, ["id", "note", "big"], True)
    assert row.column("absent") is None
    with pytest.raises(KeyError, match="absent"):
        row["absent"]


def test_a_change_is_one_json_object_with_its_keys_in_order(reader: Reader) -> None:
    """As documented."""
    change = reader.change(
        record("U", columns=columns(id=2, note="b"), identity=columns(id=1), pk=KEY)
    )
    assert change.to_json() == (
        b'{"id":"0/16274F8:1","operation":"update","schema":"public","table":"orders",'
        b'"row":{"id":2,"note":"b"},"identity":{"id":1},"unchanged":["big"],"xid":737,'
        b'"commit_lsn":"0/16274C8","end_lsn":"0/16274F8","ordinal":1,'
        b'"commit_time":"2026-11-22T12:51:35.209600+00:00"}'
    )


def test_a_partitions_change_names_the_partitioned_table(reader: Reader) -> None:
    """`root` follows `table`; a leaving update says so."""
    change = reader.change(record("T"))
    layout = Layout(
        relation=Relation("public", "part"),
        names=[],
        typeoids=[],
        key=[],
        types=Types(loader),
        ancestors=(Relation("public", "middle"), Relation("public", "whole")),
    )
    moved = Change(Operation.TRUNCATE, layout, change.transaction, 1, leaving=True)
    assert moved.root == Relation("public", "whole")
    assert b'"table":"part","root":"public.whole","row":null,"identity":null' in moved.to_json()
    assert b'"leaving":true' in moved.to_json()


def test_a_message_outside_a_transaction_and_inside_have_ids() -> None:
    """The position, or the transaction's end and the ordinal."""
    transaction = Transaction(1, Lsn(1), Lsn(2), "2026-01-01 00:00:00+00")
    assert Message("p", "c", Lsn(9)).id == "0/9"
    assert Message("p", "c", Lsn(1), transaction, 3).id == "0/2:3"


def test_an_updates_identity_is_decoded_when_it_is_looked_at(reader: Reader) -> None:
    """Under REPLICA IDENTITY FULL it is half of the record, and few handlers want it."""
    whole = columns(id=1, note='{"name"', big="x")
    change = reader.change(record("U", columns=whole, identity=whole, pk=KEY))
    assert type(change.sent_identity) is msgspec.Raw
    assert dict(change.identity) == dict(change.row)


def test_an_identity_that_is_none_is_refused_when_it_is_looked_at(reader: Reader) -> None:
    """Without showing it."""
    whole = columns(id=1, note="a", big="x")
    reader.change(record("U", columns=whole, identity=columns(id=1), pk=KEY))
    change = reader.change(record("U", columns=whole, identity=[{"secret": 1}], pk=KEY))
    with pytest.raises(DecodeError, match="the columns of a record are not") as refused:
        change.identity["id"]
    assert "secret" not in str(refused.value)


def test_a_column_is_found_wherever_it_stands(reader: Reader) -> None:
    """An identity need not have the columns where the row has them."""
    change = reader.change(
        record("U", columns=columns(id=1, note="a", big="x"), identity=columns(note="b"), pk=KEY)
    )
    assert change.identity["note"] == "b"
    assert "id" not in change.identity


def shape(table: str, column: str) -> Layout:
    return Layout(Relation("public", table), [column], [23], [], Types(loader))


def test_shapes_of_a_table_that_is_altered_again_and_again_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("walstream.decoder.MOST_SHAPES_OF_A_TABLE", 3)
    decoder = Decoder()
    shapes = [shape("orders", f"c{number}") for number in range(5)]
    forgotten = [decoder.learn(one) for one in shapes]
    assert forgotten == [[], [], [], [shapes[0]], [shapes[1]]]


def test_shapes_of_all_tables_are_bounded_and_those_in_use_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("walstream.decoder.MOST_SHAPES", 3)
    decoder = Decoder()
    first, second, third = (shape(table, "c") for table in ("first", "second", "third"))
    assert [decoder.learn(one) for one in (first, second, third)] == [[], [], []]
    first_anew = shape("first", "d")
    assert decoder.learn(first_anew) == [second]
    decoder.forget()
    assert [decoder.learn(one) for one in (first, second, third)] == [[], [], []]
