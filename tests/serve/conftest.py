"""A real server on a real socket for the tests of serve/, with a scripted engine behind it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from octavo.serve.app import create_app
from octavo.serve.http_limits import LimitedHttp
from octavo.serve.options import ServerOptions

from .fake_engine import FakeEngine


@dataclass(frozen=True)
class Served:
    """One running server: where it is and what is behind it."""

    url: str
    engine: FakeEngine
    app: Any
    http: httpx.Client
    openai: openai.OpenAI

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def error(self, path: str, status_code: int, **body: Any) -> dict[str, Any]:
        """Post what must fail; the error of its nested body."""
        response = self.post(path, **body)
        assert response.status_code == status_code, response.text
        error: dict[str, Any] = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


@pytest.fixture(scope="session")
def start_server() -> Iterator[Callable[..., Served]]:
    """Start servers by options; all are stopped at the end."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(**options: Any) -> Served:
        engine = FakeEngine()
        app = create_app(engine, ServerOptions(**options))
        sock = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", http=LimitedHttp, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        running.append((server, thread))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
        return Served(url, engine, app, httpx.Client(base_url=url, timeout=20), client)

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(5)


@pytest.fixture(scope="session")
def shared_server(start_server: Callable[..., Served]) -> Served:
    return start_server()


@pytest.fixture
def served(shared_server: Served) -> Iterator[Served]:
    """The shared server with its engine as new. Whatever a test does, no request may be left behind."""
    shared_server.engine.reset()
    yield shared_server
    deadline = time.monotonic() + 3
    while shared_server.engine.live or len(shared_server.app.state.context.active):
        assert time.monotonic() < deadline, "a request was left in the engine"
        time.sleep(0.005)
