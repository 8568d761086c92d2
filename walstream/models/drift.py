"""What has become different between a file of models and the database, in words.

Both sides are Python source, the file and what would be written now: what the file does not say is
not compared.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Final

import msgspec

from walstream.models.annotations import ENUM
from walstream.models.source import TITLE

_SKIP: Final = "  # fmt: skip"


class Difference(msgspec.Struct, frozen=True):
    """One difference: what kind of thing it is, where, and what happened to it."""

    kind: str
    place: str
    what: str

    def __str__(self) -> str:
        """Print as one line."""
        return f"{self.place}: {self.what}"


class _Field(msgspec.Struct, frozen=True):
    """A column, an attribute, or an enum's label; ``sql_type`` is what stands behind it."""

    name: str
    annotation: frozenset[str] = frozenset()
    sql_type: str = ""
    comment: str = ""


class _Class(msgspec.Struct, frozen=True):
    kind: str
    comment: str
    fields: tuple[_Field, ...]


def differences(before: str, after: str) -> list[Difference]:
    """Compare the source of a file with what would be written now.

    A last resort says that the texts differ where nothing else does.
    """
    if before == after:
        return []
    try:
        old, new = _classes(before), _classes(after)
    except (SyntaxError, tokenize.TokenError):
        return [Difference("text", "the file", "is not Python any more")]
    found = list(_compared(old, new))
    return found or [Difference("text", "the file", "was edited, or written by another version")]


def _compared(old: dict[str, _Class], new: dict[str, _Class]) -> Iterator[Difference]:
    for place, cls in old.items():
        if place not in new:
            yield Difference(cls.kind.lower(), place, f"{_article(cls)} is gone, or not used")
    for place, cls in new.items():
        if place not in old:
            yield Difference(cls.kind.lower(), place, f"{_article(cls)} is new")
        else:
            yield from _of_class(place, old[place], cls)


def _article(cls: _Class) -> str:
    return f"the {cls.kind.lower()}"


def _of_class(place: str, old: _Class, new: _Class) -> Iterator[Difference]:
    if old.comment != new.comment:
        yield Difference("comment", place, "its comment changed")
    noun = {"Table": "column", "Composite": "attribute", ENUM: "label"}[old.kind]
    before, after = [one.name for one in old.fields], [one.name for one in new.fields]
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    for tag, start, end, new_start, new_end in matcher.get_opcodes():
        dropped, added = old.fields[start:end], new.fields[new_start:new_end]
        if tag != "equal":
            yield from _replaced(place, noun, dropped, added)
            continue
        for one, other in zip(dropped, added, strict=True):
            yield from _of_field(place, noun, one, other)


def _replaced(
    place: str, noun: str, dropped: Sequence[_Field], added: Sequence[_Field]
) -> Iterator[Difference]:
    """Tell what went and what came; a pair of one type in one place may be one with a new name."""
    pairs = min(len(dropped), len(added))
    for old, new in zip(dropped, added, strict=False):
        if old.sql_type == new.sql_type:
            what = f"{noun} {_told(old)} dropped, {_told(new)} added: perhaps renamed"
            yield Difference(noun, place, what)
        else:
            yield Difference(noun, place, f"{noun} {_told(old)} dropped")
            yield Difference(noun, place, f"{noun} {_told(new)} added")
    for old in dropped[pairs:]:
        yield Difference(noun, place, f"{noun} {_told(old)} dropped")
    for new in added[pairs:]:
        yield Difference(noun, place, f"{noun} {_told(new)} added")


def _told(field: _Field) -> str:
    return f"{field.name!r} ({field.sql_type})" if field.sql_type else repr(field.name)


def _of_field(place: str, noun: str, old: _Field, new: _Field) -> Iterator[Difference]:
    whats = list(_whats(old, new))
    if old.comment != new.comment:
        whats.append("its comment changed")
    for what in whats:
        yield Difference(noun, place, f"{noun} {old.name!r}: {what}")


def _whats(old: _Field, new: _Field) -> Iterator[str]:
    if old.sql_type != new.sql_type:
        yield f"retyped from {old.sql_type or 'nothing known'} to {new.sql_type}"
    gone, come = old.annotation - new.annotation, new.annotation - old.annotation
    if "None" in gone:
        yield "is NOT NULL now"
    if "None" in come:
        yield "can be null now"
    if "Unchanged" in gone:
        yield "is always sent now"
    if "Unchanged" in come:
        yield "can come as UNCHANGED now"
    others = (gone | come) - {"None", "Unchanged"}
    if others and old.sql_type == new.sql_type:
        yield f"annotated {_union(old)}, would be {_union(new)}"


def _union(field: _Field) -> str:
    return " | ".join(sorted(field.annotation))


def _classes(source: str) -> dict[str, _Class]:
    comments = _comments(source)
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and (named := _named(node)):
            kind, place, comment = named
            found[place] = _Class(kind, comment, tuple(_fields(node, comments)))
    return found


def _named(node: ast.ClassDef) -> tuple[str, str, str] | None:
    first, _, rest = (ast.get_docstring(node) or "").partition("\n")
    matched = TITLE.fullmatch(first)
    return (matched[1], matched[2], rest.strip()) if matched else None


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: token.string.removeprefix("# ").removesuffix(_SKIP)
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _fields(node: ast.ClassDef, comments: dict[int, str]) -> Iterator[_Field]:
    following = [*node.body[1:], None]
    for statement, after in zip(node.body, following, strict=True):
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
                parts = frozenset(map(ast.unparse, _parts(annotation)))
                comment = comments.get(statement.lineno, "")
                yield _Field(_alias(value) or name, parts, comment, _text(after))
            case ast.Assign(value=ast.Constant(value=str(label))):
                yield _Field(label)


def _parts(annotation: ast.expr) -> Iterator[ast.expr]:
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        yield from _parts(annotation.left)
        yield from _parts(annotation.right)
    else:
        yield annotation


def _alias(value: ast.expr | None) -> str:
    match value:
        case ast.Call(keywords=[ast.keyword(arg="alias", value=ast.Constant(value=str(alias)))]):
            return alias
    return ""


def _text(statement: ast.stmt | None) -> str:
    match statement:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return text
    return ""
