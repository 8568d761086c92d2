"""``walstream config``: what is shown is what counts, but secrets; the schema says the same."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, get_args

import pytest
from pydantic import BaseModel, SecretStr
from typer.testing import CliRunner

from tests.test_documents import ROOT, blocks
from walstream import config
from walstream.cli import app
from walstream.cli.configuring import json_schema
from walstream.config import Config
from walstream.errors import ConfigError

SECRET: Final = "whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0"  # noqa: S105 - that is the point

EVERYTHING: Final = f"""
[postgres]
dsn = "postgresql://walstream:{SECRET}@db.example.org/app"
replication_dsn = "host=db.example.org password={SECRET}"
application_name = "a \\"quoted\\" naïve\\tname\\u007f"

[slot]
name = "billing"

[retained_wal]
stop_at_bytes = "50GB"

[[routes]]
name = "orders"
table = "public.orders"
operations = ["insert", "update"]
where = "status=eq.active"
columns = {{ exclude = ["notes"], mask = {{ "e-mail address" = "keep-last-4", name = "hash" }} }}
to = "to the web"

[[routes]]
table = "audit.*"
to = "lines"

[sinks."to the web"]
type = "webhook"
url = "https://user:{SECRET}@hooks.example.org/{SECRET}"
headers = {{ Authorization = "Bearer {SECRET}" }}
secret = ["{SECRET}", "{SECRET}"]
proxy = "http://user:{SECRET}@proxy.example.org"
max_request_bytes = "2MB"

[sinks.lines]
type = "file"
path = "lines.jsonl"

[dead_letters]
dsn = "postgresql://walstream:{SECRET}@db.example.org/app"

[masking]
key = "{SECRET}"

[stream]
drain_seconds = 7
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["config", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def secret_keys(model: type[BaseModel]) -> set[str]:
    """The keys of a model, and of those inside of it, that hold secrets."""
    found = set()
    for name, field in model.model_fields.items():
        for kind in _kinds(field.annotation):
            if kind is SecretStr:
                found.add(name)
            elif inspect.isclass(kind) and issubclass(kind, BaseModel):
                found |= secret_keys(kind)
    return found


def _kinds(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _kinds(argument)


def test_what_is_shown_is_what_counts(folder: Path) -> None:
    (folder / "walstream.toml").write_text(EVERYTHING)
    settings = config.load()
    content = tomllib.loads(shown("show"))
    full = json.loads(shown("show", "--json"), object_hook=without_none)
    assert full == {**content, "routes": full["routes"], "sinks": full["sinks"]}
    assert (content["slot"]["name"], content["slot"]["create"]) == ("billing", False)
    assert content["retained_wal"]["stop_at_bytes"] == 50 << 30
    assert content["postgres"]["application_name"] == settings.postgres.application_name
    assert [route["table"] for route in content["routes"]] == ["public.orders", "audit.*"]
    assert content["sinks"]["to the web"]["max_request_bytes"] == 2 << 20
    assert content["sinks"]["lines"] == {"type": "file", "path": "lines.jsonl"}
    assert full["sinks"]["lines"]["fsync"] == "always"
    assert '# fsync = "always"  # default' in shown("show").splitlines()


def without_none(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if value is not None}


def test_what_is_shown_can_be_read_again(folder: Path) -> None:
    (folder / "other.toml").write_text(
        re.sub(r".*whsec_.*\n", "", EVERYTHING)
        .replace("webhook", "stdout")
        .replace('max_request_bytes = "2MB"', "")
        .replace(', name = "hash"', "")
    )
    settings = config.load(folder / "other.toml")
    again = config.parse(tomllib.loads(shown("show", "-c", "other.toml")))
    assert again == settings


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_no_secret_is_shown(folder: Path, form: tuple[str, ...]) -> None:
    (folder / "walstream.toml").write_text(EVERYTHING)
    content = json.loads(shown("show", "--json"))
    given = {key: value for section in content.values() for key, value in _leaves(section)}
    hidden = {key for key, value in given.items() if value in ("***", ["***", "***"])}
    assert hidden - {"Authorization"} | {"headers"} == secret_keys(Config)
    text = shown("show", *form)
    assert SECRET not in text
    assert "c2VjcmV0" not in text


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, name)
    elif value is not None:
        yield key, value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("WALSTREAM_POSTGRES_DSN", f"host=h password={SECRET}"),
        ("WALSTREAM_POSTGRES_DSN_FILE", f"postgresql://a:{SECRET}@h/app"),
        ("WALSTREAM_MASKING_KEY_FILE", SECRET),
        ("WALSTREAM_MASKING", json.dumps({"key": SECRET})),
    ],
)
def test_no_secret_of_the_environment_is_shown(
    monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    monkeypatch.setenv(key, value)
    assert "***" in shown("show")
    assert SECRET not in shown("show") + shown("show", "--json")


def test_it_is_told_where_a_value_comes_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "walstream.toml").write_text('[slot]\nname = "billing"\ncreate = true')
    monkeypatch.setenv("WALSTREAM_SLOT_NAME", "other")
    monkeypatch.setenv("walstream_log", '{"level": "debug"}')
    lines = shown("show").splitlines()
    assert lines[0] == "# walstream.toml, and the environment"
    assert 'name = "other"  # WALSTREAM_SLOT_NAME' in lines
    assert "create = true  # walstream.toml" in lines
    assert "failover = false  # default" in lines
    assert "# heartbeat_seconds is not set" in lines
    assert 'level = "debug"  # WALSTREAM_LOG' in lines
    assert 'format = "auto"  # default' in lines


