"""Limits on what a client may send and how slowly: bytes of headers and body, seconds for each. Knows no route."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from typing import Any

import httptools
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError, error_response
from .exchange import Exchange

logger = logging.getLogger("octavo.serve")

MAX_HEAD_BYTES, MAX_HEADERS = 64 << 10, 256
HEAD_TIMEOUT_S = 30.0
BODY_TIMEOUT_S = 120.0


class LimitedHttp(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which by itself takes headers and trailers without end, for as long as their client likes.

    What is neither a complete head nor a piece of a body is counted, and a connection on which nothing is being answered has to bring a
    complete head in time.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._loose_bytes = 0  # since the last head was complete, or the last piece of a body
        self._num_headers = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._arm()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _arm(self) -> None:
        """Give the connection so long to bring a complete head, from now; it counts only while nothing is being answered."""
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._out_of_time)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _out_of_time(self) -> None:
        self._deadline = None
        if self._is_answering:
            self._arm()
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        self._loose_bytes += len(data)
        super().data_received(data)
        if self.parser is None or self.transport.is_closing():
            return
        if self._loose_bytes > MAX_HEAD_BYTES and self._is_answering:  # trailers without end: there is an answer already
            self.transport.close()
        elif self._loose_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The request's headers are too large.")
        elif not self._is_answering:
            self._arm()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or too much of it, is answered and told with an id like any other failure."""
        exchange = Exchange(uuid.uuid4().hex, "-", "-")
        error = ApiError(msg, code="invalid_http")
        exchange.fail(400, msg)
        body = json.dumps(error.body).encode()
        head = ("HTTP/1.1 400 Bad Request", "content-type: application/json", f"content-length: {len(body)}", "connection: close")
        self.transport.write("\r\n".join((*head, f"x-request-id: {exchange.request_id}", "", "")).encode() + body)
        self.transport.close()
        exchange.log(logger)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_headers = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            raise httptools.HttpParserError("too many headers")

    def on_headers_complete(self) -> None:
        self._loose_bytes = 0
        self._disarm()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._loose_bytes = 0
        super().on_body(body)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
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
