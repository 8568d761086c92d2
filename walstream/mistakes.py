"""The words for mistakes in a configuration: the key's path, what was found, what is allowed.

What was found is not shown where it may be a secret, also one that was put in the wrong place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

Location: TypeAlias = tuple[int | str, ...]

_SECRETS: Final = {
    "dsn",
    "dsn_file",
    "headers",
    "key",
    "proxy",
    "replication_dsn",
    "secret",
    "secret_file",
    "url",
}
_SECRET_SECTIONS: Final = {"postgres", "masking", "transactional"}
"""In the place of a whole section, or of a file's name, the secret itself may have been put."""

_LONGEST_PLAIN_NAME: Final = 20
_LIKE_SECRET: Final = re.compile(
    r"whsec_.*|postgres(ql)?:.*|.*password\s*=.*|\s*-----BEGIN.*", re.DOTALL
)

_ALLOWED: Final = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "path_type": "a path",
    "too_short": "at least one",
    "string_too_short": "at least one character",
    "string_too_long": "at most 63 characters",
}

_SLOT_NAMES: Final = "lower-case letters, digits and underscores, at most 63"

_PATTERNS: Final = {
    "slot.name": _SLOT_NAMES,
    "name": _SLOT_NAMES,  # by itself it is an option of the command line
    "handlers.app": "module:name, such as handlers:stream",
    "http.listen": "an address and a port, such as 127.0.0.1:8432",
}


def problem(detail: Any, *, keys: Callable[[Location], Iterable[str]], sinks: Iterable[str]) -> str:
    """Turn one of pydantic's errors into key path, what was found, and what is allowed.

    Args:
        detail: of the error.
        keys: returns those that are allowed at a place, of a sink behind its type.
        sinks: the types that sinks may have.
    """
    location = _location(detail["loc"])
    path = _path(location)
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "missing":
        return f"{path}: is missing"
    if kind == "extra_forbidden":
        return f"{path}: is not a key; allowed: {', '.join(keys(detail['loc'][:-1]))}"
    if kind == "value_error":
        return f"{path}: {context['error']}"
    if kind == "union_tag_not_found":
        return f"{path}.type: is missing; allowed: {_words(sinks)}"
    if kind == "union_tag_invalid":
        return f"{path}.type: found {context['tag']!r}; allowed: {_words(sinks)}"
    found = "a value" if _may_be_secret(location) else repr(detail["input"])
    return f"{path}: found {found}; allowed: {_allowed(path, kind, context, detail['msg'])}"


def shown_path(file: Path) -> str:
    """Return the name of a secret's file, unless it looks like the secret itself."""
    name = str(file)
    is_path = len(name) <= _LONGEST_PLAIN_NAME or name.startswith("/") or "." in name
    is_random = not is_path and re.search(r"\d", name) is not None  # in hex or base64
    if is_random or _LIKE_SECRET.fullmatch(name):
        return "a value that looks like the secret"
    return name


def _may_be_secret(location: Location) -> bool:
    if location[-1:] == ("application_name",) or location == ("key",):  # of a handler's lanes
        return False
    match location:
        case ("sinks",) | ("sinks", _) | ("dead_letters",) | ("access",):  # in place of all of it
            return True
    return location[0] in _SECRET_SECTIONS or not _SECRETS.isdisjoint(location)


def _allowed(path: str, kind: str, context: Mapping[str, Any], message: str) -> str:
    match kind:
        case "literal_error":
            return str(context["expected"])
        case "string_pattern_mismatch":
            return _PATTERNS.get(path, str(context["pattern"]))
        case "greater_than":
            return f"more than {context['gt']}"
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case _:
            return _ALLOWED.get(kind, message)


def _location(parts: Location) -> Location:
    """Leave out the type of a sink, which pydantic inserts behind its name."""
    has_tag = len(parts) > 2 and parts[0] == "sinks"  # noqa: PLR2004 - sinks, name, type
    return (*parts[:2], *parts[3:]) if has_tag else parts


def _words(words: Iterable[str]) -> str:
    """Write a list: 'a', 'b' or 'c'."""
    *others, last = [repr(word) for word in words]
    return f"{', '.join(others)} or {last}" if others else last


def _path(location: Location) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")