def test_without_any_file_the_defaults_are_shown() -> None:
    assert shown("show").startswith("# no file, and the environment\n")
    assert config.parse(tomllib.loads(shown("show"))) == config.parse({})


def test_mistakes_are_told_instead(folder: Path) -> None:
    (folder / "walstream.toml").write_text("[slot]\nnames = 1")
    with pytest.raises(ConfigError, match=r"slot\.names: is not a key"):
        CliRunner().invoke(app, ["config", "show"], catch_exceptions=False)


# ---- The schema


def test_the_schema_is_printed() -> None:
    assert json.loads(shown("schema")) == json_schema()
    assert json_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_the_schema_has_every_section_and_describes_it() -> None:
    made = json_schema()
    assert made["properties"].keys() == Config.model_fields.keys()
    for name, model in made["$defs"].items():
        assert model["description"], name
        assert "``" not in model["description"], name


def configurations() -> list[Any]:
    files = [*ROOT.glob("docker/**/*.toml"), *ROOT.glob("examples/**/walstream.toml")]
    return [
        *(pytest.param(block.text, id=block.place) for block in blocks("toml")),
        *(pytest.param(file.read_text(), id=str(file.relative_to(ROOT))) for file in files),
        pytest.param(EVERYTHING, id="everything"),
    ]


@pytest.mark.parametrize("text", configurations())
def test_the_schema_allows_what_walstream_does(text: str) -> None:
    assert list(mistakes(tomllib.loads(text))) == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[slots]", ".slots"),
        ("[slot]\nnames = 'x'", ".slot.names"),
        ("[slot]\nname = 'Upper'", ".slot.name"),
        ("[stream]\ndrain_seconds = 0", ".stream.drain_seconds"),
        ("[stream]\ndrain_seconds = 'long'", ".stream.drain_seconds"),
        ("[retained_wal]\nwarn_at_bytes = '5 gigabytes'", ".retained_wal.warn_at_bytes"),
        ("[[routes]]\nto = 'x'", ".routes[0]"),
        ("[[routes]]\ntable = 'a.b'\nto = 'x'\noperations = ['upsert']", ".routes[0].operations"),
        ("[sinks.x]\ntype = 'pigeon'", ".sinks.x"),
        ("[sinks.x]\ntype = 'stdout'\npath = 'x'", ".sinks.x"),
        ("[log]\nlevel = 'loud'", ".log.level"),
    ],
)
def test_the_schema_refuses_what_walstream_does(text: str, place: str) -> None:
    assert [found for found in mistakes(tomllib.loads(text)) if found.startswith(place)]
    with pytest.raises(ConfigError):
        config.parse(tomllib.loads(text))


def mistakes(value: Any) -> Iterator[str]:
    """The places of a configuration that the schema refuses; only the words that it uses count."""
    made = json_schema()
    yield from _mistakes(value, made, made["$defs"], "")


ANNOTATIONS: Final = {
    "$defs", "$schema", "default", "description", "discriminator", "format", "title", "writeOnly",
}  # fmt: skip
TYPES: Final[dict[str, tuple[type, ...]]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def _mistakes(  # noqa: C901, PLR0912 - a validator of JSON Schema, as far as needed
    value: Any, schema: Mapping[str, Any], models: Mapping[str, Any], place: str
) -> Iterator[str]:
    def fits(one: Mapping[str, Any]) -> bool:
        return not list(_mistakes(value, one, models, place))

    is_fine = True
    for word, said in sorted(schema.items(), key=lambda item: item[0] != "type"):
        match word:
            case "$ref":
                yield from _mistakes(value, models[said.removeprefix("#/$defs/")], models, place)
            case "properties":
                for key in value.keys() & said.keys():
                    yield from _mistakes(value[key], said[key], models, f"{place}.{key}")
            case "additionalProperties":
                for key in value.keys() - schema.get("properties", {}).keys():
                    if said is False:
                        yield f"{place}.{key}"
                    else:
                        yield from _mistakes(value[key], said, models, f"{place}.{key}")
            case "items" if isinstance(value, list):
                for index, item in enumerate(value):
                    yield from _mistakes(item, said, models, f"{place}[{index}]")
            case "items" | "prefixItems":
                pass
            case "type":
                is_bool = isinstance(value, bool) and said != "boolean"
                is_fine &= isinstance(value, TYPES[said]) and not is_bool
                if not is_fine:
                    break
            case "required":
                is_fine &= set(said) <= value.keys()
            case "enum":
                is_fine &= value in said
            case "const":
                is_fine &= value == said
            case "anyOf":
                is_fine &= any(map(fits, said))
            case "oneOf":
                is_fine &= sum(map(fits, said)) == 1
            case "pattern":
                is_fine &= re.search(said, value) is not None
            case "minimum":
                is_fine &= value >= said
            case "exclusiveMinimum":
                is_fine &= value > said
            case "minItems" | "minLength":
                is_fine &= len(value) >= said
            case "maxLength":
                is_fine &= len(value) <= said
            case _:
                assert word in ANNOTATIONS, word
    if not is_fine:
        yield place
