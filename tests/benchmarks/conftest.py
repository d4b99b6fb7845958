"""A fake OpenAI server with known delays, in a thread of its own. Speaks only as much HTTP as a benchmark client needs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class FakeServer:
    """What it does with a request is set by the fields; `requests` and `max_in_flight` tell what came in."""

    first_token_s: float = 0.0
    token_s: float = 0.0
    num_tokens: int | None = None  # None: what max_tokens asks for
    with_usage: bool = True
    cached_tokens: int = 0
    models: list[dict[str, Any]] | None = field(default_factory=lambda: [{"id": "fake-model"}])  # None: 404
    api_key: str | None = None
    fail: Callable[[int], str | None] = lambda number: None  # request number -> "status", "stream", "cut", "drop", "silent" or None
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)  # of the same, names in lower case
    max_in_flight: int = 0
    url: str = ""
    _in_flight: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            fields = {k.lower(): v for k, v in (line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)}
            if self.api_key is not None and fields.get("authorization") != f"Bearer {self.api_key}":
                self._answer(writer, 401, {"error": {"message": "wrong key"}})
            elif head.startswith("GET /v1/models ") and self.models is not None:
                self._answer(writer, 200, {"object": "list", "data": self.models})
            elif head.startswith("POST /v1/"):
                self.headers.append(fields)
                body = json.loads(await reader.readexactly(int(fields["content-length"])))
                await self._generate(writer, body, is_chat=head.startswith("POST /v1/chat/"))
            else:
                self._answer(writer, 404, {"detail": "Not Found"})
            await writer.drain()
        writer.close()

    def _answer(self, writer: asyncio.StreamWriter, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    async def _generate(self, writer: asyncio.StreamWriter, body: dict[str, Any], *, is_chat: bool) -> None:
        failure = self.fail(len(self.requests))
        self.requests.append(body)
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            if failure == "status":
                self._answer(writer, 503, {"error": {"message": "the queue is full", "type": "overloaded", "code": 503}})
            elif failure == "silent":
                await asyncio.sleep(30)
            elif failure != "drop":
                await self._stream(writer, body, is_chat=is_chat, failure=failure)
        finally:
            self._in_flight -= 1

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], *, is_chat: bool, failure: str | None) -> None:
        def send(data: str) -> None:
            event = f"data: {data}\n\n".encode()
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))

        def send_choice(text: str, finish: str | None, **delta: str) -> None:
            part = {"delta": {**delta, "content": text}} if is_chat else {"text": text}
            send(json.dumps({"id": "x", "choices": [{"index": 0, **part, "finish_reason": finish}]}))

        loop = asyncio.get_running_loop()
        due = loop.time() + self.first_token_s
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        if is_chat:
            send_choice("", None, role="assistant")
        num_tokens = self.num_tokens or body["max_tokens"]
        for number in range(num_tokens):
            await asyncio.sleep(max(0.0, due - loop.time()))
            due += self.token_s
            if number == 2 and failure == "stream":
                send(json.dumps({"error": {"message": "the engine died"}}))
            if number == 2 and failure:
                break
            last = number == num_tokens - 1 and not is_chat
            send_choice(f" w{number}", "length" if last else None)
        if is_chat and not failure:
            send_choice("", "length")
        if self.with_usage and not failure:
            prompt = body["prompt"] if not is_chat else body["messages"][0]["content"].split()
            usage = {"prompt_tokens": len(prompt), "completion_tokens": num_tokens}
            send(json.dumps({"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": self.cached_tokens}}}))
        if failure != "cut":
            send("[DONE]")
        writer.write(b"0\r\n\r\n")


@pytest.fixture
def fake_server() -> Iterator[Callable[..., FakeServer]]:
    """Start fake servers: `fake_server(token_s=0.01)`. They stop with the test."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def start(**fields: Any) -> FakeServer:
        server = FakeServer(**fields)
        listening = asyncio.run_coroutine_threadsafe(asyncio.start_server(server.serve, "127.0.0.1", 0), loop).result(10)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        return server

    async def stop() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    yield start
    asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
