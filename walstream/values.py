r"""PostgreSQL's types, and what becomes of a value that wal2json wrote.

A value arrives as a JSON scalar (`msgspec.Raw`) with the OID of its type. `Types` turns it into the
Python object that a psycopg ``SELECT`` gives, into the JSON that ``to_jsonb`` gives in a session
whose TimeZone is UTC, into the text that the type's output function prints, or into a key that
compares as PostgreSQL compares (`walstream.comparables`).

wal2json writes numbers and bools bare, and everything else as a string of the output function's
text; domains always as strings, bytea without its ``\x`` unless inside something else. With
``numeric-data-types-as-string`` (wal2json 2.6) numbers are strings too. Every conversion takes both
forms, and is made once for a type and kept: this is the hot path.
"""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from keyword import iskeyword
from typing import Any, Final

import msgspec

from walstream import comparables
from walstream.comparables import ToKey
from walstream.errors import DecodeError, FilterError
from walstream.nested import (
    Range,
    parse_array,
    parse_composite,
    parse_hstore,
    parse_items,
    parse_multirange,
    parse_range,
)

TextLoader = Callable[[bytes], Any]
"""From output text to a Python object; `ValueError` for what Python has no object for."""

RawTo = Callable[[msgspec.Raw], Any]

BOOL_OID: Final = 16
BYTEA_OID: Final = 17
TEXT_OID: Final = 25
FLOAT4_OID: Final = 700
FLOAT8_OID: Final = 701
VARCHAR_OID: Final = 1043
NUMERIC_OID: Final = 1700


class Kind(StrEnum):
    """What a type is made of: ``pg_type.typtype``, with arrays apart."""

    BASE = "base"
    ARRAY = "array"
    COMPOSITE = "composite"
    DOMAIN = "domain"
    ENUM = "enum"
    RANGE = "range"
    MULTIRANGE = "multirange"


class PgType(msgspec.Struct, frozen=True):
    """One type, as the catalog describes it.

    ``element`` is the type of an array's elements, or of the bounds of a range or multirange;
    ``base`` is what a domain is over; ``delimiter`` stands between an array's elements;
    ``attributes`` are a composite's names and types, ``labels`` an enum's in their order.
    ``json_cast`` says that the type has a cast to json, which ``to_jsonb`` uses. ``sql_name`` is
    what can stand after ``::``; without one it is made from schema and name.
    """

    oid: int
    name: str
    schema: str = "pg_catalog"
    kind: Kind = Kind.BASE
    element: int = 0
    base: int = 0
    delimiter: str = ","
    attributes: tuple[tuple[str, int], ...] = ()
    labels: tuple[str, ...] = ()
    json_cast: bool = False
    sql_name: str = ""


class Support(StrEnum):
    """What comparing values of a type can tell."""

    EQUALITY = "equality"
    ORDER = "order"


class UnknownLabel(LookupError):
    """An enum's label that the enum did not have when its key was made: the type has changed."""

    def __init__(self, typeoid: int) -> None:
        super().__init__(f"the enum with OID {typeoid} has a new label")
        self.typeoid = typeoid


