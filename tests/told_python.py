"""The stock client ``realtime``, told by lines of JSON what to do; tells by lines of JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any, Final, cast

from realtime import AsyncRealtimeChannel, AsyncRealtimeClient
from realtime.types import (
    RealtimeAcknowledgementStatus,
    RealtimeChannelOptions,
    RealtimePostgresChangesListenEvent,
    RealtimeSubscribeStates,
)

Given = Mapping[str, Any]

CLOSE_SECONDS: Final = 5.0


class Driver:
    """Clients and channels by their names; its public methods are what it can be told."""

    def __init__(self) -> None:
        self._clients: dict[str, AsyncRealtimeClient] = {}
        self._channels: dict[str, AsyncRealtimeChannel] = {}
        self._configs: dict[str, Given] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self) -> None:
        """Until no line comes any more."""
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            self._start(self._obey(**json.loads(line)))

    async def _obey(self, id: int, action: str, **given: Any) -> None:  # noqa: A002 - its name
        try:
            result = await getattr(self, action)(**given)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test is told
            _emit(kind="failed", id=id, error=f"{type(error).__name__}: {error}")
        else:
            _emit(kind="done", id=id, result=result)

    def _start(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Clients

    async def client(
        self, name: str, url: str, key: str, token: str | None = None, **_: Any
    ) -> None:
        client = self._clients[name] = AsyncRealtimeClient(
            f"{url}/realtime/v1", key, max_retries=1000, initial_backoff=0.001
        )
        if token is not None:
            await client.set_auth(token)

    async def setAuth(self, client: str, token: str) -> None:  # noqa: N802 - as it is told
        await self._clients[client].set_auth(token)

    async def close(self, names: list[str]) -> None:
        async with asyncio.timeout(CLOSE_SECONDS):
            await asyncio.gather(*[self._clients[name].remove_all_channels() for name in names])

    # Channels

    async def channel(
        self, client: str, name: str, topic: str, config: Given | None = None
    ) -> None:
        params = cast("RealtimeChannelOptions", {"config": {"private": False, **(config or {})}})
        self._configs[name] = config or {}
        self._channels[name] = self._clients[client].channel(topic, params)

    async def subscribe(self, channel: str) -> None:
        def tell(status: RealtimeSubscribeStates, error: Exception | None) -> None:
            told = None if error is None else str(error)
            _emit(kind="status", channel=channel, status=status.value, error=told)

        self._start(self._channels[channel].subscribe(tell))

    async def removeChannel(self, client: str, channel: str) -> None:  # noqa: N802
        await self._clients[client].remove_channel(self._channels[channel])

    async def state(self, channel: str) -> str:
        return self._channels[channel].state.value

    # What is heard

    async def on(
        self,
        channel: str,
        type: str,  # noqa: A002
        filter: dict[str, Any],  # noqa: A002
        label: str,
        *,
        follow: bool,
    ) -> None:
        def tell(payload: Any) -> None:
            _emit(kind=type, channel=channel, label=label, payload=payload)

        it = self._channels[channel]
        match type:
            case "postgres_changes":
                _ask_in_the_join(it, filter)
                event = RealtimePostgresChangesListenEvent(filter.pop("event"))
                callback = _following(it, tell) if follow else tell
                it.on_postgres_changes(event, callback, **filter)
            case "broadcast":
                it.on_broadcast(filter["event"], tell)
            case "system":
                it.on_system(lambda payload: tell(dict(payload)))
            case "presence":
                _on_presence(it, filter["event"], tell)
            case _:
                raise ValueError(type)

    # What is said

    async def send(self, channel: str, message: Given) -> str:
        it = self._channels[channel]
        if not (self._configs[channel].get("broadcast") or {}).get("ack"):
            await it.send_broadcast(message["event"], message["payload"])
            return "ok"
        acknowledged: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        push = await it.push("broadcast", dict(message))
        push.receive(RealtimeAcknowledgementStatus.Ok, lambda _: acknowledged.set_result("ok"))
        push.receive(
            RealtimeAcknowledgementStatus.Error, lambda _: acknowledged.set_result("error")
        )
        return await acknowledged

    async def httpSend(self, channel: str, event: str, payload: Any) -> None:  # noqa: N802
        await self._channels[channel].http_send(event, payload)

    async def track(self, channel: str, payload: dict[str, Any]) -> None:
        await self._channels[channel].track(payload)

    async def untrack(self, channel: str) -> None:
        await self._channels[channel].untrack()

    async def presenceState(self, channel: str) -> Any:  # noqa: N802
        return self._channels[channel].presence_state()


def _ask_in_the_join(channel: AsyncRealtimeChannel, asked: dict[str, Any]) -> None:
    """Say of the join what this client's bindings have no place for."""
    for name in ("since", "leaving"):
        if name in asked:
            channel.join_push.update_payload({name: asked.pop(name)})


def _following(channel: AsyncRealtimeChannel, tell: Any) -> Any:
    def follow(payload: Any) -> None:
        data = payload["data"]
        position = (data.get("record") or data["old_record"])["$position"]
        channel.join_push.update_payload({"since": position})
        tell(payload)

    return follow


def _on_presence(channel: AsyncRealtimeChannel, event: str, tell: Any) -> None:
    def named(name: str) -> Any:
        return lambda key, current, changed: tell(
            {"event": event, "key": key, "currentPresences": current, f"{name}Presences": changed}
        )

    match event:
        case "sync":
            channel.on_presence_sync(lambda: tell({"event": "sync"}))
        case "join":
            channel.on_presence_join(named("new"))
        case "leave":
            channel.on_presence_leave(named("left"))


def _emit(**event: Any) -> None:
    print(json.dumps(event), flush=True)  # noqa: T201 - its output


if __name__ == "__main__":
    asyncio.run(Driver().run())
