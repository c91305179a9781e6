"""Who may ask, and how much may be sent: looked at before a request is read."""

import hmac
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import orjson
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmtune.config.serving import KEY_VARIABLE, LOOPBACK, ServeSettings
from glmtune.errors import UserError
from glmtune.serving.errors import RequestError

if TYPE_CHECKING:  # a server that shows a run alone needs no torch
    from glmtune.serving.metrics import Metrics

PUBLIC = ("/health", "/ready", "/", "/run")
"""Paths that need no key, because probes and browsers cannot send one."""
PUBLIC_FOLDER = "/page/"
"""What is below it needs none either: the page's own files, which hold nothing private."""
RUN_FILES = "/run/files/"
"""What is below it opens by `session_of` the key in a cookie as well: a tab cannot send a key."""
COOKIE = "glmtune_run"


def key_of(settings: ServeSettings) -> str | None:
    """The key that clients have to send; None without one."""
    return settings.api_key or os.environ.get(KEY_VARIABLE) or None


def session_of(key: str) -> str:
    """What a cookie holds in place of the key, which nobody finds by it."""
    return hmac.new(key.encode(), COOKIE.encode(), "sha256").hexdigest()


def check_address(settings: ServeSettings) -> None:
    """Refuse an address that other machines reach without a key.

    Raises:
        UserError: there is neither a key nor the wish to do without.
    """
    if settings.host in LOOPBACK or settings.insecure or key_of(settings):
        return
    raise UserError(
        f"--host {settings.host}: other machines could ask without a key; set the environment's "
        f"{KEY_VARIABLE} or --api_key, or say --insecure true"
    )


class Guards:
    """ASGI middleware: key, origin, host and size of a request.

    A page of another origin must not use the server of whoever looks at it, with or without reading
    the answer. So an `Origin` has to be the server's own or allowed, and at a loopback address
    without a key, `Host` has to be a name of this machine, which a rebound name is not.

    Args:
        app: what is guarded.
        settings: of the server.
        metrics: that count requests; None where nobody counts.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: "Metrics | None" = None):
        self.app, self.settings, self.metrics = app, settings, metrics
        key = key_of(settings)
        self._key = key.encode() if key else None
        self._session = session_of(key) if key else ""
        self._origins = set(settings.allow_origin or ())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with what is wrong."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        origin = headers.get("origin", b"").decode("latin-1")
        cross = self._cross_headers(origin)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(scope, message["status"])
                message["headers"] = [*message["headers"], *cross]
            await send(message)

        try:
            self._check(scope, headers, origin)
            if cross and scope["method"] == "OPTIONS":
                await _respond(send, 204, b"", cross)
                return
            body = await self._read(headers, receive)
        except RequestError as error:
            self._count(scope, error.status)
            extra = [(k.encode(), v.encode()) for k, v in error.headers.items()]
            await _respond(send, error.status, orjson.dumps(error.body()), [*cross, *extra])
            return
        given = False

        async def receive_read() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_read, send_with_headers)

    def _count(self, scope: Scope, status: int) -> None:
        if self.metrics is not None:
            self.metrics.count(scope["path"], status)

    def _check(self, scope: Scope, headers: dict[str, bytes], origin: str) -> None:
        host = headers.get("host", b"").decode("latin-1")
        if origin and origin not in self._origins and origin.partition("://")[2] != host:
            message = "pages of other origins may not ask; see --allow_origin"
            raise RequestError(403, message, code="origin_not_allowed")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        at_home = self.settings.host in LOOPBACK and self._key is None
        if at_home and name.strip("[]") not in LOOPBACK:
            message = "this server is asked as localhost or 127.0.0.1 only"
            raise RequestError(403, message, code="host_not_allowed")
        path = scope["path"]
        is_public = path in PUBLIC or path.startswith(PUBLIC_FOLDER)
        if self._key is None or is_public or (scope["method"] == "OPTIONS" and origin):
            return
        if path.startswith(RUN_FILES) and self._has_session(headers):
            return
        scheme, _, given = headers.get("authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            raise RequestError(
                401,
                "the key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _has_session(self, headers: dict[str, bytes]) -> bool:
        """Whether a request comes from a browser that has sent the key before."""
        given = cookie_parser(headers.get("cookie", b"").decode("latin-1")).get(COOKIE, "")
        return hmac.compare_digest(given.encode(), self._session.encode())

    async def _read(self, headers: dict[str, bytes], receive: Receive) -> bytes:
        """The body of a request.

        Raises:
            RequestError: it is longer than may be sent.
        """
        most = self.settings.max_body_bytes
        error = RequestError(
            413, f"the body has more than {most} bytes, which may be sent", code="body_too_large"
        )
        length = headers.get("content-length", b"0")
        if not length.isdigit() or int(length) > most:
            raise error
        parts, received, more = [], 0, True
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            received += len(parts[-1])
            more = message.get("more_body", False)
            if received > most:
                raise error
        return b"".join(parts)

    def _cross_headers(self, origin: str) -> list[tuple[bytes, bytes]]:
        if origin not in self._origins:
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"vary", b"origin"),
        ]


async def _respond(
    send: Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]]
) -> None:
    given = [(b"content-length", str(len(body)).encode()), *headers]
    if body:
        given.append((b"content-type", b"application/json"))
    await send({"type": "http.response.start", "status": status, "headers": given})
    await send({"type": "http.response.body", "body": body, "more_body": False})
