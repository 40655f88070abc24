"""A live stream as HLS (RFC 8216): a playlist that grows and the fragments it names, for players that take no other."""

from __future__ import annotations

import math
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rehyat_jax.errors import RehyatError
from rehyat_jax.serve.host import Host
from rehyat_jax.serve.live import LiveStream

#: Seconds that such a player has ready before it begins: three of its targets, of a second, and one under way.
_LEAD = 4.0
_FRESH = {"cache-control": "no-store"}


def playlist_routes(host: Host) -> list[Route]:
    """The routes ``/v1/streams/ID.m3u8`` and, named by it, ``/v1/streams/ID/EPOCH/head.mp4`` and ``…/N.m4s``."""

    async def playlist(request: Request) -> Response:
        name = request.path_params["name"]
        live = host.get(name)
        live.join_asking(_LEAD)
        token = request.query_params.get("token")
        text = playlist_of(live, name, query=f"?token={quote(token, safe='')}" if token else "")
        return Response(text, media_type="application/vnd.apple.mpegurl", headers=_FRESH)

    async def part(request: Request) -> Response:
        """The head, or a fragment; those of before a rewind are gone."""
        asked = request.path_params
        live, number = host.get(asked["name"]), asked.get("number")
        data = live.fragment(number or 0, epoch=asked["epoch"])
        if data is None:
            raise RehyatError("there is no such chunk (any more)")
        return Response(live.head if number is None else data, media_type="video/mp4", headers=_FRESH)

    return [
        Route("/v1/streams/{name}.m3u8", playlist),
        Route("/v1/streams/{name}/{epoch:int}/head.mp4", part),
        Route("/v1/streams/{name}/{epoch:int}/{number:int}.m4s", part),
    ]


def playlist_of(live: LiveStream, name: str, *, query: str = "") -> str:
    """What there is now, from the beginning; ``query`` stands behind every address."""
    chunks, epoch, closed = live.chunks, live.epoch, live.closed
    longest = max((chunk.frames / live.pace.fps for chunk in chunks), default=1.0)
    lines = [
        "#EXTM3U",
        "#EXT-X-VERSION:7",
        f"#EXT-X-TARGETDURATION:{math.ceil(longest)}",
        "#EXT-X-PLAYLIST-TYPE:EVENT",
        "#EXT-X-INDEPENDENT-SEGMENTS",
        "#EXT-X-START:TIME-OFFSET=0",
    ]
    if chunks:
        lines.append(f'#EXT-X-MAP:URI="{name}/{epoch}/head.mp4{query}"')
    for chunk in chunks:
        lines += [f"#EXTINF:{chunk.frames / live.pace.fps:.5f},", f"{name}/{epoch}/{chunk.number}.m4s{query}"]
    return "\n".join([*lines, *(["#EXT-X-ENDLIST"] if closed else [])]) + "\n"
