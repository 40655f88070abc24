"""A live stream over a WebSocket, by the message names of vLLM-Omni's ``/v1/realtime/video``.

The client says ``session.start`` (or ``session.join`` with a stream's id), then ``session.interaction``,
``session.playback``, ``session.ping``, ``session.stop``; and of our own ``session.rewind``, ``session.fork``,
``session.save``. The server says ``video.start``, then ``video.chunk_metadata`` before each binary fragment of the
growing mp4, of our own ``video.rewind``, and ``session.…`` or ``error`` in answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import anyio
from starlette.websockets import WebSocket, WebSocketDisconnect

from rehyat_jax.errors import RehyatError
from rehyat_jax.serve.host import Full, Host
from rehyat_jax.serve.live import LiveStream, Viewer
from rehyat_jax.serve.wish import Wish

#: Characters of a message.
_LONGEST = 1 << 16


async def realtime(socket: WebSocket, host: Host) -> None:
    """One client from its first message to its last."""
    await socket.accept()
    try:
        connection = await _Connection.opened(socket, host)
        if connection is not None:
            await connection.run()
    except WebSocketDisconnect:
        return


class _Connection:
    def __init__(self, socket: WebSocket, host: Host, name: str, viewer: Viewer) -> None:
        self._socket, self._host, self._name, self._viewer = socket, host, name, viewer
        self._live: LiveStream = host.get(name)
        self._something = asyncio.Event()
        #: Event ids that wait for their chunk, by its number; and those in force.
        self._events: dict[str, int] = {}
        self._sending = asyncio.Lock()

    @classmethod
    async def opened(cls, socket: WebSocket, host: Host) -> _Connection | None:
        """After the first message; None, and the client is told why, where it asks for what cannot be."""
        message = await _message(socket)
        try:
            if message.get("type") == "session.join":
                name = _text(message, "id")
            elif message.get("type") == "session.start":
                name = await asyncio.wrap_future(host.begin(Wish.from_message(message)))
            else:
                raise RehyatError("the first message is session.start or session.join")
            live = host.get(name)
        except RehyatError as error:
            await socket.send_json(_error(error))
            await socket.close(1013 if isinstance(error, Full) else 1008)
            return None
        start = message.get("from_chunk", len(live.chunks) if message["type"] == "session.join" else 0)
        number = start if isinstance(start, int) and 0 <= start <= len(live.chunks) else len(live.chunks)
        chunks = live.chunks
        position = (chunks[number].first_frame if number < len(chunks) else live.frames) / live.pace.fps
        connection = cls(socket, host, name, live.join(position=position))
        connection._next = number
        return connection

    _next: int

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        unwatch = self._live.watch(lambda: loop.call_soon_threadsafe(self._something.set))
        try:
            async with anyio.create_task_group() as group:
                for half in (self._send_fragments, self._receive):
                    group.start_soon(self._until_the_end, half, group.cancel_scope)
        finally:
            unwatch()
            self._viewer.close()

    async def _until_the_end(self, half: Callable[[], Awaitable[None]], scope: anyio.CancelScope) -> None:
        """The two halves of a connection end together."""
        with suppress(WebSocketDisconnect):
            await half()
        scope.cancel()

    async def _send_fragments(self) -> None:
        live, started = self._live, False
        epoch, transport = live.epoch, 0
        while True:
            self._something.clear()
            if live.epoch != epoch:
                kept = live.kept_since(epoch)
                epoch = kept.epoch
                if kept.chunks < self._next:
                    self._next = kept.chunks
                    await self._say({"type": "video.rewind", "chunk": kept.chunks, "position_seconds": kept.seconds})
            data = live.fragment(self._next, epoch=epoch)
            if data is None:
                if live.closed:
                    done = {"type": "session.done"} if live.failed is None else _error(RehyatError(live.failed))
                    await self._say(done)
                    await self._socket.close()
                    return
                await self._something.wait()
                continue
            if not started:
                started = True
                await self._say(
                    {
                        "type": "video.start",
                        "id": self._name,
                        "format": "m4s",
                        "mime_type": f'video/mp4; codecs="{live.codec}"',
                        "fps": live.pace.fps,
                        **live.how,
                    },
                    live.head,
                )
            chunks = live.chunks
            if live.epoch != epoch or self._next >= len(chunks):
                continue
            chunk = chunks[self._next]
            begun = [name for name, number in self._events.items() if number <= chunk.number]
            for name in begun:
                del self._events[name]
            metadata = {
                "type": "video.chunk_metadata",
                "transport_chunk_index": transport,
                "generation_chunk_index": chunk.number,
                "num_frames": chunk.frames,
                "first_frame": chunk.first_frame,
                "byte_length": len(data),
                "started_event_ids": begun,
                "active_event_ids": begun,
                "completed_event_ids": [],
                "prompt": chunk.prompt,
                "seconds": round(chunk.seconds, 4),
            }
            await self._say(metadata, data)
            self._next, transport = self._next + 1, transport + 1

    async def _receive(self) -> None:
        answers: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
            "session.interaction": self._interaction,
            "session.playback": self._playback,
            "session.ping": self._ping,
            "session.rewind": self._rewind,
            "session.fork": self._fork,
            "session.save": self._save,
        }
        while True:
            message = await _message(self._socket)
            kind = str(message.get("type"))
            if kind == "session.stop":
                await self._say({"type": "session.done"})
                await self._socket.close()
                return
            try:
                if kind not in answers:
                    raise RehyatError(f"there is no message {kind[:80]!r} here")
                await answers[kind](message)
            except RehyatError as error:
                await self._say(_error(error))

    async def _interaction(self, message: Mapping[str, Any]) -> None:
        inner = message.get("interaction")
        event = inner.get("event") if isinstance(inner, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(event, Mapping):
            raise RehyatError("session.interaction has interaction: {event_id, event: {prompt}}")
        prompt, name = _text(event, "prompt"), str(inner.get("event_id", ""))[:100]
        self._host.check_prompt(prompt)
        number = await _result(self._live.change_prompt(prompt))
        self._events[name] = number
        await self._say({"type": "session.interaction.queued", "event_id": name, "generation_chunk_index": number})

    async def _playback(self, message: Mapping[str, Any]) -> None:
        seconds = message.get("position_seconds")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
            raise RehyatError("position_seconds is a number of seconds from 0")
        self._viewer.at(min(float(seconds), self._live.seconds))

    async def _ping(self, message: Mapping[str, Any]) -> None:
        await self._say({"type": "session.pong"})

    async def _rewind(self, message: Mapping[str, Any]) -> None:
        await _result(self._live.rewind(_whole(message, "chunk")))

    async def _fork(self, message: Mapping[str, Any]) -> None:
        seed = None if message.get("seed") is None else _whole(message, "seed")
        name = await _result(self._host.branch(self._name, _whole(message, "chunk"), seed=seed))
        await self._say({"type": "session.forked", "id": name, "from": self._name})

    async def _save(self, message: Mapping[str, Any]) -> None:
        await _result(self._host.save(self._name))
        await self._say({"type": "session.saved", "id": self._name, "state": f"/v1/streams/{self._name}/state"})

    async def _say(self, message: Mapping[str, Any], data: bytes | None = None) -> None:
        async with self._sending:  # a fragment follows its metadata
            await self._socket.send_json(message)
            if data is not None:
                await self._socket.send_bytes(data)


async def _result(future: Future[Any]) -> Any:
    return await asyncio.wrap_future(future)


async def _message(socket: WebSocket) -> dict[str, Any]:
    """The next message; what is none is answered, and the one after it waited for.

    Raises:
        WebSocketDisconnect: there is none any more.
    """
    while True:
        received = await socket.receive()
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(received.get("code", 1000))
        text = received.get("text")
        try:
            if text is None or len(text) > _LONGEST:
                raise ValueError("a message is JSON in a text frame")
            message = json.loads(text)
            if not isinstance(message, dict):
                raise ValueError("a message is a JSON object")
            return message
        except (ValueError, RecursionError):
            await socket.send_json(_error(RehyatError("a message is a JSON object in a text frame, of 64 KiB at most")))


def _error(error: RehyatError) -> dict[str, Any]:
    return {"type": "error", "error": {"message": str(error), "type": "invalid_request_error"}}


def _text(message: Mapping[str, Any], name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str):
        raise RehyatError(f"{name} must be a text")
    return value


def _whole(message: Mapping[str, Any], name: str) -> int:
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 32:
        raise RehyatError(f"{name} must be a whole number from 0")
    return value
