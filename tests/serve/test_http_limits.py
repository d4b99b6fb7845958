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


def test_many_small_headers_cost_little(served):
    started = time.monotonic()
    with connect(served) as sock:
        try:
            sock.sendall(b"GET /health HTTP/1.1\r\n" + b"a:\r\n" * 60000)
            answer(sock)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert time.monotonic() - started < 2


def test_trailers_without_end(served):
    with connect(served) as sock:
        sock.sendall(b"POST /nope HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Long: ")
        sent = 0
        try:
            for _ in range(200):
                sock.sendall(b"a" * 65536)
                sent += 1
                time.sleep(0.001)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 200


@pytest.mark.parametrize(
    "rest", [b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"]
)
def test_a_byte_after_an_early_answer_does_not_keep_the_connection(start_server, monkeypatch, rest):
    monkeypatch.setattr(http_limits, "HEAD_TIMEOUT_S", 0.3)
    server = start_server(api_keys=("secret",))
    started = time.monotonic()
    with connect(server) as sock:
        sock.sendall(rest)
        assert sock.recv(65536).startswith((b"HTTP/1.1 401", b"HTTP/1.1 200"))
        try:
            sock.sendall(b"\r")
            answer(sock)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert time.monotonic() - started < 4


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
