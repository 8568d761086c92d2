"""How many dead letters there may be, and which of several hold up which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from walstream.dead_letters.letters import DeadLetter, Identity, parked
from walstream.errors import DeadLettersFull
from walstream.keys import WHOLE_TABLE


class Room:
    """Counts letters and bytes against their bounds, without asking the store for every letter.

    Of two processes that use a store for a slot only the daemon adds letters, so there are never
    more than are counted. When the count reaches a bound, the store is measured again. Errors and
    tracebacks of letters that are here already are not refused: those of this process are counted,
    those that a replay writes when it is measured again (`letters.TEXT_BYTES` bounds each).
    """

    def __init__(self, max_letters: int, max_bytes: int) -> None:
        self._max_letters = max_letters
        self._max_bytes = max_bytes
        self._letters: int | None = None
        self._bytes = 0

    def measured(self, letters: int, size_bytes: int) -> None:
        """Note what is there."""
        self._letters, self._bytes = letters, size_bytes

    def take(self, letters: int, size_bytes: int) -> bool:
        """Count more letters; False when there is no room for them, or nothing was measured yet."""
        if self._letters is None:
            return False
        more = self._letters + letters, self._bytes + size_bytes
        if more[0] > self._max_letters or more[1] > self._max_bytes:
            return False
        self._letters, self._bytes = more
        return True

    def grown(self, size_bytes: int) -> None:
        """Count bytes that letters which are here already have got."""
        self._bytes += size_bytes

    def full(self, letters: int, size_bytes: int) -> DeadLettersFull:
        """Say that there is no room for so many more."""
        return DeadLettersFull(
            f"no room for {letters} more dead letters of {size_bytes} bytes: there are"
            f" {self._letters} of at most {self._max_letters}, of {self._bytes} bytes of at most"
            f" {self._max_bytes}",
            hint="mend what fails, then walstream dead-letters replay, or drop what nobody needs;"
            " or raise max_letters or max_bytes under [dead_letters]",
        )


def new_letters(letters: Sequence[DeadLetter], here: Collection[Identity]) -> list[DeadLetter]:
    """Return those to be added: none twice, and rather one that was tried.

    Args:
        letters: what `DeadLetterStore.add` is given.
        here: which of them the store has.
    """
    new: dict[Identity, DeadLetter] = {}
    for letter in letters:
        if letter.identity in here:
            continue
        if new.setdefault(letter.identity, letter).parked:
            new[letter.identity] = letter
    return list(new.values())


def letters_to_park(
    letters: Sequence[DeadLetter],
    here: Collection[Identity],
    held_up: Collection[int],
    *,
    together: bool,
) -> tuple[list[DeadLetter], list[bool]]:
    """Return those to be stored, and what `DeadLetterStore.park` returns.

    Args:
        letters: what it is given.
        here: which of them the store has.
        held_up: the places of those that a letter in the store holds up.
        together: all are stored when one is here or held up.
    """
    if together and (held_up or any(letter.identity in here for letter in letters)):
        held_up = range(len(letters))
    new: dict[Identity, DeadLetter] = {}
    those_of_this_call = HeldUp()
    is_here = []
    for place, letter in enumerate(letters):
        is_known = letter.identity in here or letter.identity in new
        if not is_known and (place in held_up or letter in those_of_this_call):
            new[letter.identity] = parked(letter)
            those_of_this_call.add(letter)
            is_known = True
        is_here.append(is_known)
    return list(new.values()), is_here


class HeldUp:
    """Tells which changes letters hold up: those with a conflicting key (`walstream.keys`)."""

    def __init__(self) -> None:
        self._values: defaultdict[tuple[str, str], set[bytes]] = defaultdict(set)

    def add(self, letter: DeadLetter) -> None:
        """Let a letter hold up others."""
        for table, values in letter.keys:
            self._values[letter.route, table].add(values)

    def __contains__(self, letter: DeadLetter) -> bool:
        """Whether one of them holds it up."""
        for table, values in letter.keys:
            known = self._values.get((letter.route, table), set())
            if known and (values == WHOLE_TABLE or values in known or WHOLE_TABLE in known):
                return True
        return False
