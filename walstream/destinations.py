"""What a route leads to: a user's function, or a sink."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import msgspec

from walstream.changes import Change, Message
from walstream.moments import Moment
from walstream.typed import RowModel

Item: TypeAlias = Change[Any] | Message
"""What a handler gets."""

HandlerFunction: TypeAlias = Callable[..., Any]
"""Takes a change, a message, or a list of changes; a transactional one a connection after that."""

MAX_TRANSACTION_CHANGES: Final = 10_000


class HandlerOptions(msgspec.Struct, frozen=True):
    """How a handler wants to be called.

    ``batch`` changes at most come as a list, which waits for more for ``linger_seconds``; 0 stands
    for one change at a time. ``transactions`` asks for whole transactions, as lists of at most
    ``max_transaction_changes``. With a ``concurrency`` above 1 changes come in parallel, in order
    per ``key`` (names of columns; None for the primary key). ``visible`` holds a change until other
    sessions see its transaction. ``transactional`` is the connection string of the database that
    records how far the handler is. ``since`` says from when on it wants what is in the journal,
    before its first change of the stream.
    """

    batch: int = 0
    linger_seconds: float = 0.05
    transactions: bool = False
    max_transaction_changes: int = MAX_TRANSACTION_CHANGES
    concurrency: int = 1
    key: tuple[str, ...] | None = None
    visible: bool = False
    transactional: str | None = None
    model: RowModel[Any] | None = None
    since: Moment | None = None

    def __repr__(self) -> str:
        """Print without the connection string."""
        return "HandlerOptions(...)"

    @property
    def takes_list(self) -> bool:
        """Whether a call is made with a list."""
        return self.batch > 0 or self.transactions


class Handler:
    """A user's function. ``async def`` runs in the event loop, ``def`` in a thread.

    Partials of such functions, methods, and objects with a ``__call__`` are told apart likewise.
    """

    def __init__(
        self,
        function: HandlerFunction,
        *,
        name: str = "",
        options: HandlerOptions = HandlerOptions(),  # noqa: B008 - it is frozen
    ) -> None:
        """Wrap a function.

        Raises:
            TypeError: it cannot be called as its options say, or it is a generator function, of
                which a call runs nothing.
        """
        _verify_signature(function, options)
        unwrapped = _unwrapped(function)
        code = unwrapped if inspect.isroutine(unwrapped) else type(unwrapped).__call__
        if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
            message = f"a handler does its work when it is called; {function!r} has a yield in it"
            raise TypeError(message)
        self.function = function
        self.name = name or getattr(unwrapped, "__qualname__", type(unwrapped).__qualname__)
        self.options = options
        self.is_async = any(map(inspect.iscoroutinefunction, (function, code)))


@runtime_checkable
class Sink(Protocol):
    """A destination that keeps changes: a file, the standard output.

    ``take`` returns when the changes are as durable as the sink promises, and raises OSError or
    `SinkFailed` when they are not; it may then be called again with the same changes, and what the
    failed call left behind must not stay.

    A sink may have two things more: ``max_changes``, how many it wants at once at most, and
    ``async def reopen()``, called at SIGHUP, which opens anew what it writes to.
    """

    name: str

    async def open(self) -> None:
        """Make ready; called once before the first ``take``."""

    async def take(self, changes: Sequence[Change]) -> None:
        """Keep the changes, in this order."""

    async def close(self) -> None:
        """Let go; called once, whatever happened."""


Destination: TypeAlias = Handler | Sink


def since_of(destination: Destination | None) -> Moment | None:
    """Return since when a handler wants what is in the journal, if it does."""
    return destination.options.since if isinstance(destination, Handler) else None


def _verify_signature(function: HandlerFunction, options: HandlerOptions) -> None:
    arguments = (None,) if options.transactional is None else (None, None)
    first = "a list of changes" if options.takes_list else "the change"
    wanted = (
        f"one argument, {first}"
        if options.transactional is None
        else f"two arguments, {first} and the connection"
    )
    try:
        with contextlib.suppress(ValueError):  # built-in ones may not tell their signature
            inspect.signature(function).bind(*arguments)
    except TypeError:
        message = f"a handler of this kind takes {wanted}; {function!r} does not"
        raise TypeError(message) from None


def _unwrapped(function: HandlerFunction) -> HandlerFunction:
    """Return the function or object behind partials and bound methods."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif inspect.ismethod(function):
            function = function.__func__
        else:
            return function
