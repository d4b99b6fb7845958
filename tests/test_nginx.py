"""Two replicas behind a real NGINX, as the guide puts them: streams pass through token by token, and a dead replica is passed over."""

from __future__ import annotations

import itertools
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from .test_end_to_end import Server, start

pytestmark = [
    pytest.mark.long,
    pytest.mark.needs_embedded_model,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="NGINX (Debian's package nginx-light) is not installed"),
]

CONFIG = """
pid {folder}/nginx.pid; error_log {folder}/error.log; daemon off; worker_processes 1;
events {{ worker_connections 256; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream replicas {{ least_conn; {servers} }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://replicas; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_read_timeout 300s; proxy_connect_timeout 10s; proxy_buffering off; proxy_cache off;
      proxy_next_upstream error timeout http_503 non_idempotent;
    }}
    location /metrics {{ deny all; }}
  }}
}}
"""


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Server]]:
    started = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        started.append(start(tmp_path / name, "--num-threads", "1", "--max-running-requests", "8"))
    yield started
    for server in started:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)


@pytest.fixture
def proxy(replicas: list[Server], tmp_path: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    servers = " ".join(f"server {server.url.removeprefix('http://')} max_fails=3 fail_timeout=30s;" for server in replicas)
    file = tmp_path / "nginx.conf"
    file.write_text(CONFIG.format(folder=tmp_path, servers=servers, port=port))
    with subprocess.Popen(["nginx", "-c", str(file), "-p", str(tmp_path)]) as nginx:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 10
        while True:
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.ConnectError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield url
        nginx.terminate()


def test_streams_pass_and_a_dead_replica_is_passed_over(replicas: list[Server], proxy: str) -> None:
    client = openai.OpenAI(base_url=f"{proxy}/v1", api_key="none", max_retries=0)
    arrivals = []
    wish = {"model": "default", "prompt": "Once upon a time", "max_tokens": 24}
    for chunk in client.completions.create(**wish, stream=True, extra_body={"ignore_eos": True}):
        if chunk.choices and chunk.choices[0].text:
            arrivals.append(time.monotonic())
    assert len(arrivals) > 12
    assert sum(later - sooner > 0.001 for sooner, later in itertools.pairwise(arrivals)) > 8  # not out of a buffer, all at once
    for _ in range(8):
        client.completions.create(model="default", prompt="a", max_tokens=1)
    served = [httpx.get(f"{server.url}/stats").json()["requests_served"] for server in replicas]
    assert sum(served) == 9
    assert all(served)
    assert httpx.get(f"{proxy}/metrics").status_code == 403
    replicas[0].process.kill()
    replicas[0].process.wait()
    answers = [httpx.post(f"{proxy}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=60) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 6
    body = {"prompt": "a b c", "max_tokens": 4, "stream": True}
    with httpx.stream("POST", f"{proxy}/v1/completions", json=body, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
