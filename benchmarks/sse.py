"""One POST and its streamed answer over HTTP/1.1, each piece stamped on arrival. Knows no OpenAI format, decodes nothing while it listens.

Client and server often share a machine, so the client must cost little. At 64 streams on a 2-core host listening through httpx cost about
300 microseconds of CPU a streamed token, this file on uvloop about 30: at 1,000 tokens/s the difference is a quarter of a core taken from
the server under test. Events are therefore cut and decoded after the run. (benchmarks/README.md has the figures.)
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools

_EVENT_END = re.compile(rb"\r?\n\r?\n")


@dataclass(frozen=True)
class Event:
    """The data of one server-sent event and the moment (time.perf_counter) its last byte arrived."""

    time_s: float
    data: bytes


@dataclass(frozen=True)
class Exchange:
    """What went over the wire for one request. `error` is set when no complete answer came; times are time.perf_counter seconds."""

    start_s: float  # the request's first byte was handed to the kernel; the connection was open before
    end_s: float
    status: int = 0
    pieces: tuple[tuple[float, bytes], ...] = ()
    error: str | None = None

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    def events(self) -> list[Event]:
        """The complete server-sent events of the body. Comments and other fields than `data` are left out."""
        body, ends, total = self.body, [], 0
        for _, piece in self.pieces:
            total += len(piece)
            ends.append(total)
        events, start = [], 0
        for match in _EVENT_END.finditer(body):
            lines = body[start : match.start()].splitlines()
            data = b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))
            if data:
                events.append(Event(self.pieces[bisect_left(ends, match.end())][0], data))
            start = match.end()
        return events


class StreamingClient:
    """Posts JSON to one URL, a fresh connection for each request. Safe to use for many requests at once from one event loop."""

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, timeout_s: float = 600.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a URL that can be measured: it must begin with http:// or https:// and name a host")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._timeout_s = timeout_s
        fields = {
            "Host": parts.netloc.rpartition("@")[2],
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "Connection": "close",
        }
        fields.update(headers or {})
        lines = [f"POST {parts.path or '/'} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        self._head = "\r\n".join(lines).encode("latin-1")

    async def post(self, payload: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Exchange:
        """Send one request, with `headers` of its own, and wait for the end of its answer.

        Never raises for what the network or the server does: see Exchange.error.
        """
        body = json.dumps(payload).encode()
        head = b"".join([self._head, *(f"\r\n{name}: {value}".encode("latin-1") for name, value in (headers or {}).items())])
        listener = _Listener(asyncio.get_running_loop())
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                transport = await self._connect(listener)
                begun = time.perf_counter()
                transport.write(b"%b\r\nContent-Length: %d\r\n\r\n%b" % (head, len(body), body))
                await listener.done
        except TimeoutError:
            listener.error = f"no complete answer within {self._timeout_s:g} s"
        except OSError as error:
            listener.error = f"connection failed: {error}"
        finally:
            listener.close()
        return Exchange(begun, time.perf_counter(), listener.status, tuple(listener.pieces), listener.error)

    async def _connect(self, listener: _Listener) -> asyncio.Transport:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: listener, self._host, self._port, ssl=self._ssl)
        return transport


class _Listener(asyncio.Protocol):
    """Collects the answer of one request. The on_* methods are httptools' callbacks."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self.pieces: list[tuple[float, bytes]] = []
        self.status = 0
        self.error: str | None = None
        self._now = 0.0
        self._complete = False
        self._transport: asyncio.BaseTransport | None = None
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(f"the server's answer is not HTTP: {error}")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        self._complete = True
        self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(f"the server closed the connection before its answer was complete{f': {exc}' if exc else ''}")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _finish(self, error: str | None) -> None:
        if not self.done.done():
            self.error = error
            self.done.set_result(None)
