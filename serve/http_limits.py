"""Limits on what a client may send and how slowly: bytes of headers and body, seconds for each. Knows no route."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError, error_response

MAX_HEAD_BYTES = 64 << 10
HEAD_TIMEOUT_S = 30.0
BODY_TIMEOUT_S = 120.0


class LimitedHttp(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which by itself takes headers without end, for as long as their client likes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_head()
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._out_of_time)

    def _begin_head(self) -> None:
        self._in_head, self._head_bytes = True, 0

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES + len(data):  # a header that does not end; others are counted below
                self.send_400_response("The request's headers are too large.")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begin_head()
        if self._deadline.cancelled():
            self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._out_of_time)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if sum(len(key) + len(content) for key, content in self.headers) > MAX_HEAD_BYTES:
            raise httptools.HttpParserError("headers too large")

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._deadline.cancel()
        super().on_headers_complete()

    def _out_of_time(self) -> None:
        self._deadline.cancel()
        if self._in_head and not self.transport.is_closing():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)


class BodyLimit:
    """Refuses a body above `max_bytes` with 413, and one that takes longer than BODY_TIMEOUT_S to arrive with 408."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await error_response(self._too_large(), scope["state"]["exchange"])(scope, receive, send)
            return
        await self._app(scope, _Counted(receive, self).next, send)

    def _too_large(self) -> ApiError:
        return ApiError(
            f"the body is larger than {self._max_bytes >> 20} MiB: send less at once, or start the server with a larger --max-body-mib",
            status_code=413,
            code="body_too_large",
        )

    def check(self, num_bytes: int) -> None:
        """Raises ApiError 413."""
        if num_bytes > self._max_bytes:
            raise self._too_large()


class _Counted:
    """What a request's `receive` gives, until its body is complete against the limits."""

    def __init__(self, receive: Receive, limit: BodyLimit) -> None:
        self._receive, self._limit = receive, limit
        self._num_bytes = 0
        self._complete = False
        self._until: float | None = None

    async def next(self) -> Message:
        if self._complete:
            return await self._receive()
        loop = asyncio.get_running_loop()
        self._until = self._until or loop.time() + BODY_TIMEOUT_S
        try:
            async with asyncio.timeout_at(self._until):
                message: dict[str, Any] = dict(await self._receive())
        except TimeoutError:
            told = f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
            raise ApiError(told, status_code=408, code="body_timeout") from None
        self._num_bytes += len(message.get("body", b""))
        self._limit.check(self._num_bytes)
        self._complete = not message.get("more_body", False)
        return message
