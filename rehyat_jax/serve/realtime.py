"""A live stream over a WebSocket, by the message names of vLLM-Omni's ``/v1/realtime/video``.

The client says ``session.start`` (or ``session.join`` with a stream's id), then ``session.interaction``,
``session.playback``, ``session.ping``, ``session.stop``; and of our own ``session.rewind``, ``session.fork``,
``session.save``. The server says ``video.start``, then ``video.chunk_metadata`` before each binary fragment of the
growing mp4 (the first has the file's head in front), of our own ``video.rewind``, and ``session.…`` or ``error`` in
answer.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import anyio
from starlette.websockets import WebSocket, WebSocketDisconnect

from rehyat_jax.errors import RehyatError
from rehyat_jax.serve.host import Host
from rehyat_jax.serve.limits import Full
from rehyat_jax.serve.live import LiveStream
from rehyat_jax.serve.viewers import Viewer
from rehyat_jax.serve.wish import LENGTH, Wish, check_rate, frames_of

#: Characters of a message.
_LONGEST = 1 << 16
#: Seconds in which a client says what it wants.
_PATIENCE = 30.0
#: Events of a connection that are known again when they are told twice, and characters of an event's id.
_EVENTS, _LONGEST_ID = 1000, 100


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
    def __init__(
        self, socket: WebSocket, host: Host, name: str, viewer: Viewer, *, first: int, until: int | None, owns: bool
    ) -> None:
        self._socket, self._host, self._name, self._viewer = socket, host, name, viewer
        self._owns = owns
        self._live: LiveStream = host.get(name)
        self._something = asyncio.Event()
        #: The chunk that is sent next, how many were, and the frames after which the client has all that it wants.
        self._next, self._sent, self._until = first, 0, until
        #: What was asked for by which event, and the chunk that it began with.
        self._asked: dict[str, tuple[str, int]] = {}
        #: Event ids that wait for their chunk, by its number.
        self._events: dict[str, int] = {}
        self._sending = asyncio.Lock()
        self._over = False

    @classmethod
    async def opened(cls, socket: WebSocket, host: Host) -> _Connection | None:
        """After the first message; None, and the client is told why, where it asks for what cannot be."""
        try:
            async with asyncio.timeout(_PATIENCE):
                message = await _message(socket)
            begins = message.get("type") == "session.start"
            until = None
            if begins:
                if message.get("format") not in (None, "m4s"):
                    raise RehyatError(f"format must be m4s, not {str(message['format'])[:80]!r}")
                check_rate(message, host.pace.fps)
                until = frames_of(message, host.pace.fps)
                wish = Wish.from_message(message, also=("type", "format", *LENGTH))
                name = await asyncio.wrap_future(host.begin(wish))
            elif message.get("type") == "session.join":
                name = _text(message, "id")
            else:
                raise RehyatError("the first message is session.start or session.join")
            live = host.get(name)
        except TimeoutError:
            await socket.close(1008, f"nothing was asked for in {_PATIENCE:g} seconds")
            return None
        except RehyatError as error:
            await socket.send_json(_error(error))
            await socket.close(1013 if isinstance(error, Full) else 1008)
            return None
        chunks = live.chunks
        start = message.get("from_chunk", 0 if begins else len(chunks))
        number = start if isinstance(start, int) and 0 <= start <= len(chunks) else len(chunks)
        position = (chunks[number].first_frame if number < len(chunks) else live.frames) / live.pace.fps
        return cls(socket, host, name, live.join(position=position), first=number, until=until, owns=begins)

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
        live, epoch = self._live, self._live.epoch
        while True:
            self._something.clear()
            if live.epoch != epoch:
                kept = live.kept_since(epoch)
                epoch = kept.epoch
                self._events = {name: min(number, kept.chunks) for name, number in self._events.items()}
                if kept.chunks < self._next:
                    self._next = kept.chunks
                    await self._say({"type": "video.rewind", "chunk": kept.chunks, "position_seconds": kept.seconds})
            data = live.fragment(self._next, epoch=epoch)
            if data is None:
                if live.closed and not self._over and live.failed is not None:
                    await self._say(_error(RehyatError(live.failed)))
                    await self._socket.close()
                    return
                if live.closed and not self._over:
                    await self._done(stopped=False)
                    return
                await self._something.wait()
                continue
            chunks = live.chunks
            if live.epoch != epoch or self._next >= len(chunks):
                continue
            if not self._sent:
                data = live.head + data
                await self._say(
                    {
                        "type": "video.start",
                        "id": self._name,
                        "format": "m4s",
                        "mime_type": f'video/mp4; codecs="{live.codec}"',
                        "fps": live.pace.fps,
                        **live.how,
                        "config": {"prompt": chunks[self._next].prompt, "fps": live.pace.fps, **live.how},
                    }
                )
            chunk = chunks[self._next]
            begun = [name for name, number in self._events.items() if number <= chunk.number]
            for name in begun:
                del self._events[name]
            # The newest is in force, whole from its first chunk on; those before it never were.
            events = begun[-1:]
            metadata = {
                "type": "video.chunk_metadata",
                "kind": "media",
                "transport_chunk_index": self._sent,
                "generation_chunk_index": chunk.number,
                "num_frames": chunk.frames,
                "first_frame": chunk.first_frame,
                "byte_length": len(data),
                "started_event_ids": events,
                "active_event_ids": events,
                "completed_event_ids": events,
                "prompt": chunk.prompt,
                "seconds": round(chunk.seconds, 4),
            }
            await self._say(metadata, data)
            self._next, self._sent = self._next + 1, self._sent + 1
            if self._until is not None and chunk.first_frame + chunk.frames >= self._until:
                await self._done(stopped=False)
                return

    async def _done(self, *, stopped: bool) -> None:
        """The last message. A stream that this client began ends with it, unless others watch."""
        self._over = True
        if self._owns and self._live.viewers == 1 and not self._live.closed:
            with suppress(RehyatError):  # it ended meanwhile
                await asyncio.to_thread(self._host.end, self._name)
        await self._say({"type": "session.done", "chunks": self._sent, "stopped": stopped})
        await self._socket.close()

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
                await self._done(stopped=True)
                return
            try:
                if kind not in answers:
                    raise RehyatError(f"there is no message {kind[:80]!r} here")
                await answers[kind](message)
            except _Conflict as error:
                await self._say(_error(error) | {"code": "event_id_conflict", "event_id": error.event})
            except RehyatError as error:
                await self._say(_error(error))

    async def _interaction(self, message: Mapping[str, Any]) -> None:
        inner = message.get("interaction")
        event = inner.get("event") if isinstance(inner, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(event, Mapping):
            raise RehyatError("session.interaction has interaction: {event_id, event: {prompt}}")
        if unknown := sorted(event.keys() - {"prompt"}):
            raise RehyatError(f"an event has a prompt, and no {unknown[0][:80]!r}")
        prompt, name = _text(event, "prompt"), inner.get("event_id")
        if not prompt.strip():
            raise RehyatError("the prompt of an event is empty")
        name = secrets.token_hex(8) if name is None else name
        if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_ID:
            raise RehyatError(f"event_id must be a text of 1 to {_LONGEST_ID} characters")
        transition = inner.get("transition_chunks")
        if transition not in (None, 0, 1) or isinstance(transition, bool):
            raise RehyatError(
                f"transition_chunks must be 0 or 1, not {str(transition)[:80]}: a sentence is in force at once"
            )
        self._host.limits.check_prompt(prompt)
        if name in self._asked:  # told again
            before, number = self._asked[name]
            if before != prompt:
                raise _Conflict(name)
        else:
            number = await _result(self._live.change_prompt(prompt))
            self._events[name] = number
            self._asked[name] = (prompt, number)
            if len(self._asked) > _EVENTS:
                del self._asked[next(iter(self._asked))]
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
            await self._socket.send_json({"request_id": self._name, **message})
            if data is not None:
                await self._socket.send_bytes(data)


class _Conflict(RehyatError):
    """An event's id that another event of the same connection had."""

    def __init__(self, event: str) -> None:
        super().__init__(f"another event was {event!r}")
        self.event = event


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
    return {"type": "error", "message": str(error)}


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
