"""Everything that can go wrong, sorted by who must act.

    WalstreamError
    ├── UsageError                  the caller of the command line                    exit 64
    ├── SetupError                  the operator: configuration or database set-up    exit 78
    │   ├── ConfigError             the configuration file or environment
    │   ├── FilterError             a ``where`` that cannot be read or does not fit its table
    │   ├── RelationMissing         a route names a table or column that is not there
    │   ├── ModelsDrifted           generated models are not those of the tables any more
    │   ├── AccessRefused           authentication, or a right that the role lacks
    │   ├── DatabaseUnfit           version, wal_level, encoding, too few slots or walsenders
    │   ├── PluginMissing           wal2json is not installed on the server
    │   ├── PluginRefused           wal2json is installed, and the server's settings refuse it
    │   ├── PluginTooOld            wal2json does not know an option that it is asked for
    │   ├── SlotMissing             the slot does not exist and is not to be created
    │   ├── SlotExists              a slot of that name is there already
    │   ├── SlotUnfit               the slot belongs to another database or output plugin
    │   ├── SlotLost                the slot exists and can never stream again: changes are lost
    │   ├── HistoryForked           the server's history parts from what was confirmed
    │   ├── HistoryMissing          the journal does not go back to what is to be delivered again
    │   ├── ChangeUnsendable        the server fails at the same position each time
    │   ├── RetainedWalExceeded     the slot retains more WAL than the configuration allows
    │   ├── ProgressUnfit           what a transactional route has recorded is of another source
    │   └── ServerProgramsMissing   a private cluster was asked for and PostgreSQL is not installed
    ├── Unavailable                 nobody yet: wait and try again                    exit 75
    │   ├── ConnectionLost          the connection was cut or could not be opened
    │   ├── ServerShutdown          the server ends the stream because it shuts down
    │   ├── RoutesChanged           other routes were loaded, which need what was not asked for
    │   ├── SlotBusy                another process streams from the slot
    │   ├── SlotExhausted           no free replication slot or walsender at this moment
    │   ├── SlotCreationBlocked     the slot waits for transactions that do not end
    │   ├── ReplayRuns              another process replays the slot's dead letters
    │   ├── TargetUnavailable       the database that a transactional handler writes to
    │   └── ClusterFailed           the private cluster did not start
    ├── DeliveryError               the author of a handler, the owner of a destination   exit 75
    │   ├── HandlerFailed           a handler raised more often than it is retried
    │   ├── TransactionBroken       a transactional handler ended its transaction, or left it failed
    │   ├── RowInvalid              a row does not fit the model of its handler
    │   ├── HandlerStuck            a handler made no progress for so long that the slot is given up
    │   ├── TransactionTooLarge     a handler of whole transactions gets none of that size
    │   ├── SinkFailed              a sink could not take a change
    │   │   └── SinkRefused         the receiver of a sink refuses a change for good
    │   ├── OutputClosed            the reader of the standard output is gone
    │   ├── DeadLettersFull         no room for another dead letter
    │   ├── LettersLeft             dead letters that were to be replayed are still there
    │   └── DeadLetterStoreFailed   dead letters could not be stored or read
    └── StreamBroken                us, or the output plugin                           exit 70
        ├── ProtocolError           bytes that the replication protocol does not allow
        ├── DecodeError             a record that is not what wal2json documents
        └── ServerFailed            the server ended the stream with an error of its own

A message says what was found, its ``hint`` what to do next. Neither ever holds a row's value, a
password or a connection string.
"""

from __future__ import annotations

from typing import ClassVar, Final

EX_OK: Final = 0
EX_USAGE: Final = 64
EX_DATAERR: Final = 65
EX_SOFTWARE: Final = 70
EX_TEMPFAIL: Final = 75
EX_CONFIG: Final = 78


class WalstreamError(Exception):
    """What walstream raises on purpose; ``hint`` is the next step in one or two sentences."""

    exit_code: ClassVar[int] = EX_SOFTWARE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Message and hint, as an operator reads them."""
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UsageError(WalstreamError):
    """The command line asks for something that does not exist."""

    exit_code = EX_USAGE


class SetupError(WalstreamError):
    """The configuration or the database must be changed first; trying again does not help."""

    exit_code = EX_CONFIG


class ConfigError(SetupError):
    """The configuration is wrong; ``problems`` holds one sentence for each mistake."""

    def __init__(self, problems: list[str], *, hint: str = "") -> None:
        super().__init__("\n".join(problems), hint=hint)
        self.problems = problems


class FilterError(SetupError):
    """A ``where`` cannot be read, or does not fit the table that it is used on.

    ``sqlstate`` and ``reason`` are the server's, when it is a value that the server cannot read.
    """

    def __init__(
        self, message: str, *, hint: str = "", sqlstate: str = "", reason: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.sqlstate = sqlstate
        self.reason = reason


class RelationMissing(SetupError):
    """A route names a table or a column that the database does not have."""


class ModelsDrifted(SetupError):
    """A file of generated models is not what the database's tables give any more."""


