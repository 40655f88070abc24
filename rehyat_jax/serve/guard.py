"""Who may talk to the server: Host, Origin and token are checked first; answers carry a strict policy."""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import Iterable
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOCAL = ("localhost", "127.0.0.1", "[::1]")
#: The page loads nothing from elsewhere, runs no inline script, and may not be framed.
_POLICY = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """Names under which the server is reached, its token if it wants one, and the largest body that it reads."""

    hosts: tuple[str, ...] = _LOCAL
    token: str | None = None
    most_bytes: int = 1 << 20
    #: The same of a saved stream that is handed in by ``POST /v1/streams``.
    most_state_bytes: int = 1 << 28

    def most(self, scope: Scope) -> int:
        takes_state = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == "/v1/streams"
        return self.most_state_bytes if takes_state else self.most_bytes


class Guard:
    """ASGI middleware: refuses foreign names (DNS rebinding), foreign pages, wrong tokens and large bodies."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refused = self._refused(Headers(scope=scope), scope)
        if refused is not None:
            await _refuse(scope, receive, send, *refused)
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_encoded(_POLICY.items())]
            await send(message)

        await self._app(scope, self._limited(receive, self._access.most(scope)), with_policy)

    def _refused(self, headers: Headers, scope: Scope) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if _name(host) not in self._access.hosts:
            return 403, "this host name is not the server's"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "another origin's page may not use this server"
        # Whoever restarts a server that does not answer knows no token, and learns nothing else.
        public = scope["type"] == "http" and scope["path"] == "/health"
        if self._access.token is not None and not public and not self._has_token(headers, scope):
            return 401, "a token is needed: Authorization: Bearer …, or ?token=…"
        length, most = headers.get("content-length") or "0", self._access.most(scope)
        if not length.isdecimal() or int(length) > most:
            return 413, f"a body may have {most} bytes"
        return None

    def _has_token(self, headers: Headers, scope: Scope) -> bool:
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if not given:
            given = (parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token") or [""])[0]
        return hmac.compare_digest(given.encode(), (self._access.token or "").encode())

    def _limited(self, receive: Receive, most: int) -> Receive:
        """A body without a length is cut off where it becomes too long."""
        got = 0

        async def limited() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > most:
                return {"type": "http.disconnect"}
            return message

        return limited


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[: host.find("]") + 1]
    return host.rsplit(":", 1)[0]


def _encoded(pairs: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in pairs]


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, why: str) -> None:
    response = JSONResponse({"error": {"message": why, "type": "forbidden"}}, status_code=status)
    if scope["type"] == "http":
        await response(scope, receive, send)
        return
    await receive()  # the connection's request
    if "websocket.http.response" in scope.get("extensions", {}):
        await response(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008, "reason": why})
