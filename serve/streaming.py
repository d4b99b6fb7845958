"""Answering over a socket that may go away: server-sent events, and work that ends when its client does. Knows no API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from .errors import ApiError, error_response, failed
from .exchange import Exchange

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
to_json: Callable[[Any], bytes] = msgspec.json.encode


def event(payload: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(payload) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The end of a stream that fails."""
    return event(error.body) + DONE


def json_response(payload: Any, status_code: int = 200) -> Response:
    return Response(to_json(payload), status_code, media_type="application/json")


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled and awaited when the client leaves first: then raises starlette's ClientDisconnect.

    The request's body must have been read before, so that all that `receive` can still tell is the disconnect.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.wait({task, watcher})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends what `events` yields as an event stream, and closes `events` however the exchange ends.

    The status line waits for the first event, so that a request refused by the engine still gets its proper status. A later
    error is sent as an event and [DONE].
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["state"]["exchange"]
        try:
            refusal = await until_disconnect(receive, self._send_events(send, exchange))
        except ClientDisconnect as error:
            failed(error, exchange)
            return
        if refusal is not None:
            await refusal(scope, receive, send)

    async def _send_events(self, send: Send, exchange: Exchange) -> Response | None:
        async with aclosing(self._events) as events:
            try:
                first = await anext(events)
            except Exception as error:
                return error_response(error, exchange)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            await self._send_rest(events, send, exchange)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return None

    async def _send_rest(self, events: AsyncGenerator[bytes, None], send: Callable[[Any], Awaitable[None]], exchange: Exchange) -> None:
        try:
            async for chunk in events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            await send({"type": "http.response.body", "body": error_event(failed(error, exchange)), "more_body": True})