class Types:
    """What is known about types, and the conversions made from it.

    A type that nobody told about stays text everywhere. What Python has no object for
    (``infinity``, years before Christ or after 9999, ``24:00:00``, JSON nested too deeply) loads as
    its output text; inside an array or a composite that holds for the value alone.
    """

    def __init__(
        self, text_loader: Callable[[int], TextLoader], known: Iterable[PgType] = ()
    ) -> None:
        """Start with the built-in types and ``known``; psycopg's loaders come from outside."""
        self._text_loader = text_loader
        self._types = dict(_BUILT_IN)
        self._loads: dict[int, RawTo] = {}
        self._jsons: dict[int, _JsonToJson] = {}
        self._texts: dict[int, RawTo] = {}
        for pg_type in known:
            self.add(pg_type)

    def __contains__(self, oid: int) -> bool:
        """Whether the type is known; built-in types always are."""
        return oid in self._types

    def get(self, oid: int) -> PgType | None:
        """Return what is known about a type."""
        return self._types.get(oid)

    def learned(self) -> set[int]:
        """Return the OIDs of the types that are not built in."""
        return self._types.keys() - _BUILT_IN.keys()

    def add(self, pg_type: PgType) -> None:
        """Learn a type, or learn it anew.

        Conversions made before are dropped, also those of types built on it. Keys and functions
        that were handed out stay as they are.
        """
        self._types[pg_type.oid] = pg_type
        self._loads.clear()
        self._jsons.clear()
        self._texts.clear()

    def resolve(self, oid: int) -> int:
        """Return what a domain is over in the end; any other type is itself."""
        pg_type = self._types.get(oid)
        while pg_type is not None and pg_type.kind is Kind.DOMAIN:
            oid = pg_type.base
            pg_type = self._types.get(oid)
        return oid

    def name(self, oid: int) -> str:
        """Name a type for people, and for what stands after ``::``."""
        pg_type = self._types.get(oid)
        if pg_type is None:
            return f"unknown (OID {oid})"
        return pg_type.sql_name or _qualified(pg_type)

    def load(self, oid: int, raw: msgspec.Raw) -> Any:
        """Return the object that a psycopg ``SELECT`` gives; see the class for the exceptions.

        Raises:
            DecodeError: it is not what wal2json writes for the type.
        """
        convert = self._loads.get(oid)
        if convert is None:
            convert = self._loads[oid] = self._loader(self.resolve(oid))
        try:
            return convert(raw)
        except (ValueError, ArithmeticError):  # decimal raises the latter
            raise self._undecodable(oid, raw) from None

    def to_json(self, oid: int, raw: msgspec.Raw) -> bytes:
        """Return the JSON that ``to_jsonb`` gives, on one line.

        Raises:
            DecodeError: it is not what wal2json writes for the type.
        """
        convert = self._jsons.get(oid)
        if convert is None:
            convert = self._jsons[oid] = self._json(oid)
        scalar = bytes(raw)
        if scalar[:1] in _NOT_SCALAR:
            raise self._undecodable(oid, raw)
        try:
            return convert(scalar)
        except (ValueError, ArithmeticError):
            raise self._undecodable(oid, raw) from None

    def text(self, oid: int, raw: msgspec.Raw) -> str | None:
        """Return what the type's output function prints; None for null.

        Raises:
            DecodeError: it is not what wal2json writes for the type.
        """
        convert = self._texts.get(oid)
        if convert is None:
            convert = self._texts[oid] = self.text_of(oid)
        try:
            text: str | None = convert(raw)
        except (ValueError, ArithmeticError):
            raise self._undecodable(oid, raw) from None
        return text

    def text_of(self, oid: int) -> Callable[[msgspec.Raw], str | None]:
        """Return what `text` calls for a type; it raises `ValueError`."""
        resolved = self.resolve(oid)
        if resolved == BYTEA_OID:
            return _bytea_text
        if resolved in _BARE or resolved not in self._types:
            return scalar_text
        return _decode_text

    def supports(self, oid: int) -> frozenset[Support]:
        """Tell what can be compared, and is compared as PostgreSQL does."""
        pg_type = self._types.get(self.resolve(oid))
        if pg_type is None:
            return _NOTHING
        match pg_type.kind:
            case Kind.ARRAY | Kind.RANGE | Kind.MULTIRANGE:
                return self.supports(pg_type.element)
            case Kind.COMPOSITE:
                parts = (self.supports(typeoid) for _, typeoid in pg_type.attributes)
                return frozenset(Support).intersection(*parts)
            case Kind.ENUM:
                return frozenset(Support)
            case _:
                return _supports_base(pg_type)

    def comparable(self, oid: int) -> ToKey:
        """Return the function from output text to a key that compares as PostgreSQL does.

        Null has no key. Keys of one type are hashable; they have an order if the type `supports`
        one. The function raises `UnknownLabel` for a label that an enum did not have when the
        function was made, and `ValueError` for a text of another type.

        Raises:
            FilterError: the type has no equality in PostgreSQL, or none that is known here.
        """
        resolved = self.resolve(oid)
        pg_type = self._types.get(resolved)
        if pg_type is None or not self.supports(resolved):
            raise FilterError(
                f"values of type {self.name(oid)} cannot be compared",
                hint="operators for every type: is.null, is.not_null",
            )
        return self._comparable(pg_type)

    def key_of(self, oid: int) -> RawTo:
        """Return the function from a value to its key: `comparable` after `text`; None for null.

        Raises:
            FilterError: as `comparable`.
        """
        to_key = self.comparable(oid)
        resolved = self.resolve(oid)
        if resolved in _KEY_SHORTCUTS:
            return _KEY_SHORTCUTS[resolved]
        text_of = self.text_of(resolved)
        if to_key is comparables.identical:
            return text_of

        def key(raw: msgspec.Raw) -> Any:
            text = text_of(raw)
            return None if text is None else to_key(text)

        return key

    def _loader(self, oid: int) -> RawTo:
        if oid in _LOAD_SHORTCUTS:
            return _LOAD_SHORTCUTS[oid]
        text_of = self.text_of(oid)
        load_text = self._text_to_object(oid)

        def load(raw: msgspec.Raw) -> Any:
            text = text_of(raw)
            return None if text is None else load_text(text)

        return load

    def _text_to_object(self, oid: int) -> Callable[[str], Any]:
        oid = self.resolve(oid)
        if oid in _PLAIN_TEXTS:
            return comparables.identical
        load_bytes = self._text_loader(oid)
        load_parts = self._parts_loader(oid)

        def load(text: str) -> Any:
            try:
                return load_bytes(text.encode())
            except (ValueError, TypeError, RecursionError):
                return load_parts(text)

        return load

    def _parts_loader(self, oid: int) -> Callable[[str], Any]:
        """Load a value that psycopg cannot load as a whole; of base types the text remains."""
        pg_type = self._types.get(oid)
        if pg_type is not None and pg_type.kind is Kind.ARRAY:
            return self._array_loader(pg_type)
        if pg_type is not None and pg_type.kind is Kind.COMPOSITE:
            return self._composite_loader(pg_type)
        return comparables.identical

    def _array_loader(self, pg_type: PgType) -> Callable[[str], Any]:
        load_element = self._text_to_object(pg_type.element)

        def load_items(items: list[Any]) -> list[Any]:
            return [load_item(item) for item in items]

        def load_item(item: Any) -> Any:
            if isinstance(item, list):
                return load_items(item)
            return None if item is None else load_element(item)

        return lambda text: load_items(parse_items(text, pg_type.delimiter))

    def _composite_loader(self, pg_type: PgType) -> Callable[[str], Any]:
        loaders = [self._text_to_object(typeoid) for _, typeoid in pg_type.attributes]
        names = [_identifier(name) for name, _ in pg_type.attributes]
        cls: Any = namedtuple(_class_name(pg_type.name), names, rename=True)  # type: ignore[misc]  # noqa: PYI024 - known at run time only

        def load(text: str) -> Any:
            fields = _fields(text, pg_type)
            if fields is None:
                return text
            pairs = zip(loaders, fields, strict=True)
            return cls(*[None if field is None else one(field) for one, field in pairs])

        return load

    def _json(self, oid: int) -> _JsonToJson:
        resolved = self.resolve(oid)
        if resolved in _JSONS:
            return _JSONS[resolved]
        pg_type = self._types.get(resolved)
        if pg_type is None:
            return _pass
        if pg_type.kind is Kind.ARRAY:
            return self._array_json(pg_type)
        if pg_type.kind is Kind.COMPOSITE:
            return self._composite_json(pg_type)
        # What another type's cast to json makes of it only the server knows.
        return _hstore_json if pg_type.json_cast and pg_type.name == "hstore" else _pass

    def _array_json(self, pg_type: PgType) -> _JsonToJson:
        delimiter = pg_type.delimiter
        element_json = self._json(pg_type.element)

        def items_json(items: list[Any]) -> bytes:
            return b"[%b]" % b",".join([item_json(item) for item in items])

        def item_json(item: Any) -> bytes:
            return items_json(item) if isinstance(item, list) else element_json(_encode(item))

        def to_json(scalar: bytes) -> bytes:
            text = _decode_text(scalar)
            return b"null" if text is None else items_json(parse_items(text, delimiter))

        return to_json

    def _composite_json(self, pg_type: PgType) -> _JsonToJson:
        names = [_encode(name) for name, _ in pg_type.attributes]
        values = [self._json(typeoid) for _, typeoid in pg_type.attributes]

        def to_json(scalar: bytes) -> bytes:
            text = _decode_text(scalar)
            fields = None if text is None else _fields(text, pg_type)
            if fields is None:
                return scalar
            members = zip(names, values, fields, strict=True)
            return b"{%b}" % b",".join(
                [b"%b:%b" % (name, value(_encode(field))) for name, value, field in members]
            )

        return to_json

    def _comparable(self, pg_type: PgType) -> ToKey:
        match pg_type.kind:
            case Kind.ARRAY:
                return _array_key(self.comparable(pg_type.element), pg_type.delimiter)
            case Kind.COMPOSITE:
                return _composite_key(
                    [self.comparable(typeoid) for _, typeoid in pg_type.attributes], pg_type
                )
            case Kind.RANGE:
                return _range_key(self.comparable(pg_type.element))
            case Kind.MULTIRANGE:
                return _multirange_key(self.comparable(pg_type.element))
            case Kind.ENUM:
                return _enum_key(pg_type)
            case _:
                return _base_key(pg_type)

    def _undecodable(self, oid: int, raw: msgspec.Raw) -> DecodeError:
        return DecodeError(
            f"a value of {len(bytes(raw))} bytes is not what wal2json writes for type"
            f" {self.name(oid)}",
            hint="the slot was not moved; the position in the log names the transaction",
        )


