"""Applications asked without a socket: heads, bodies as they are made, clients that leave, applications that fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from octavo.serve.in_process import Asked, Head, ask, header, whole

app = FastAPI()
left: list[str] = []


@app.post("/echo")
async def echo(request: Request) -> dict[str, object]:
    return {
        "body": (await request.body()).decode(),
        "query": request.url.query,
        "agent": request.headers["user-agent"],
        "client": request.client and request.client.host,
    }


@app.get("/count")
async def count(pause: float = 0.0) -> StreamingResponse:
    async def numbers() -> AsyncIterator[str]:
        try:
            for number in range(200):
                yield f"{number},"
                await asyncio.sleep(pause)
        except asyncio.CancelledError:
            left.append("count")
            raise

    return StreamingResponse(numbers())


@app.get("/fail")
async def fail() -> None:
    raise RuntimeError("as asked")


@app.get("/deaf")
async def deaf() -> None:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        left.append("deaf")
        raise


def asked(method: str, path: str, query: bytes = b"", body: bytes = b"") -> Asked:
    headers = ((b"user-agent", b"tests"), (b"content-length", str(len(body)).encode()))
    return Asked(method, path, query, headers, body, ("10.0.0.9", 5))


async def test_a_request_arrives_whole() -> None:
    head, body = await whole(app, asked("POST", "/echo", b"a=1", b"hello"))
    assert head.status == 200
    assert header(head.headers, b"content-type") == b"application/json"
    assert header(head.headers, b"x-nothing") == b""
    assert body == b'{"body":"hello","query":"a=1","agent":"tests","client":"10.0.0.9"}'
    assert (await whole(app, asked("GET", "/nowhere")))[0].status == 404


async def test_pieces_come_as_they_are_made() -> None:
    pieces = [piece async for piece in ask(app, asked("GET", "/count"))]
    assert isinstance(pieces[0], Head)
    assert pieces[1:] == [f"{number},".encode() for number in range(200)]


async def test_who_leaves_ends_the_work() -> None:
    left.clear()
    answer = ask(app, asked("GET", "/count", b"pause=0.01"))
    for _ in range(3):
        await anext(answer)
    await answer.aclose()
    assert left == ["count"]


async def test_an_application_that_does_not_notice_is_cancelled() -> None:
    left.clear()
    answer = ask(app, asked("GET", "/deaf"))
    waiting = asyncio.ensure_future(anext(answer))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await answer.aclose()
    assert left == ["deaf"]


async def test_what_the_application_raises_is_raised() -> None:
    with pytest.raises(RuntimeError, match="as asked"):
        await whole(app, asked("GET", "/fail"))