class AccessRefused(SetupError):
    """The server refused the role: authentication failed, or a right is missing."""


class DatabaseUnfit(SetupError):
    """The server or the database is not set up for logical replication."""


class PluginMissing(SetupError):
    """The wal2json output plugin is not installed on the server."""


class PluginRefused(SetupError):
    """The server has wal2json, and its ``output_plugin_libraries`` does not allow it."""


class PluginTooOld(SetupError):
    """The installed wal2json does not know an option that it was given."""


class SlotMissing(SetupError):
    """The replication slot does not exist."""


class SlotExists(SetupError):
    """A replication slot of that name exists already."""


class SlotUnfit(SetupError):
    """The replication slot belongs to another database, or to another output plugin."""


class SlotLost(SetupError):
    """The replication slot was invalidated: the WAL that it needs is gone."""


class HistoryForked(SetupError):
    """The server does not know what was confirmed: it was restored, or promoted too early."""


class HistoryMissing(SetupError):
    """The journal does not go back to where a handler or a replay is to begin."""


class ChangeUnsendable(SetupError):
    """The server fails at the same position each time: what follows it cannot be decoded."""


class RetainedWalExceeded(SetupError):
    """The slot retains more WAL than the configuration lets it; ``drop`` says to drop it."""

    def __init__(self, message: str, *, hint: str = "", drop: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.drop = drop


class ProgressUnfit(SetupError):
    """What a transactional route has recorded belongs to another cluster, or to its lost future."""


class ServerProgramsMissing(SetupError):
    """PostgreSQL's server programs or wal2json are not installed on this machine."""


class Unavailable(WalstreamError):
    """Nobody has made a mistake: wait, and try again."""

    exit_code = EX_TEMPFAIL


class ConnectionLost(Unavailable):
    """The connection to the server was cut, or could not be opened."""


class ServerShutdown(Unavailable):
    """The server shuts down, or ended the connection on an administrator's command."""


class RoutesChanged(Unavailable):
    """The stream ends and begins anew at once, with reloaded routes."""


class SlotBusy(Unavailable):
    """Another process streams from the slot, and has confirmed so much of it."""

    def __init__(
        self, message: str, *, hint: str = "", confirmed_flush_lsn: int | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.confirmed_flush_lsn = confirmed_flush_lsn


class SlotExhausted(Unavailable):
    """All replication slots or all walsenders of the server are in use."""


class ClusterFailed(Unavailable):
    """The private cluster did not start or stop."""


class SlotCreationBlocked(Unavailable):
    """A slot cannot be created while transactions run that began before it."""


class ReplayRuns(Unavailable):
    """Another process replays the dead letters of the slot."""


class TargetUnavailable(Unavailable):
    """The database that a transactional handler writes to cannot be used now."""


class DeliveryError(WalstreamError):
    """A change was not taken; the slot stays before its transaction."""

    exit_code = EX_TEMPFAIL


class HandlerFailed(DeliveryError):
    """A handler raised, and raised again at every retry."""


class TransactionBroken(DeliveryError):
    """A transactional handler ended its transaction, or left it failed; it is not tried again."""


class RowInvalid(DeliveryError):
    """A row does not fit the model of its handler. The message names fields, never a value."""


class HandlerStuck(DeliveryError):
    """A handler held a change for so long that the slot is given up for another process."""


class TransactionTooLarge(DeliveryError):
    """A handler takes whole transactions, and one is larger than may be held in memory."""


class SinkFailed(DeliveryError):
    """A sink could not take a change."""


class SinkRefused(SinkFailed):
    """The receiver refuses a change for good; the same change would be refused again."""


class OutputClosed(DeliveryError):
    """Nobody reads the standard output any more, and nobody will."""


class DeadLettersFull(DeliveryError):
    """The dead letters have reached the bound that the configuration sets."""


class LettersLeft(DeliveryError):
    """Not all dead letters that were to be replayed have been delivered."""


class DeadLetterStoreFailed(DeliveryError):
    """Dead letters could not be stored or read; what was to be stored is not taken."""


class StreamBroken(WalstreamError):
    """The stream itself is not what it must be; the slot stays before the last transaction."""


class ProtocolError(StreamBroken):
    """The server sent bytes that the streaming replication protocol does not allow."""


class DecodeError(StreamBroken):
    """A record is not what wal2json documents. The message holds its length, never its text."""


class ServerFailed(StreamBroken):
    """The server ended the stream with an error that walstream has no better word for."""