def scalar_text(raw: msgspec.Raw | bytes) -> str | None:
    """Return the text in a JSON scalar: numbers keep their digits, bools are ``t`` and ``f``.

    Raises:
        ValueError: it is an array, an object, or no JSON.
    """
    scalar = bytes(raw)
    first = scalar[:1]
    if first == b'"':
        return _decode_text(scalar)
    if first in _NUMBER_STARTS:
        return scalar.decode()
    if scalar in _WORDS:
        return _WORDS[scalar]
    raise ValueError("not a JSON scalar")


def _load_bool(raw: msgspec.Raw) -> bool | None:
    scalar = bytes(raw)
    if scalar not in _BOOLS:
        raise ValueError("not a bool")
    return _BOOLS[scalar]


def _load_int(raw: msgspec.Raw) -> int | None:
    value = _decode_int(raw)
    return int(value) if isinstance(value, str) else value


def _load_float(raw: msgspec.Raw) -> float | None:
    # 0 may be the decoder's reading of -0, and a string may be NaN or Infinity.
    value = _decode_float(raw)
    if isinstance(value, str):
        return float(value)
    return value or (None if value is None else float(bytes(raw)))


def _float_key(raw: msgspec.Raw) -> Any:
    value = _decode_float(raw)
    return comparables.floating(value) if isinstance(value, str) else value


