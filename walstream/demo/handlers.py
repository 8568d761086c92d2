"""The handlers of ``walstream demo``: all that an application has to write."""

from walstream import Change, Walstream
from walstream.demo.screen import show

stream = Walstream()


@stream.on("public.messages_v2", "insert", where="conversation_id=eq.kitchen")
async def new_message(change: Change) -> None:
    """Somebody wrote in the kitchen."""
    show(change, f"{change.row['author']}: {change.row['content']}")


@stream.on("public.reminders", "update", where="status=eq.due")
async def reminder_due(change: Change) -> None:
    """A reminder's status became due."""
    show(change, f"{change.row['owner']}, it is time: {change.row['title']}")


@stream.on("public.user_interactions", "delete")
async def reaction_gone(change: Change) -> None:
    """A reaction was taken back; of the old row only the key is sent."""
    show(change, f"of {change.identity['user_name']} to message {change.identity['message_id']}")
