"""The server's routes: the page, live streams over WebSocket and as plain mp4, health and metrics."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from rehyat_jax import __version__
from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.heap import heap
from rehyat_jax.serve.guard import Access, Guard
from rehyat_jax.serve.host import Host
from rehyat_jax.serve.limits import Full
from rehyat_jax.serve.live import LiveStream
from rehyat_jax.serve.playlist import playlist_routes
from rehyat_jax.serve.realtime import realtime
from rehyat_jax.serve.videos import video_routes

_PAGE = Path(__file__).parent / "page"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What the page is told of a model: what it is run with where a client asks for nothing else."""

    name: str
    steps: int = 1
    offered_steps: tuple[int, ...] = ()
    guidance: float = 1.0
    #: Whether guidance is of use: a student that was trained to need none has no use for it.
    guided: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What the page is told of the server; ``model`` is the one that is meant where a client names none."""

    model: str
    device: str
    models: tuple[Model, ...] = ()
    words: tuple[str, ...] = ()
    example: str = ""


def make_app(host: Host, about: About, *, access: Access | None = None) -> Starlette:
    """An ASGI application around a host, which ends with it."""

    async def page(_: Request) -> Response:
        return FileResponse(_PAGE / "index.html")

    async def described(_: Request) -> Response:
        return JSONResponse(dataclasses.asdict(about) | {"version": __version__, "fps": host.pace.fps})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(_: Request) -> Response:
        lives = [host.get(name) for name in host.names()]
        waiting = sum(not job.ended for job in host.videos.all())
        lines = [
            *_metric("rehyat_streams", "gauge", "Live streams held.", len(lives)),
            *_metric("rehyat_viewers", "gauge", "Viewers connected.", sum(live.viewers for live in lives)),
            *_metric("rehyat_chunks_total", "counter", "Chunks made.", host.chunks_made),
            *_metric("rehyat_frames_total", "counter", "Frames made.", host.frames_made),
            *_metric("rehyat_batches_total", "counter", "Batches in which the streams' were made.", host.batches_made),
            *_metric("rehyat_batch_seconds_total", "counter", "Seconds that these took.", host.chunk_seconds),
            *_metric("rehyat_batch_rows_max", "gauge", "Streams in the largest batch so far.", host.largest_batch),
            *_metric("rehyat_videos_waiting", "gauge", "Videos not made yet.", waiting),
            *_metric("rehyat_snapshots", "gauge", "States to go back to.", sum(len(live.snapshots) for live in lives)),
            *_metric("rehyat_snapshot_bytes", "gauge", "Of their arrays.", sum(live.snapshots.bytes for live in lives)),
        ]
        if (told := heap()) is not None:
            lines += [
                *_metric("process_resident_memory_bytes", "gauge", "Resident memory of the process.", told.resident),
                *_metric("rehyat_heap_used_bytes", "gauge", "Asked of the C library, and not freed.", told.used),
                *_metric("rehyat_heap_free_bytes", "gauge", "Held by the C library, resident or not.", told.free),
            ]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def streams(request: Request) -> Response:
        if request.method == "POST":
            name = await asyncio.wrap_future(host.begin_saved(await request.body()))
            return JSONResponse(_told(name, host.get(name)))
        # Of each the newest chunk alone, where asked so: streams of hours have many thousands.
        last = request.query_params.get("chunks") == "last"
        return JSONResponse({"object": "list", "data": [_told(n, host.get(n), last=last) for n in host.names()]})

    async def stream(request: Request) -> Response:
        name = request.path_params["name"]
        if request.method == "DELETE":
            host.end(name)
            return JSONResponse({"id": name, "object": "stream", "deleted": True})
        return JSONResponse(_told(name, host.get(name)))

    async def thumbnail(request: Request) -> Response:
        live = host.get(request.path_params["name"])
        picture = await asyncio.to_thread(live.thumbnail, request.path_params["number"])
        return Response(picture, media_type="image/png", headers={"cache-control": "no-store"})

    async def grown(request: Request) -> Response:
        live = host.get(request.path_params["name"])
        return StreamingResponse(_plain_video(live), media_type="video/mp4", headers={"cache-control": "no-store"})

    async def whole(request: Request) -> Response:
        name = request.path_params["name"]
        made = await asyncio.wrap_future(host.whole(name))
        return FileResponse(made, media_type="video/mp4", filename=f"rehyat-{name}.mp4")

    async def state(request: Request) -> Response:
        name = request.path_params["name"]
        await asyncio.wrap_future(host.save(name))
        return FileResponse(
            host.state_of(name),
            media_type="application/octet-stream",
            filename=f"rehyat-{name}.stream.safetensors",
        )

    async def socket(connection: WebSocket) -> None:
        await realtime(connection, host)

    async def mistake(_: Request, error: Exception) -> Response:
        missing = str(error).startswith("there is no such")
        body = {"error": {"message": str(error), "type": "invalid_request_error"}}
        if isinstance(error, Full):
            return JSONResponse(body, status_code=503, headers={"retry-after": "10"})
        return JSONResponse(body, status_code=404 if missing else 400)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(host.close)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/about", described),
            Route("/v1/streams", streams, methods=["GET", "POST"]),
            Route("/v1/streams/{name}.mp4", grown),
            *playlist_routes(host),
            Route("/v1/streams/{name}", stream, methods=["GET", "DELETE"]),
            Route("/v1/streams/{name}/whole.mp4", whole),
            Route("/v1/streams/{name}/state", state),
            Route("/v1/streams/{name}/thumbnails/{number:int}.png", thumbnail),
            *video_routes(host, [about.model, *(m.name for m in about.models if m.name != about.model)]),
            WebSocketRoute("/v1/realtime/video", socket),
            Mount("/page", StaticFiles(directory=_PAGE)),
        ],
        middleware=[Middleware(Guard, access=access or Access())],
        exception_handlers={RehyatError: mistake},
        lifespan=lifespan,
    )


async def _plain_video(live: LiveStream) -> AsyncIterator[bytes]:
    """The file as it grows, from its beginning, for a player without a script; it ends where the stream is rewound."""
    loop, something = asyncio.get_running_loop(), asyncio.Event()
    unwatch, viewer = live.watch(lambda: loop.call_soon_threadsafe(something.set)), live.join(position=0.0)
    epoch, number = live.epoch, 0
    try:
        while not live.closed and live.epoch == epoch:
            something.clear()
            data = live.fragment(number, epoch=epoch)
            if data is None:
                await something.wait()
                continue
            yield data if number else live.head + data
            number += 1
    finally:
        unwatch()
        viewer.close()


def _told(name: str, live: LiveStream, *, last: bool = False) -> dict[str, Any]:
    chunks = [
        {"number": c.number, "first_frame": c.first_frame, "frames": c.frames, "prompt": c.prompt, "seconds": c.seconds}
        for c in (live.chunks[-1:] if last else live.chunks)
    ]
    return {
        "id": name,
        "object": "stream",
        "prompt": live.prompt,
        "frames": live.frames,
        "viewers": live.viewers,
        "closed": live.closed,
        "chunks": chunks,
    }


def _metric(name: str, kind: str, about: str, value: float | int) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}", f"{name} {value}"]
