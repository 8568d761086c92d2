"""Rows as models: what a model gets, what it is told, and that no value gets into a message."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import traceback
from datetime import date
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, ClassVar, NamedTuple, NotRequired, assert_type

import msgspec
import pydantic
import pytest
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, RootModel
from typing_extensions import TypedDict

from tests.postgres import Database
from tests.streaming import Stream
from walstream import Change, Row
from walstream.errors import RowInvalid
from walstream.typed import UNCHANGED, RowModel, Unchanged


class Status(StrEnum):
    NEW = "new"
    PAID = "paid"


class Order(BaseModel):
    id: int
    status: Status
    amount: Decimal
    placed: date
    notes: str | Unchanged | None


@dataclasses.dataclass
class PlainOrder:
    id: int
    status: Status
    amount: Decimal = Decimal(0)
    comment: str = "none"


@pydantic.dataclasses.dataclass(frozen=True)
class CheckedOrder:
    id: int
    status: Status


class OrderDict(TypedDict):
    id: int
    status: Status
    comment: NotRequired[str]


SECRET = "hunter2"  # noqa: S105 - a value to look for in messages

TABLE = """
    CREATE TABLE orders (
        id int PRIMARY KEY, status text NOT NULL, amount numeric, placed date, notes text
    );
    ALTER TABLE orders ALTER COLUMN notes SET STORAGE EXTERNAL;
