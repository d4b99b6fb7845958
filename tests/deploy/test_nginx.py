"""Two replicas behind a real NGINX, as the guide puts them: streams pass through token by token, and a dead replica is passed over."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import openai
import pytest

from octavo.deploy.nginx.local import config_of, running

from ..test_end_to_end import Server, start

pytestmark = [
    pytest.mark.long,
    pytest.mark.needs_embedded_model,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="NGINX (Debian's package nginx-light) is not installed"),
]


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Server]]:
    started = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        started.append(start(tmp_path / name, "--num-threads", "1", "--max-running-requests", "8", "--max-queued-requests", "16"))
    yield started
    for server in started:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)


def proxy(name: str, replicas: list[Server], folder: Path) -> AbstractContextManager[str]:
    return running(name, [server.url for server in replicas], folder)


def served(replicas: list[Server]) -> list[int]:
    return [httpx.get(f"{server.url}/stats").json()["requests_served"] for server in replicas]


def ask(url: str, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers, timeout=60)


def test_each_replica_is_named_twice(tmp_path: Path) -> None:
    """Once for requests, once for those that are tried again."""
    for name in ("least-conn.conf", "affinity.conf"):
        text = config_of(name, ["http://a:1", "http://b:2/"], port=8080, folder=tmp_path)
        assert (text.count("server a:1 "), text.count("server b:2 "), text.count("octavo-")) == (2, 2, 0)
        assert "listen 127.0.0.1:8080;" in text
    with pytest.raises(ValueError, match="one to 3 servers, not 4"):
        config_of("affinity.conf", ["http://a:1"] * 4, port=8080, folder=tmp_path)
    for url in ("https://a:1", "http://a:1/v1", "http://a", "http://a:99999", "http://a:b", ":1"):
        with pytest.raises(ValueError, match="is no server's"):
            config_of("affinity.conf", [url], port=8080, folder=tmp_path)


def test_any_free_port_is_watched() -> None:
    program = str(Path(__file__).resolve().parents[2] / "deploy" / "nginx" / "local.py")
    with subprocess.Popen(
        [sys.executable, program, "affinity.conf", "--port", "0", "127.0.0.1:9"], stdout=subprocess.PIPE, text=True
    ) as nginx:
        try:
            assert nginx.stdout is not None
            url = nginx.stdout.readline().split()[2].rstrip(",")
            assert httpx.get(f"{url}/health", timeout=10).status_code == 502
            time.sleep(1.5)
            assert nginx.poll() is None
        finally:
            nginx.send_signal(signal.SIGINT)
    assert nginx.returncode == 0


def test_streams_pass_and_a_dead_replica_is_passed_over(replicas: list[Server], tmp_path: Path) -> None:
    with proxy("least-conn.conf", replicas, tmp_path) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        arrivals = []
        wish = {"model": "default", "prompt": "Once upon a time", "max_tokens": 24}
        for chunk in client.completions.create(**wish, stream=True, extra_body={"ignore_eos": True}):
            if chunk.choices and chunk.choices[0].text:
                arrivals.append(time.monotonic())
        assert len(arrivals) > 12
        assert sum(later - sooner > 0.001 for sooner, later in itertools.pairwise(arrivals)) > 8  # not out of a buffer, all at once
        for _ in range(8):
            assert ask(url).status_code == 200
        assert sum(served(replicas)) == 9
        assert all(served(replicas))
        assert [httpx.get(f"{url}/{name}").status_code for name in ("metrics", "flush_cache", "abort_request")] == [403] * 3
        with ThreadPoolExecutor(12) as pool:  # under load: what had not begun to be answered is answered by the other
            answers = [pool.submit(ask, url) for _ in range(12)]
            time.sleep(0.05)
            replicas[0].process.kill()
            assert [answer.result().status_code for answer in answers] == [200] * 12
        replicas[0].process.wait()
        assert [ask(url).status_code for _ in range(6)] == [200] * 6
        body = {"prompt": "a b c", "max_tokens": 4, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"


def test_a_full_replica_is_no_dead_one(replicas: list[Server], tmp_path: Path) -> None:
    """What is refused with 503 is tried once more, elsewhere; then the refusal reaches the client, Retry-After and all."""
    with proxy("least-conn.conf", replicas, tmp_path) as url, ThreadPoolExecutor(128) as pool:
        body = {"prompt": "a", "max_tokens": 48, "ignore_eos": True}
        answers = [pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=300) for _ in range(128)]
        found = [answer.result() for answer in answers]
        refused = [answer for answer in found if answer.status_code != 200]
        assert {answer.status_code for answer in refused} == {503}
        assert all(int(answer.headers["retry-after"]) > 0 and answer.json()["error"]["code"] == "queue_full" for answer in refused)
        assert all(before > 0 for before in served(replicas))
        assert ask(url).status_code == 200


class Stub(ThreadingHTTPServer):
    """Answers every POST with `status`, some time after it came; `asked` counts them."""

    daemon_threads = True
    asked = 0

    def __init__(self, status: int, seconds: float) -> None:
        server = self
        self.status = status

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:  # the base class's name
                self.rfile.read(int(self.headers["content-length"]))
                server.asked += 1
                time.sleep(seconds)
                self.send_response(server.status)
                self.send_header("Retry-After", "1")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.mark.parametrize("name", ["least-conn.conf", "affinity.conf"])
def test_what_one_replica_refuses_another_takes(name: str, tmp_path: Path) -> None:
    """One that refuses at once always looks the least busy; requests that others have room for are not lost to it."""
    stubs = [Stub(503, 0), Stub(200, 0.2), Stub(200, 0.2)]
    with running(name, [stub.url for stub in stubs], tmp_path) as url, ThreadPoolExecutor(8) as pool:
        found = [answer.status_code for answer in pool.map(lambda number: ask(url, **{"X-Session-Id": f"{number}"}), range(60))]
        assert found == [200] * 60
        assert stubs[0].asked > 10  # it is not left alone: it refuses for moments
        for stub in stubs:
            stub.status = 503
        refused = ask(url)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")


def test_a_session_stays_on_its_replica(replicas: list[Server], tmp_path: Path) -> None:
    with proxy("affinity.conf", replicas, tmp_path) as url:
        shares = set()
        for session in range(12):
            before = served(replicas)
            for _ in range(3):
                assert ask(url, **{"X-Session-Id": f"session {session}"}).status_code == 200
            came = tuple(now - then for now, then in zip(served(replicas), before, strict=True))
            assert sorted(came) == [0, 3]
            shares.add(came)
        assert len(shares) == 2  # both replicas have sessions
        replicas[0].process.kill()
        replicas[0].process.wait()
        for session in range(12):
            assert ask(url, **{"X-Session-Id": f"session {session}"}).status_code == 200
