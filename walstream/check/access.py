"""Who may read changes by HTTP: the keys of tokens, and what roles see of their tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final
from urllib.parse import urlsplit

from walstream.access.gate import keys_of
from walstream.access.jwks import Jwks
from walstream.catalog import Catalog, Table
from walstream.check import row_security
from walstream.check.findings import Finding, Outcome, Status, ok, problem, unreachable, warning
from walstream.check.place import is_local
from walstream.check.routes import (
    BY_KEY,
    FULL,
    Concern,
    covered,
    immediately_keyed,
    listed,
    told,
)
from walstream.check.site import Question, Site, answered
from walstream.config.access import AccessConfig, RoleConfig, TableConfig
from walstream.filters import columns, literals
from walstream.placeholders import RowCondition, is_placeholder
from walstream.preflight import hopeless
from walstream.router import Route, TablePattern

# ---- Tokens


async def _tokens(site: Site) -> Outcome | None:
    access = site.config.access
    if access.key_name is None:
        if access.is_given or not access.roles:
            return None
        return warning(
            "there are roles, and nothing to verify tokens with: nobody is let in",
            "-- set secret, jwks_url, jwks_file or public_key_file under [access]",
        )
    keys = keys_of(access)
    assert keys is not None  # noqa: S101 - one is given
    if isinstance(keys, Jwks):
        try:
            return await _judged_set(access, keys)
        finally:
            await keys.close()
    return ok(f"{access.key_name}: {', '.join(access.allowed_algorithms)}")


async def _judged_set(access: AccessConfig, keys: Jwks) -> Outcome:
    try:
        known = await keys.read()
    except ValueError as error:
        return unreachable(
            f"{access.key_name}: {keys.source}: {error}",
            "-- see that the address answers here; until it does, tokens are refused (503)",
        )
    allowed = set(access.allowed_algorithms)
    usable = [key.algorithms & allowed for key in known if key.algorithms & allowed]
    if not usable:
        return problem(
            f"{access.key_name}: none of its {len(known)} keys verifies tokens by"
            f" {', '.join(access.allowed_algorithms)}",
            "-- let whoever makes the tokens sign with a private key, or set algorithms, or secret",
        )
    url = urlsplit(access.jwks_url or "")
    if url.scheme == "http" and not is_local(url.hostname or ""):
        return warning(
            f"{access.key_name}: read without TLS: who stands in between decides whom to believe",
            "-- write https://",
        )
    if access.audience is None and access.issuer is None:
        return warning(
            f"{access.key_name}: all tokens that are signed with its keys are taken, also those"
            " for other services",
            "-- set audience, or issuer, under [access]",
        )
    count = f"{len(usable)} keys" if len(usable) > 1 else "one key"
    return ok(f"{access.key_name}: {count}, {listed(set().union(*usable))}")


async def _anonymous(site: Site) -> Outcome | None:
    role, listen = site.config.access.anonymous_role, site.config.http.listen
    if role is None or listen is None:
        return None
    if is_local(listen.rpartition(":")[0].strip("[]")):
        return ok(f"{role}, for whoever is on this machine")
    return warning(
        f"whoever reaches {listen} may do without a token what the role {role} may",
        "-- take anonymous_role out of [access], or listen at 127.0.0.1",
    )


QUESTIONS: Final = (
    Question("access", "tokens", _tokens),
    Question("access", "anonymous", _anonymous),
    *row_security.QUESTIONS,
)

# ---- Roles


async def check_roles(site: Site) -> list[Finding]:
    """Look at each table of each role."""
    return [
        Finding.of("access", f"{name}: {table.table}", outcome)
        for name, role in site.config.access.roles.items()
        for table in role.tables
        for outcome in await _check_table(site, table, (name, role))
    ]


async def _check_table(
    site: Site, section: TableConfig, role: tuple[str, RoleConfig]
) -> list[Outcome]:
    if site.lacks("catalog"):
        return []  # which is told, and that routes cannot be looked at
    found: list[Outcome] = []

    async def ask() -> Outcome | None:
        found.extend(await _judged_table(site, section, role))
        return None

    error = await answered(site, ask())
    return found if error is None else [error]


async def _judged_table(
    site: Site, section: TableConfig, role: tuple[str, RoleConfig]
) -> list[Outcome]:
    """Tell each concern once, with all tables that have it.

    Raises:
        RelationMissing: a rule is for a column that the table does not have.
        FilterError: the condition does not fit the columns' types.
    """
    try:
        projection = section.columns.projection(site.masking_key)
    except ValueError as error:
        return [problem(f"columns: {error}", "-- set key, or key_file, under [masking]")]
    granted = Route(
        name="",
        pattern=TablePattern.parse(section.table),
        destination=None,
        projection=projection,
        own_tables=site.config.own_tables(),
    )
    tables = await covered(site.catalog, granted)
    if not tables:
        return [warning("there is no such table now, nothing will come")]
    if granted.pattern.relation is not None:
        await _verify(site.catalog, granted, section.condition)
    keyed = await immediately_keyed(site.catalog, tables)
    leading = _leading(site)
    concerned: dict[Concern, list[Table]] = {}
    for table in tables:
        routes = [route for route in leading if route.wants(table.relation, table.ancestors)]
        for concern in _concerns(table, section, routes, is_keyed=table.relation in keyed):
            concerned.setdefault(concern, []).append(table)
        for concern in await row_security.concerns(site.catalog, table, section, role):
            concerned.setdefault(concern, []).append(table)
    return told(concerned, granted) if concerned else [ok(_summed(tables, section))]


async def _verify(catalog: Catalog, granted: Route, condition: RowCondition | None) -> None:
    """Ask of a table that is named whether all is there that is named of it."""
    relation = granted.pattern.relation
    table = None if relation is None else await catalog.table(relation)
    if relation is None or table is None or hopeless(table):
        return
    known = {column.name: column.typeoid for column in table.columns}
    if granted.projection is not None:
        granted.projection.check(known, relation)
    if condition is not None:
        await catalog.learn_types(known.values())
        values = literals(condition.where, known, catalog.types, relation)
        await catalog.normalise([one for one in values if not is_placeholder(one.text)])


def _leading(site: Site) -> list[Route]:
    """List the routes whose changes clients can see."""
    config = site.config
    live = {name for name, sink in config.sinks.items() if sink.type == "live"}
    return [
        spec.route("", None, site.masking_key or b"-", own_tables=config.own_tables())
        for spec in config.routes
        if spec.to in live
    ]


def _concerns(
    table: Table, section: TableConfig, routes: Sequence[Route], *, is_keyed: bool
) -> Iterator[Concern]:
    if not routes:
        yield Concern(
            Status.WARNING,
            "no [[routes]] takes it to a sink of type live: nothing of it comes",
        )
    if section.condition is None:
        return
    read = columns(section.condition.where)
    unknown = read - {column.name for column in table.columns}
    if unknown:
        yield Concern(Status.WARNING, f"has no {listed(unknown)}: no row of it is seen")
        return
    hidden = {name for name in read if not any(_carries(route, name) for route in routes)}
    if routes and hidden:
        yield Concern(
            Status.PROBLEM,
            f"the route leaves out or masks {listed(hidden)}, which the condition reads: no row is"
            " seen",
        )
    yield from _partial_identity(table, read, is_keyed=is_keyed)


def _carries(route: Route, column: str) -> bool:
    return route.projection is None or route.projection.shows(column)


def _partial_identity(table: Table, read: frozenset[str], *, is_keyed: bool) -> Iterator[Concern]:
    """Look for what the condition reads of old rows, and is not sent of them."""
    if table.replica_identity == "f" or read <= frozenset(table.identity):
        return
    carried = listed(table.identity) or "nothing"
    yield Concern(
        Status.WARNING,
        f"of an old row only {carried} is sent, and the condition reads {listed(read)}: deletes,"
        " and that a row has left a reader's sight, are not seen",
        BY_KEY if is_keyed and read <= frozenset(table.key) else FULL,
    )


def _summed(tables: Sequence[Table], section: TableConfig) -> str:
    what = f"{len(tables)} tables" if len(tables) > 1 else "the table is there"
    condition = section.condition
    if condition is None:
        return f"{what}, {'what row security shows' if section.rls else 'all rows'}"
    claims = listed(map(str, condition.claims))
    return f"{what}, rows by {claims}" if claims else f"{what}, some rows"