"""


@pytest.fixture
async def changes(database: Database) -> list[Change]:
    """An insert, an update that leaves a long value out, a delete and a truncate."""
    database.execute(TABLE)
    stream = Stream(database)
    stream.record("public.orders")
    database.execute(
        "INSERT INTO orders VALUES (1, 'new', 12.50, '2024-02-29', repeat('x', 9000));"
        "UPDATE orders SET status = 'paid'; DELETE FROM orders; TRUNCATE orders"
    )
    await stream.drain()
    return stream.changes


async def test_the_row_of_an_insert_and_an_update_is_the_model(changes: list[Change]) -> None:
    insert, update, delete, truncate = map(RowModel(Order).apply, changes)
    assert insert.row == Order(
        id=1,
        status=Status.NEW,
        amount=Decimal("12.50"),
        placed=date(2024, 2, 29),
        notes="x" * 9000,
    )
    assert update.row.status is Status.PAID
    assert update.row.notes is UNCHANGED
    assert update.unchanged == ("notes",)
    for change in (delete, truncate):
        row: Any = change.row
        assert isinstance(row, Row)
        assert dict(row) == {}


async def test_everything_else_of_the_change_stays(changes: list[Change]) -> None:
    for change in changes:
        typed = RowModel(Order).apply(change)
        assert typed.to_json() == change.to_json()
        assert (typed.id, typed.operation, typed.key) == (change.id, change.operation, change.key)
        assert dict(typed.identity) == dict(change.identity)
        assert dict(typed.sent_row) == dict(change.row) == dict(change.sent_row)
        assert isinstance(change.row, Row), "the change itself is as it was"


async def test_a_change_that_has_a_model_can_get_another(changes: list[Change]) -> None:
    typed = RowModel(PlainOrder).apply(RowModel(Order).apply(changes[0]))
    assert typed.row == PlainOrder(1, Status.NEW, Decimal("12.50"), "none")


async def test_dataclasses_and_typed_dicts_are_models(changes: list[Change]) -> None:
    update = changes[1]
    assert RowModel(PlainOrder).apply(update).row == PlainOrder(
        1, Status.PAID, Decimal("12.50"), "none"
    )
    assert RowModel(CheckedOrder).apply(update).row == CheckedOrder(1, Status.PAID)
    assert RowModel(OrderDict).apply(update).row == {"id": 1, "status": Status.PAID}


async def test_a_model_decides_what_becomes_of_columns_that_it_does_not_know(
    changes: list[Change],
) -> None:
    class Ignoring(BaseModel):
        id: int

    class Keeping(BaseModel):
        model_config = ConfigDict(extra="allow")
        id: int

    class Forbidding(BaseModel):
        model_config = ConfigDict(extra="forbid")
        id: int

    assert RowModel(Ignoring).apply(changes[0]).row.model_dump() == {"id": 1}
    assert (RowModel(Keeping).apply(changes[0]).row.model_extra or {})["status"] == "new"
    with pytest.raises(RowInvalid, match="status: extra_forbidden; amount: extra_forbidden"):
        RowModel(Forbidding).apply(changes[0])


async def test_a_column_left_out_needs_a_place_for_it(changes: list[Change]) -> None:
    class Strict(BaseModel):
        id: int
        notes: str

    with pytest.raises(RowInvalid) as raised:
        RowModel(Strict).apply(changes[1])
    assert raised.value.message == (
        "a row of public.orders does not fit the model Strict:"
        " notes: unchanged, and so left out by Postgres, expects str"
    )
    assert raised.value.hint == (
        "annotate notes with `| Unchanged`, or let Postgres send everything:"
        " ALTER TABLE public.orders REPLICA IDENTITY FULL"
    )
    assert raised.value.exit_code == 75


class Item(BaseModel):
    tags: dict[str, int]


class Nosy(BaseModel):
    """Errors of all kinds, many of whose own words would show the value."""

    number: int
    kind: Status
    day: date
    token: Annotated[str, Field(pattern="^a+$")]
    pair: tuple[int, int]
    item: Item
    either: int | date
    own: str
    absent: str

    @pydantic.field_validator("own")
    @classmethod
    def refuses(cls, value: str) -> str:
        raise ValueError(f"{value} is not welcome")


async def test_messages_name_fields_and_never_values(database: Database) -> None:
    database.execute(
        "CREATE TABLE noises (number text, kind text, day text, token text, pair text,"
        " item jsonb, either text, own text)"
    )
    stream = Stream(database)
    stream.record()
    database.execute(
        "INSERT INTO noises SELECT v, v, v, v, v, jsonb_build_object('tags',"
        " jsonb_build_object(v, v)), v, v FROM (VALUES (%s)) AS one (v)",
        SECRET,
    )
    await stream.drain()
    with pytest.raises(RowInvalid) as raised:
        RowModel(Nosy).apply(stream.changes[0])
    assert raised.value.message == (
        "a row of public.noises does not fit the model Nosy: "
        "number: int_parsing, expects int; "
        "kind: enum, expects Status; "
        "day: date_from_datetime_parsing, expects date; "
        "token: string_pattern_mismatch, expects Annotated[str, Field(pattern='^a+$')]; "
        "pair: tuple_type, expects tuple[int, int]; "
        "item: int_parsing, expects Item; "
        "either: int_parsing, expects int | date; "
        "own: value_error, expects str; "
        "absent: missing, expects str"
    )
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    assert raised.value.__context__ is None


async def test_the_whole_row_can_be_invalid(changes: list[Change]) -> None:
    class Cautious(BaseModel):
        status: str

        @pydantic.model_validator(mode="after")
        def refuses(self) -> Cautious:
            raise ValueError(f"{self.status} is not welcome")

    with pytest.raises(RowInvalid, match=r"the row as a whole: value_error\n") as raised:
        RowModel(Cautious).apply(changes[0])
    assert "new" not in raised.value.message


async def test_columns_of_odd_names_come_by_alias(database: Database) -> None:
    class Odd(BaseModel):
        class_: str = Field(alias="class")
        with_space: int = Field(validation_alias="with space")
        either: int = Field(validation_alias=AliasChoices("gone", "_private"))

    database.execute('CREATE TABLE odd ("class" text, "with space" int, _private int)')
    stream = Stream(database)
    stream.record()
    database.execute("INSERT INTO odd VALUES ('x', 1, 2)")
    await stream.drain()
    row = RowModel(Odd).apply(stream.changes[0]).row
    assert (row.class_, row.with_space, row.either) == ("x", 1, 2)


async def test_what_python_has_no_object_for_needs_a_place_as_text(changes: list[Change]) -> None:
    class Loose(BaseModel):
        placed: date | str

    assert RowModel(Loose).apply(changes[0]).row.placed == date(2024, 2, 29)


def test_required_columns_are_those_without_a_default() -> None:
    class Aliased(BaseModel):
        a: int = Field(alias="A a")
        b: int = Field(validation_alias=AliasChoices("b1", "b2"))
        c: int | None
        d: int = 1
        e: int = Field(default_factory=int)
        shared: ClassVar[int] = 1

    model = RowModel(Aliased)
    assert model.required_columns() == ["A a", "b1", "c"]
    assert model.missing_columns(["b2", "c", "a"]) == ["A a"]
    assert RowModel(PlainOrder).required_columns() == ["id", "status"]
    assert RowModel(CheckedOrder).missing_columns(["id"]) == ["status"]
    assert RowModel(OrderDict).required_columns() == ["id", "status"]


def test_a_field_can_come_by_its_name_too() -> None:
    class ByName(BaseModel):
        model_config = ConfigDict(populate_by_name=True)
        a: int = Field(alias="A")

    assert RowModel(ByName).missing_columns(["a"]) == []
    assert RowModel(ByName).required_columns() == ["A"]


def test_nothing_is_required_where_a_validator_may_fill_it_in() -> None:
    class Filling(BaseModel):
        a: int

        @pydantic.model_validator(mode="before")
        @classmethod
        def fills(cls, values: dict[str, Any]) -> dict[str, Any]:
            return {"a": 1, **values}

    assert RowModel(Filling).required_columns() == []


class Pair(NamedTuple):
    a: int


class Packed(msgspec.Struct):
    a: int


class Undefined(BaseModel):
    a: Nowhere  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    "model", [int, dict, Pair, Packed, Undefined, RootModel[int], Order.model_validate, "Order"]
)
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="a row can be a pydantic model, a dataclass or a Typed"):
        RowModel(model)


def test_unchanged_is_one_false_thing() -> None:
    assert Unchanged() is UNCHANGED
    assert copy.copy(UNCHANGED) is copy.deepcopy(UNCHANGED) is UNCHANGED
    assert pickle.loads(pickle.dumps([UNCHANGED])) == [UNCHANGED]  # noqa: S301 - our own
    assert pickle.loads(pickle.dumps(UNCHANGED)) is UNCHANGED  # noqa: S301 - our own
    assert not UNCHANGED
    assert repr(UNCHANGED) == "UNCHANGED"


def test_unchanged_is_no_text_and_no_json() -> None:
    class Note(BaseModel):
        text: str | Unchanged

    note = Note(text=UNCHANGED)
    assert note.text is UNCHANGED
    assert Note(text="UNCHANGED").text == "UNCHANGED"
    assert Note.model_json_schema()["properties"]["text"]["anyOf"] == [
        {"type": "string"},
        {"not": {}},
    ]
    with pytest.raises(pydantic.ValidationError):
        Note.model_validate({"text": None})
    with pytest.raises(ValueError, match="Unable to serialize"):
        note.model_dump_json()
    assert note.model_dump_json(exclude={"text"}) == "{}"


def test_types_are_those_of_the_model() -> None:
    """For mypy: a change alone has a `Row`, and truth tells a text from what was left out."""

    def plain(change: Change) -> None:
        assert_type(change.row, Row)

    def typed(change: Change[Order]) -> None:
        assert_type(change.row, Order)
        assert_type(change.row.placed, date)
        if change.row.notes:
            assert_type(change.row.notes, str)
        if not isinstance(change.row.notes, Unchanged):
            assert_type(change.row.notes, str | None)

    def applied(change: Change) -> None:
        assert_type(RowModel(Order).apply(change), Change[Order])

    assert callable(plain)
    assert callable(typed)
    assert callable(applied)
