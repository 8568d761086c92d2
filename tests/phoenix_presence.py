"""What the stock clients make of presence: a model of each, written after what they do.

`JavaScriptPresence` does as @supabase/phoenix 0.4, `PythonPresence` as realtime 2.34. Both keep
``{key: [meta, ...]}``.
"""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

State: TypeAlias = dict[str, dict[str, list[dict[str, Any]]]]
"""``{key: {"metas": [...]}}``, as on the wire."""


class JavaScriptPresence:
    """Keeps diffs that come before the state, and applies them to it.

    It keeps them also when it joins anew before the state has come, so that those who have left
    meanwhile are never forgotten: diffs are not for those who get no state.
    """

    def __init__(self) -> None:
        self.state: State = {}
        self.pending: list[dict[str, State]] = []
        self.has_state = False

    def rejoin(self) -> None:
        """Join anew, by a join_ref of its own: what was known stays until there is a state."""
        self.has_state = False

    def on_state(self, state: State) -> None:
        self.has_state = True
        self.state = sync_state(self.state, copy.deepcopy(state))
        for diff in self.pending:
            self.state = sync_diff(self.state, diff)
        self.pending = []

    def on_diff(self, diff: dict[str, State]) -> None:
        if self.has_state:
            self.state = sync_diff(self.state, copy.deepcopy(diff))
        else:
            self.pending.append(copy.deepcopy(diff))

    @property
    def metas(self) -> dict[str, list[dict[str, Any]]]:
        return {key: presence["metas"] for key, presence in self.state.items()}


def sync_state(current: State, new: State) -> State:
    state = copy.deepcopy(current)
    joins: State = {}
    leaves: State = {key: presence for key, presence in state.items() if key not in new}
    for key, presence in new.items():
        if key not in state:
            joins[key] = presence
            continue
        joined = _without(presence["metas"], _refs(state[key]["metas"]))
        left = _without(state[key]["metas"], _refs(presence["metas"]))
        if joined:
            joins[key] = {"metas": joined}
        if left:
            leaves[key] = {"metas": left}
    return sync_diff(state, {"joins": joins, "leaves": leaves})


def sync_diff(state: State, diff: dict[str, State]) -> State:
    """All joins and then all leaves; what is joined goes behind what was there."""
    diff = copy.deepcopy(diff)
    for key, presence in diff["joins"].items():
        before = state[key]["metas"] if key in state else []
        state[key] = {"metas": _without(before, _refs(presence["metas"])) + presence["metas"]}
    for key, presence in diff["leaves"].items():
        if key not in state:
            continue
        state[key]["metas"] = _without(state[key]["metas"], _refs(presence["metas"]))
        if not state[key]["metas"]:
            del state[key]
    return state


class PythonPresence:
    """Applies everything as it comes."""

    def __init__(self) -> None:
        self.metas: dict[str, list[dict[str, Any]]] = {}

    def on_state(self, state: State) -> None:
        new = {key: presence["metas"] for key, presence in copy.deepcopy(state).items()}
        joins = {}
        leaves = {key: metas for key, metas in self.metas.items() if key not in new}
        for key, metas in new.items():
            before = self.metas.get(key, [])
            if not before:
                joins[key] = metas
                continue
            if joined := _without(metas, _refs(before)):
                joins[key] = joined
            if left := _without(before, _refs(metas)):
                leaves[key] = left
        self._apply(joins, leaves)

    def on_diff(self, diff: dict[str, State]) -> None:
        diff = copy.deepcopy(diff)
        joins = {key: presence["metas"] for key, presence in diff["joins"].items()}
        leaves = {key: presence["metas"] for key, presence in diff["leaves"].items()}
        self._apply(joins, leaves)

    def _apply(
        self, joins: dict[str, list[dict[str, Any]]], leaves: dict[str, list[dict[str, Any]]]
    ) -> None:
        for key, metas in joins.items():
            self.metas[key] = _without(self.metas.get(key, []), _refs(metas)) + metas
        for key, metas in leaves.items():
            if key in self.metas:
                self.metas[key] = _without(self.metas[key], _refs(metas))
                if not self.metas[key]:
                    del self.metas[key]


def _refs(metas: list[dict[str, Any]]) -> set[str]:
    return {meta["phx_ref"] for meta in metas}


def _without(metas: list[dict[str, Any]], refs: set[str]) -> list[dict[str, Any]]:
    return [meta for meta in metas if meta["phx_ref"] not in refs]
