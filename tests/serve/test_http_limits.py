"""Clients that send too much, or too slowly."""

from __future__ import annotations

import socket
import time

import pytest

from octavo.serve import http_limits

from .conftest import Served


def connect(served: Served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answer(sock: socket.socket) -> bytes:
    """What the server sends until it closes."""
    found = b""
    while part := sock.recv(65536):
        found += part
    return found


def test_a_body_that_is_too_large(start_server):
    server = start_server(max_body_mib=1)
    error = server.error("/v1/completions", 413, prompt="x" * (1 << 20))
    assert (error["code"], "--max-body-mib" in error["message"]) == ("body_too_large", True)

    def chunks():
        for _ in range(20):
            yield b" " * (1 << 17)

    response = server.http.post("/v1/completions", content=chunks())  # without a length that could be looked at first
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert server.post("/v1/completions", prompt="x" * 1000, max_tokens=1).status_code == 200
    assert server.engine.calls[-1].text == "x" * 1000


@pytest.mark.parametrize("head", [b"X-Long: " + b"a" * 10**6, b"".join(b"X-%d: a\r\n" % i for i in range(10**5))])
def test_headers_that_are_too_large(served, head):
    with connect(served) as sock:
        try:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n" + head)
            told = answer(sock)
        except (BrokenPipeError, ConnectionResetError):
            told = b"HTTP/1.1 400 "  # closed while we still sent
    assert told.startswith(b"HTTP/1.1 400 ")
    assert served.http.get("/health").status_code == 200


def test_headers_that_do_not_come(served, monkeypatch):
    monkeypatch.setattr(http_limits, "HEAD_TIMEOUT_S", 0.3)
    started = time.monotonic()
    with connect(served) as silent, connect(served) as slow:
        slow.sendall(b"GET /health HT")
        assert answer(silent) == b""
        assert answer(slow) == b""
    assert time.monotonic() - started < 5


def test_a_connection_that_is_kept_is_not_closed_for_that(served, monkeypatch):
    monkeypatch.setattr(http_limits, "HEAD_TIMEOUT_S", 0.2)
    with connect(served) as sock:
        for _ in range(3):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.3)


def test_a_body_that_does_not_come(served, monkeypatch):
    monkeypatch.setattr(http_limits, "BODY_TIMEOUT_S", 0.3)
    with connect(served) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        told = sock.recv(65536)
    assert told.startswith(b"HTTP/1.1 408 ")
    assert b"body_timeout" in told


def test_a_long_answer_outlives_the_bodys_time(served, monkeypatch):
    monkeypatch.setattr(http_limits, "BODY_TIMEOUT_S", 0.1)
    served.engine.delay_s = 0.05
    assert served.post("/v1/completions", prompt="a", max_tokens=10).status_code == 200