def _bytea_text(raw: msgspec.Raw) -> str | None:
    text = _decode_text(raw)
    return text if text is None or text.startswith("\\x") else "\\x" + text


def _pass(scalar: bytes) -> bytes:
    return scalar


def _bool_json(scalar: bytes) -> bytes:
    return _BOOL_JSONS.get(scalar, scalar)


def _number_json(scalar: bytes) -> bytes:
    """NaN and the infinities stay strings."""
    return scalar[1:-1] if scalar[-2:-1].isdigit() and scalar[:1] == b'"' else scalar


def _oid_json(scalar: bytes) -> bytes:
    return b'"%b"' % scalar if scalar.isdigit() else scalar


def _bytea_json(scalar: bytes) -> bytes:
    if scalar == b"null" or scalar.startswith(b'"\\\\x'):
        return scalar
    return b'"\\\\x' + scalar[1:]


def _timestamp_json(scalar: bytes) -> bytes:
    return scalar.replace(b" ", b"T", 1)


def _timestamptz_json(scalar: bytes) -> bytes:
    if scalar.endswith(b'+00"'):
        return scalar.replace(b" ", b"T", 1)[:-1] + b':00"'
    return scalar.replace(b" ", b"T", 1).replace(b"+00 BC", b"+00:00 BC")


def _json_json(scalar: bytes) -> bytes:
    """A line end can only stand between tokens: strings escape it."""
    text = _decode_text(scalar)
    return b"null" if text is None else text.replace("\n", " ").replace("\r", " ").encode()


