"""The roles of the configuration, made once, and filled with the claims of whoever comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from walstream.access.readers import Grant, Persona, Reader, Sight
from walstream.access.refusals import forbidden
from walstream.changes import Relation
from walstream.config.access import AccessConfig, RoleConfig, TableConfig
from walstream.config.columns import ColumnsConfig
from walstream.errors import ConfigError
from walstream.placeholders import ClaimUnusable, RowCondition
from walstream.projection import Projection
from walstream.router import OWN_TABLES, TablePattern


class _Rule(msgspec.Struct, frozen=True, eq=False):
    """A table of a role; its condition may wait for claims."""

    pattern: TablePattern
    projection: Projection | None
    condition: RowCondition | None
    table: TableConfig


class _Projections:
    """Makes projections: equal rules share one, for sights are told apart by it."""

    def __init__(self, masking_key: bytes | None) -> None:
        self._masking_key = masking_key
        self._made: dict[str, Projection | None] = {}
        self.problems: list[str] = []

    def get(self, rules: ColumnsConfig, key: str) -> Projection | None:
        """Return what applies the rules; a problem is noted under their key."""
        text = rules.model_dump_json()
        try:
            if text not in self._made:
                self._made[text] = rules.projection(self._masking_key)
        except ValueError as error:
            self.problems.append(f"{key}: {error}")
            return None
        return self._made[text]


class Roles:
    """Makes readers of roles and claims."""

    def __init__(
        self,
        config: AccessConfig,
        masking_key: bytes | None,
        own_tables: frozenset[Relation] = OWN_TABLES,
    ) -> None:
        """Make the rules.

        Raises:
            ConfigError: a ``hash`` mask without a key.
        """
        self._config = config
        self._own_tables = own_tables
        projections = _Projections(masking_key)
        self._rules = {
            name: [
                _Rule(
                    TablePattern.parse(table.table),
                    projections.get(table.columns, f"access.roles.{name}.tables[{place}].columns"),
                    table.condition,
                    table,
                )
                for place, table in enumerate(role.tables)
            ]
            for name, role in config.roles.items()
        }
        if projections.problems:
            raise ConfigError(projections.problems, hint="set key, or key_file, under [masking]")

    def reader(
        self, role: str, claims: Mapping[str, Any], expires_at: float | None = None
    ) -> Reader:
        """Make a reader.

        Raises:
            ReaderRefused: there is no such role, or a claim that its conditions need is missing, or
                cannot be compared with.
        """
        section = self._config.roles.get(role)
        if section is None:
            raise forbidden("the token's role has no [access.roles.<name>]")
        return Reader(
            role=role,
            claims=claims,
            expires_at=expires_at,
            can_see_status=section.status,
            can_operate=section.operate,
            grants=self._grants(role, section, claims),
        )

    def _grants(
        self, role: str, section: RoleConfig, claims: Mapping[str, Any]
    ) -> tuple[Grant, ...]:
        rules = self._rules[role]
        persona = None
        if any(rule.table.rls for rule in rules):
            persona = _persona(section.postgres_role or role, claims)
        return tuple(self._grant(rule, claims, persona) for rule in rules)

    def _grant(self, rule: _Rule, claims: Mapping[str, Any], persona: Persona | None) -> Grant:
        try:
            where = None if rule.condition is None else rule.condition.fill(claims)
        except ClaimUnusable as error:
            hint = "the role's condition on rows needs it"
            raise forbidden(str(error), hint=hint) from None
        sight = Sight(
            str(rule.pattern),
            rule.projection,
            where,
            persona=persona if rule.table.rls else None,
            tells_deletes=rule.table.deletes == "key",
            is_open=rule.table.rows == "all",
        )
        return Grant(rule.pattern, sight, self._own_tables)


_NUL: Final = "\\u0000"


def _persona(postgres_role: str, claims: Mapping[str, Any]) -> Persona:
    """Make it of the claims as they are; of who has none of a role alone.

    Raises:
        ReaderRefused: the server could not read the claims.
    """
    try:
        text = msgspec.json.encode(claims or {"role": postgres_role}).decode()
    except UnicodeEncodeError:  # half a character
        text = _NUL
    if _NUL in text:
        raise forbidden("a claim has a character that PostgreSQL does not know")
    return Persona(postgres_role, text)
