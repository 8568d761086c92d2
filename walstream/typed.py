"""Rows as models: a change whose ``row`` is a pydantic model, a dataclass or a TypedDict.

The model gets the Python objects that a psycopg ``SELECT`` gives, by the names of the columns (a
field of another name has the column as its alias), and `UNCHANGED` for a column that Postgres left
out of an update.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Final, Generic, Literal, Self, TypeVar, final, get_origin

import msgspec
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError
from pydantic_core import CoreSchema, core_schema

from walstream.changes import Change, Relation
from walstream.errors import RowInvalid

T = TypeVar("T")


@final
class Unchanged:
    """What a field holds whose column Postgres left out: an update did not touch its long value.

    There is one, `UNCHANGED`; it is false. ``notes: str | Unchanged`` takes it. JSON has no word
    for it: leave such fields out of what you write (``exclude=set(change.unchanged)``).
    """

    __slots__ = ()
    _only: Self | None = None

    def __new__(cls) -> Self:
        """Return the only one."""
        if cls._only is None:
            cls._only = super().__new__(cls)
        return cls._only

    def __bool__(self) -> Literal[False]:
        """Be false, so that ``if order.notes`` means a text."""
        return False

    def __repr__(self) -> str:
        return "UNCHANGED"

    def __reduce__(self) -> str:
        """Be the same one after pickling and copying."""
        return "UNCHANGED"

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Take `UNCHANGED` and nothing else."""
        del source, handler
        return core_schema.is_instance_schema(cls)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """No JSON is `UNCHANGED`."""
        del schema, handler
        return {"not": {}}


UNCHANGED: Final = Unchanged()


class RowModel(Generic[T]):
    """Makes rows into models of one class; compiled once.

    ``name`` is what messages call the class.
    """

    def __init__(self, model: type[T]) -> None:
        """Take a pydantic model, a dataclass or a TypedDict.

        Raises:
            TypeError: it is something else, or pydantic cannot make a validator of it.
        """
        adapter = _adapter(model)
        fields = _fields_of(adapter.core_schema)
        if fields is None:
            raise _unusable(model)
        self.model = model
        self.name: str = model.__name__
        self._validate: Callable[[Any], T] = adapter.validator.validate_python
        self._fields = fields

    def __repr__(self) -> str:
        return f"RowModel({self.name})"

    def required_columns(self) -> list[str]:
        """Name the columns without which no row is valid; of several aliases the first.

        None are known of a model whose own validator sees the row first: it may fill them in.
        """
        return [field.columns[0] for field in self._fields if field.required]

    def missing_columns(self, columns: Iterable[str]) -> list[str]:
        """Name the required columns that are not among these."""
        there = set(columns)
        return [
            field.columns[0]
            for field in self._fields
            if field.required and there.isdisjoint(field.columns)
        ]

    def apply(self, change: Change[Any]) -> Change[T]:
        """Return a copy of the change whose ``row`` is a model.

        A delete and a truncate have no new row: they come back as they are, with an empty `Row`.

        Raises:
            RowInvalid: the row does not fit the model. The message holds no value of it.
            DecodeError: a value is not what wal2json writes for its type.
        """
        columns = change.new_columns
        if columns is None:
            return change
        load = change.layout.types.load
        values = {column.name: load(column.typeoid, column.value) for column in columns}
        for name in change.unchanged:
            values[name] = UNCHANGED
        try:
            row = self._validate(values)
        except ValidationError as error:
            invalid = self._invalid(change, error)
        else:
            return msgspec.structs.replace(change, _row=row)
        # Outside of the except clause: pydantic's error holds values, and would be its context.
        raise invalid

    def _invalid(self, change: Change[Any], error: ValidationError) -> RowInvalid:
        """Say what is wrong by field and kind; pydantic's own words may hold values."""
        problems: dict[str, str] = {}
        for one in error.errors(include_url=False, include_context=False, include_input=False):
            # Deeper in, the place of a problem may be a key of a JSON object: a value of the row.
            place = str(one["loc"][0]) if one["loc"] else ""
            problems.setdefault(place, one["type"])
        left_out = sorted(problems.keys() & set(change.unchanged))
        told = "; ".join(self._problem(*problem, left_out) for problem in problems.items())
        return RowInvalid(
            f"a row of {change.relation} does not fit the model {self.name}: {told}",
            hint=_hint(left_out, change.relation),
        )

    def _problem(self, place: str, kind: str, left_out: list[str]) -> str:
        expected = next((one.expected for one in self._fields if place in one.places), "")
        expects = f", expects {expected}" if expected else ""
        if place in left_out:
            return f"{place}: unchanged, and so left out by Postgres{expects}"
        return f"{place or 'the row as a whole'}: {kind}{expects}"