def _vector_json(scalar: bytes) -> bytes:
    text = _decode_text(scalar)
    return b"null" if text is None else b"[%b]" % ",".join(text.split()).encode()


def _oidvector_json(scalar: bytes) -> bytes:
    text = _decode_text(scalar)
    return b"null" if text is None else _encode(text.split())


def _hstore_json(scalar: bytes) -> bytes:
    text = _decode_text(scalar)
    return b"null" if text is None else _encode(parse_hstore(text))


def _fields(text: str, pg_type: PgType) -> list[str | None] | None:
    """Read a composite's attributes; None when it has more than its type, which has changed since.

    Attributes that were added since are null, as PostgreSQL reads its own old rows.
    """
    count = len(pg_type.attributes)
    fields = parse_composite(text) if count else []
    return None if len(fields) > count else [*fields, *[None] * (count - len(fields))]


def _class_name(name: str) -> str:
    """Make a class name of a type's; of attribute names, `namedtuple` replaces keywords itself."""
    identifier = _identifier(name)
    return f"{identifier}_" if iskeyword(identifier) else identifier


def _identifier(name: str) -> str:
    """Make a Python name as psycopg does for the named tuples of composites."""
    name = re.sub(r"\W|\A(?=\d)", "_", name)
    return f"f{name}" if name.startswith("_") else name


def _supports_base(pg_type: PgType) -> frozenset[Support]:
    comparable = _comparable_base(pg_type)
    return _NOTHING if comparable is None else comparable[1]


def _base_key(pg_type: PgType) -> ToKey:
    comparable = _comparable_base(pg_type)
    assert comparable is not None  # noqa: S101 - `supports` was asked before
    return comparable[0]


def _comparable_base(pg_type: PgType) -> tuple[ToKey, frozenset[Support]] | None:
    return (_COMPARABLES if pg_type.oid in _BUILT_IN else _EXTENSIONS).get(pg_type.name)


def _enum_key(pg_type: PgType) -> ToKey:
    positions = {label: position for position, label in enumerate(pg_type.labels)}

    def to_key(label: str) -> int:
        if label not in positions:
            raise UnknownLabel(pg_type.oid)
        return positions[label]

    return to_key


def _array_key(to_key: ToKey, delimiter: str) -> ToKey:
    """Sort by elements, null last, then by their number, then by the shape (``array_cmp``)."""
    element_key = _nulls_last(to_key)

    def key(text: str) -> Any:
        array = parse_array(text, delimiter)
        elements = tuple(element_key(item) for item in _flat(array.items))
        return elements, len(array.dimensions), array.dimensions, array.lower_bounds

    return key


def _flat(items: list[Any]) -> Iterable[str | None]:
    for item in items:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


def _composite_key(to_keys: Sequence[ToKey], pg_type: PgType) -> ToKey:
    """Sort by one attribute after the other, null last (``record_cmp``)."""
    attribute_keys = [_nulls_last(to_key) for to_key in to_keys]

    def key(text: str) -> Any:
        fields = _fields(text, pg_type)
        if fields is None:
            raise ValueError("more attributes than the type has")
        pairs = zip(attribute_keys, fields, strict=True)
        return tuple(attribute_key(field) for attribute_key, field in pairs)

    return key


def _nulls_last(to_key: ToKey) -> Callable[[str | None], Any]:
    return lambda text: (1,) if text is None else (0, to_key(text))


def _range_key(to_key: ToKey) -> ToKey:
    """Sort the empty range first, then by lower bound, then by upper bound (``range_cmp``)."""

    def key(text: str) -> Any:
        one = parse_range(text)
        return () if one is None else _bounds_key(one, to_key)

    return key


def _multirange_key(to_key: ToKey) -> ToKey:
    """Sort by one range after the other (``multirange_cmp``)."""
    return lambda text: tuple(_bounds_key(one, to_key) for one in parse_multirange(text))


def _bounds_key(one: Range, to_key: ToKey) -> Any:
    """An inclusive lower bound comes before an exclusive one, of upper bounds after it."""
    lower: Any = (0,) if one.lower is None else (1, to_key(one.lower), not one.lower_inclusive)
    upper: Any = (1,) if one.upper is None else (0, to_key(one.upper), one.upper_inclusive)
    return lower, upper


