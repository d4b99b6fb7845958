"""Asks an ASGI application of this process, without a socket. Knows no route."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Message

_LEAVE_S = 2.0  # that an application has to end by itself once its client is gone
_AHEAD = 64  # pieces of an answer that wait for whoever reads it


@dataclass(frozen=True)
class Asked:
    """A whole HTTP request. `blocks`, keys of the beginning of its text, and `avoid` are for a router (serve/prefix_index.py)."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    client: tuple[str, int] | None = None
    blocks: tuple[bytes, ...] = ()
    avoid: tuple[str, ...] = ()  # replicas that could not answer it


@dataclass(frozen=True)
class Head:
    """How an answer begins."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]


async def ask(app: ASGIApp, asked: Asked) -> AsyncGenerator[Head | bytes, None]:
    """The answer of `app`: its head, then its body as it is made. Closing the generator is a client that leaves.

    Raises what the application raises.
    """
    gone = asyncio.Event()
    messages: asyncio.Queue[Message | None] = asyncio.Queue(_AHEAD)
    unread: list[Message] = [{"type": "http.request", "body": asked.body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(_scope(asked), receive, messages.put)
        finally:
            if not gone.is_set():
                await messages.put(None)

    task = asyncio.create_task(run())
    try:
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                yield Head(message["status"], tuple((bytes(name), bytes(value)) for name, value in message["headers"]))
            elif body := message.get("body"):
                yield bytes(body)
        await task
    finally:
        gone.set()
        await _ended(task, messages)


async def _ended(task: asyncio.Task[None], messages: asyncio.Queue[Message | None]) -> None:
    """Let the application see that its client is gone, and read what it still says."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _LEAVE_S
    while not task.done() and loop.time() < until:
        while not messages.empty():
            messages.get_nowait()
        await asyncio.wait({task}, timeout=0.01)
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # nobody is there to be told


async def whole(app: ASGIApp, asked: Asked) -> tuple[Head, bytes]:
    """The answer when it is complete."""
    head, body = Head(500, ()), b""
    async for piece in ask(app, asked):
        if isinstance(piece, Head):
            head = piece
        else:
            body += piece
    return head, body


def header(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> bytes:
    """A header's value, empty where there is none. Names are in lower case, as ASGI has them."""
    return next((value for key, value in headers if key == name), b"")


def _scope(asked: Asked) -> dict[str, object]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "raw_path": asked.path.encode("utf-8", "surrogateescape"),
        "query_string": asked.query,
        "root_path": "",
        "headers": list(asked.headers),
        "client": asked.client,
        "server": None,
        "state": {},
    }