class _Field(msgspec.Struct, frozen=True):
    """A field of a model: the columns that it can come from, and what it is annotated with."""

    name: str
    columns: tuple[str, ...]
    required: bool
    expected: str = ""

    @property
    def places(self) -> tuple[str, ...]:
        """By what pydantic's errors call it."""
        return (self.name, *self.columns)


def _hint(left_out: list[str], relation: Relation) -> str:
    if not left_out:
        return "mend the model or the row; walstream models generate writes models that fit"
    table = f"{_quoted(relation.schema)}.{_quoted(relation.name)}"
    return (
        f"annotate {', '.join(left_out)} with `| Unchanged`, or let Postgres send everything:"
        f" ALTER TABLE {table} REPLICA IDENTITY FULL"
    )


def _quoted(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else '"' + name.replace('"', '""') + '"'


def _adapter(model: type[T]) -> TypeAdapter[T]:
    if not inspect.isclass(model):
        raise _unusable(model)
    try:
        adapter = TypeAdapter(model)
        adapter.rebuild(raise_errors=True)
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        reason = str(error.message).partition("\n")[0]
        raise _unusable(model, reason) from None
    return adapter


def _unusable(model: object, reason: str = "") -> TypeError:
    found = model.__name__ if inspect.isclass(model) else f"an object of {type(model).__name__}"
    said = f"a row can be a pydantic model, a dataclass or a TypedDict; this is {found}"
    return TypeError(f"{said}: {reason}" if reason else said)


def _fields_of(schema: Mapping[str, Any]) -> list[_Field] | None:
    """Find the fields in pydantic's core schema; None when it is not one of a row."""
    by_name = False
    sees_all = True
    cls: type | None = None
    while True:
        match schema["type"]:
            case "definitions" | "function-after":
                schema = schema["schema"]
            case "function-before" | "function-wrap":
                sees_all = False
                schema = schema["schema"]
            case "model" | "dataclass":
                cls = schema["cls"]
                config = schema.get("config", {})
                by_name = bool(config.get("validate_by_name") or config.get("populate_by_name"))
                schema = schema["schema"]
            case "model-fields" | "dataclass-args" | "typed-dict":
                break
            case _:
                return None
    fields = schema["fields"]
    named = fields if isinstance(fields, Mapping) else {one["name"]: one for one in fields}
    annotations = _annotations(schema.get("cls") or cls)
    total = schema.get("total", True)
    return [
        _Field(
            name,
            _columns(field.get("validation_alias"), name, by_name=by_name),
            sees_all and field.get("required", total) and _needs_value(field),
            annotations.get(name, ""),
        )
        for name, field in named.items()
    ]


def _needs_value(field: Mapping[str, Any]) -> bool:
    return field["schema"]["type"] != "default" and field.get("init") is not False


def _columns(alias: Any, name: str, *, by_name: bool) -> tuple[str, ...]:
    """Name the columns that an alias looks into: a name, a path, or a choice of paths."""
    match alias:
        case None:
            return (name,)
        case str():
            found = [alias]
        case [str() as first, *_]:
            found = [first]
        case _:
            found = [str(path[0]) for path in alias]
    return (*found, name) if by_name else tuple(found)


def _annotations(cls: type | None) -> dict[str, str]:
    """Print what fields are annotated with, without the names of modules."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__ if cls else ()):
        found |= inspect.get_annotations(base)
    return {name: _MODULES.sub("", _printed(one)) for name, one in found.items()}


def _printed(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _printed(annotation.__origin__)
    if inspect.isclass(annotation) and not hasattr(annotation, "__args__"):
        return annotation.__name__
    return annotation if isinstance(annotation, str) else str(annotation)


_MODULES: Final = re.compile(r"\b(?:[a-z_]\w*\.)+")
_PLAIN: Final = re.compile(r"[a-z_][a-z0-9_]*")