def _qualified(pg_type: PgType) -> str:
    return ".".join('"' + part.replace('"', '""') + '"' for part in (pg_type.schema, pg_type.name))


def _built_in() -> dict[int, PgType]:
    """Make the built-in types and their arrays from the table below."""
    types = []
    for oid, array, name, kind, element in _built_in_rows():
        delimiter = ";" if name == "box" else ","
        types.append(PgType(oid, name, kind=kind, element=element, delimiter=delimiter))
        types.append(PgType(array, f"_{name}", kind=Kind.ARRAY, element=oid, delimiter=delimiter))
    return {pg_type.oid: pg_type for pg_type in types}


def _built_in_rows() -> Iterable[tuple[int, int, str, Kind, int]]:
    for row in _BASE_TYPES.split(";"):
        name, base, base_array = row.split()
        yield int(base), int(base_array), name, Kind.BASE, 0
    for name, subtype, oid, array, multirange, multirange_array in _RANGES:
        yield oid, array, f"{name}range", Kind.RANGE, subtype
        yield multirange, multirange_array, f"{name}multirange", Kind.MULTIRANGE, subtype


# Name, OID and OID of the array (src/include/catalog/pg_type.dat). They never change.
_BASE_TYPES: Final = """
    bool 16 1000; bytea 17 1001; char 18 1002; name 19 1003; int8 20 1016; int2 21 1005;
    int2vector 22 1006; int4 23 1007; regproc 24 1008; text 25 1009; oid 26 1028; tid 27 1010;
    xid 28 1011; cid 29 1012; oidvector 30 1013; json 114 199; xml 142 143; point 600 1017;
    lseg 601 1018; path 602 1019; box 603 1020; polygon 604 1027; line 628 629; cidr 650 651;
    float4 700 1021; float8 701 1022; circle 718 719; macaddr8 774 775; money 790 791;
    macaddr 829 1040; inet 869 1041; aclitem 1033 1034; bpchar 1042 1014; varchar 1043 1015;
    date 1082 1182; time 1083 1183; timestamp 1114 1115; timestamptz 1184 1185;
    interval 1186 1187; timetz 1266 1270; bit 1560 1561; varbit 1562 1563; numeric 1700 1231;
    refcursor 1790 2201; regprocedure 2202 2207; regoper 2203 2208; regoperator 2204 2209;
    regclass 2205 2210; regtype 2206 2211; record 2249 2287; uuid 2950 2951;
    txid_snapshot 2970 2949; pg_lsn 3220 3221; tsvector 3614 3643; tsquery 3615 3645;
    gtsvector 3642 3644; regconfig 3734 3735; regdictionary 3769 3770; jsonb 3802 3807;
    jsonpath 4072 4073; regnamespace 4089 4090; regrole 4096 4097; regcollation 4191 4192;
    pg_snapshot 5038 5039; xid8 5069 271
"""

# Name without "range", subtype, then OID and OID of the array, of range and multirange.
_RANGES: Final = (
    ("int4", 23, 3904, 3905, 4451, 6150),
    ("num", 1700, 3906, 3907, 4532, 6151),
    ("ts", 1114, 3908, 3909, 4533, 6152),
    ("tstz", 1184, 3910, 3911, 4534, 6153),
    ("date", 1082, 3912, 3913, 4535, 6155),
    ("int8", 20, 3926, 3927, 4536, 6157),
)

_BUILT_IN: Final = _built_in()
_OID: Final = {pg_type.name: oid for oid, pg_type in _BUILT_IN.items()}


def _by_oid(by_names: dict[str, Any]) -> dict[int, Any]:
    """Give every name of a space-separated list its entry."""
    return {_OID[name]: entry for names, entry in by_names.items() for name in names.split()}


_JsonToJson = Callable[[bytes], bytes]

_Scalar = msgspec.Raw | bytes
_decode_text: Final[Callable[[_Scalar], str | None]] = msgspec.json.Decoder(str | None).decode
_decode_int: Final[Callable[[_Scalar], int | str | None]] = msgspec.json.Decoder(
    int | str | None
).decode
_decode_float: Final[Callable[[_Scalar], float | str | None]] = msgspec.json.Decoder(
    float | str | None
).decode
_encode: Final = msgspec.json.Encoder().encode

