"""Two replicas behind a real NGINX, as the guide puts them: streams pass through token by token, and a dead replica is passed over."""

from __future__ import annotations

import itertools
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from ..test_end_to_end import Server, start

pytestmark = [
    pytest.mark.long,
    pytest.mark.needs_embedded_model,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="NGINX (Debian's package nginx-light) is not installed"),
]

SHIPPED = Path(__file__).resolve().parents[2] / "deploy" / "nginx"
AROUND = """
pid {folder}/nginx.pid; error_log {folder}/error.log; daemon off; worker_processes 1;
events {{ worker_connections 256; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  {shipped}
}}
"""


def config_of(name: str, folder: Path, port: int, servers: list[Server]) -> str:
    """A shipped file with other addresses: as many replicas as there are."""
    shipped = (SHIPPED / name).read_text().replace("listen 80;", f"listen 127.0.0.1:{port};")
    for number in (1, 2, 3):
        line = re.compile(rf"^ *server octavo-{number}:30000.*\n", re.MULTILINE)
        assert len(line.findall(shipped)) == 2
        address = servers[number - 1].url.removeprefix("http://") if number <= len(servers) else None
        shipped = line.sub(lambda found, to=address, n=number: found[0].replace(f"octavo-{n}:30000", to) if to else "", shipped)
    return AROUND.format(folder=folder, shipped=shipped)


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


@contextmanager
def proxy(name: str, replicas: list[Server], folder: Path) -> Iterator[str]:
    """NGINX with a shipped file; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = folder / "nginx.conf"
    file.write_text(config_of(name, folder, port, replicas))
    with subprocess.Popen(["nginx", "-c", str(file), "-p", str(folder)]) as nginx:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 10
        try:
            while True:
                try:
                    httpx.get(f"{url}/health")
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < deadline
                    assert nginx.poll() is None
                    time.sleep(0.05)
            yield url
        finally:
            nginx.terminate()


def served(replicas: list[Server]) -> list[int]:
    return [httpx.get(f"{server.url}/stats").json()["requests_served"] for server in replicas]


def ask(url: str, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers, timeout=60)


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
