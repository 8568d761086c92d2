"""``walstream config``: the configuration as walstream reads it, and its schema for editors."""

from __future__ import annotations

import json as as_json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from pydantic import SecretStr
from pydantic.json_schema import GenerateJsonSchema

from walstream import logs
from walstream.cli.options import ConfigFile, load_config, tell_ignored_environment
from walstream.config import DEFAULT_FILE, ENV_PREFIX, Config

app = typer.Typer(help="The configuration as walstream reads it.", no_args_is_help=True)

HIDDEN: Final = "***"
"""What is shown instead of a secret."""

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")

_MISPLACED: Final = re.compile(r"://|whsec_|password|-----BEGIN", re.IGNORECASE)
"""In the place of a file's name the secret itself may have been put."""


@app.command()
def show(
    config: ConfigFile = None,
    *,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show the configuration that counts: file, environment and defaults together, as TOML.

    Comments say where values come from. Secrets are shown as ***; files of secrets are not read.
    """
    settings = load_config(config, None)
    logs.configure("warning", settings.log.format)
    tell_ignored_environment()
    content = _shown(settings.model_dump(by_alias=True))
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(content)))
        return
    given = _shown(settings.model_dump(by_alias=True, exclude_unset=True))
    origins = _Origins(config if config or not DEFAULT_FILE.is_file() else DEFAULT_FILE)
    for line in _toml(content, given, origins):
        typer.echo(line)


@app.command()
def schema() -> None:
    """Print the JSON Schema (draft 2020-12) of walstream.toml, for editors.

    An editor that knows TOML (taplo) reads it when the file begins with
    [bold]#:schema ./walstream.schema.json[/].
    """
    typer.echo(as_json.dumps(json_schema(), indent=2))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file."""
    made = Config.model_json_schema(schema_generator=_Schema)
    return {"$schema": _DIALECT, **made, "title": "walstream.toml"}


class _Schema(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - pydantic's signature
        """Leave out titles that say the key once more."""
        return False

    def generate(self, schema: Any, mode: Any = "validation") -> dict[str, Any]:
        """Make descriptions plain text: they are docstrings, laid out for Python."""
        made = super().generate(schema, mode)
        for model in [made, *made.get("$defs", {}).values()]:
            if "description" in model:
                model["description"] = _plain(model["description"])
        return made


def _plain(text: str) -> str:
    paragraphs = text.replace("``", "`").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _shown(value: Any, key: str = "") -> Any:
    """Make of a value what TOML and JSON have, and of a secret what tells nothing."""
    match value:
        case SecretStr():
            return HIDDEN
        case Mapping():
            return {name: _shown(inner, name) for name, inner in value.items()}
        case list() | tuple():
            return [_shown(inner, key) for inner in value]
        case Path():
            return _shown(os.fsencode(value).decode(errors="replace"), key)
        case str() if key.endswith("_file") and _MISPLACED.search(value):
            return HIDDEN
        case _:
            return value


class _Origins:
    """Where the values of sections come from; the environment wins over the file."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._content = {} if file is None else tomllib.loads(file.read_text(encoding="utf-8"))
        self._variables = {name.upper(): value for name, value in os.environ.items()}

    def of(self, section: str, key: str) -> str:
        """Name the variable, the file, or the default."""
        whole = f"{ENV_PREFIX}{section}".upper()
        for variable in (f"{whole}_{key}".upper(), whole):
            value = self._variables.get(variable)
            if value is not None and (variable != whole or as_json.dumps(key) in value):
                return variable
        if key in self._content.get(section, {}):
            return str(self.file)
        return "default"


def _toml(content: Mapping[str, Any], given: Mapping[str, Any], origins: _Origins) -> Iterator[str]:
    """Lay the configuration out; what is not set is a comment, for TOML has no word for it."""
    yield f"# {origins.file or 'no file'}, and the environment"
    for section, values in content.items():
        match section:
            case "routes":
                for route, its_own in zip(values, given.get("routes", []), strict=True):
                    yield from ("", "[[routes]]", *_keys(route, its_own))
            case "sinks":
                for name, sink in values.items():
                    yield from ("", f"[sinks.{_key(name)}]", *_keys(sink, given["sinks"][name]))
            case _:
                yield from ("", f"[{section}]")
                for key, value in values.items():
                    if value is None:
                        yield f"# {key} is not set"
                    else:
                        yield f"{key} = {_value(value)}  # {origins.of(section, key)}"


def _keys(content: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """Lay out what was given; a default may be refused where it is given without another key."""
    yield from _pairs(given)
    defaults = {key: content[key] for key in content.keys() - given.keys()}
    for pair in sorted(_pairs(defaults)):
        yield f"# {pair}  # default"


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if value is not None:
            yield f"{_key(key)} = {_value(value)}"


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _value(name)


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            # JSON's escapes are TOML's, but that TOML does not want to see a DEL.
            return as_json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case Mapping():
            return f"{{ {', '.join(_pairs(value))} }}" if value else "{}"
        case list():
            return f"[{', '.join(map(_value, value))}]"
        case _:
            return str(value)