_NOT_SCALAR: Final = frozenset({b"", b"[", b"{"})
_NUMBER_STARTS: Final = frozenset(b"-0123456789"[place : place + 1] for place in range(11))
_WORDS: Final = {b"null": None, b"true": "t", b"false": "f"}
_BOOLS: Final = {b"true": True, b"false": False, b'"t"': True, b'"f"': False, b"null": None}

_BOOL_JSONS: Final = {b'"t"': b"true", b'"f"': b"false"}

_BARE: Final = _by_oid({"bool int2 int4 int8 oid float4 float8 numeric": True})
_PLAIN_TEXTS: Final = _by_oid({"text varchar bpchar name": True})

_LOAD_SHORTCUTS: Final[dict[int, RawTo]] = _by_oid(
    {
        "bool": _load_bool,
        "int2 int4 int8 oid": _load_int,
        "float4 float8": _load_float,
        "text varchar bpchar name": _decode_text,
    }
)
"""Types whose psycopg loader gives what JSON already has."""

_KEY_SHORTCUTS: Final[dict[int, RawTo]] = _by_oid(
    {"bool": _load_bool, "int2 int4 int8 oid": _load_int, "float4 float8": _float_key}
)

_JSONS: Final[dict[int, _JsonToJson]] = _by_oid(
    {
        "bool": _bool_json,
        "int2 int4 int8 float4 float8 numeric": _number_json,
        "oid": _oid_json,
        "bytea": _bytea_json,
        "timestamp": _timestamp_json,
        "timestamptz": _timestamptz_json,
        "json jsonb": _json_json,
        "int2vector": _vector_json,
        "oidvector": _oidvector_json,
    }
)
"""From a value as a JSON scalar to the JSON of ``to_jsonb``; other base types pass as they are."""

_NOTHING: Final[frozenset[Support]] = frozenset()
_EQUALITY: Final = frozenset({Support.EQUALITY})
_ORDER: Final = frozenset({Support.EQUALITY, Support.ORDER})

_COMPARABLES: Final[dict[str, tuple[ToKey, frozenset[Support]]]] = {
    "bool": (comparables.boolean, _ORDER),
    "int2": (int, _ORDER),
    "int4": (int, _ORDER),
    "int8": (int, _ORDER),
    "oid": (int, _ORDER),
    "xid8": (int, _ORDER),
    "float4": (comparables.floating, _ORDER),
    "float8": (comparables.floating, _ORDER),
    "numeric": (comparables.numeric, _ORDER),
    "money": (comparables.money, _ORDER),
    "text": (comparables.identical, _ORDER),
    "varchar": (comparables.identical, _ORDER),
    "name": (comparables.identical, _ORDER),
    "bpchar": (comparables.blank_padded, _ORDER),
    "char": (comparables.single_byte, _ORDER),
    "uuid": (comparables.identical, _ORDER),
    "bytea": (comparables.identical, _ORDER),
    "bit": (comparables.identical, _ORDER),
    "varbit": (comparables.identical, _ORDER),
    "macaddr": (comparables.identical, _ORDER),
    "macaddr8": (comparables.identical, _ORDER),
    "inet": (comparables.network, _ORDER),
    "cidr": (comparables.network, _ORDER),
    "date": (comparables.date, _ORDER),
    "timestamp": (comparables.date, _ORDER),
    "timestamptz": (comparables.timestamptz, _ORDER),
    "time": (comparables.identical, _ORDER),
    "timetz": (comparables.timetz, _ORDER),
    "interval": (comparables.interval, _ORDER),
    "pg_lsn": (comparables.log_sequence_number, _ORDER),
    "tid": (comparables.tuple_identifier, _ORDER),
    "jsonb": (comparables.jsonb, _EQUALITY),
    "tsvector": (comparables.identical, _EQUALITY),
    "xid": (comparables.identical, _EQUALITY),
    "cid": (comparables.identical, _EQUALITY),
}

_EXTENSIONS: Final[dict[str, tuple[ToKey, frozenset[Support]]]] = {
    "citext": (comparables.fold, _ORDER),
    "hstore": (comparables.identical, _EQUALITY),
}
"""Types of extensions, which have no OID of their own."""
