"""The manifests' probes, asked of a real server as a kubelet would: while it loads, under load, dead, stuck, and while it drains."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from ..test_end_to_end import Server, start
from .test_manifests import rendered

pytestmark = [
    pytest.mark.long,
    pytest.mark.needs_embedded_model,
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl (Debian's package kubernetes-client) is not installed"),
]

FASTER = 10  # periods are shorter by this, so that a test takes seconds; timeouts are not
SILENT_S = 20  # of an engine, until /livez is red


@dataclass
class Kubelet:
    """Plays one container's probes. `restarts` and `is_ready` are what it would do."""

    probes: dict[str, Any]
    url: Callable[[], str]
    has_started: bool = False
    is_ready: bool = False
    restarts: list[float] = field(default_factory=list)
    was_unready: int = 0

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _ask(self, name: str) -> bool:
        probe = self.probes[name]
        try:
            answer = httpx.get(self.url() + probe["httpGet"]["path"], timeout=probe["timeoutSeconds"])
            return 200 <= answer.status_code < 400
        except httpx.HTTPError:
            return False

    def _run(self) -> None:
        failed = dict.fromkeys(self.probes, 0)
        due = dict.fromkeys(self.probes, 0.0)
        while not self._ended.wait(0.02):
            for name in ("livenessProbe", "readinessProbe") if self.has_started else ("startupProbe",):
                if time.monotonic() < due[name]:
                    continue
                due[name] = time.monotonic() + self.probes[name]["periodSeconds"] / FASTER
                failed[name] = 0 if (holds := self._ask(name)) else failed[name] + 1
                is_over = failed[name] >= self.probes[name]["failureThreshold"]
                if name == "startupProbe":
                    self.has_started = holds
                if name == "readinessProbe" and (holds or is_over):
                    self.was_unready += self.is_ready and not holds
                    self.is_ready = holds
                if name != "readinessProbe" and is_over:
                    self.restarts.append(time.monotonic())
                    failed[name] = 0


@pytest.fixture
def probes() -> dict[str, Any]:
    (container,) = rendered("cpu")["Deployment/octavo"]["spec"]["template"]["spec"]["containers"]
    return {name: container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")}


@pytest.fixture
def pod(probes: dict[str, Any], tmp_path: Path) -> Iterator[tuple[Server, Kubelet]]:
    """A server and its kubelet, which asks from before it listens."""
    url = [f"http://127.0.0.1:{_free_port()}"]
    kubelet = Kubelet(probes, lambda: url[0])
    time.sleep(3 * probes["startupProbe"]["periodSeconds"] / FASTER)
    assert not kubelet.has_started
    server = start(tmp_path, "--port", url[0].rpartition(":")[2], "--num-threads", "1", "--shutdown-timeout", "20")
    wait(lambda: kubelet.is_ready, 20)
    assert kubelet.restarts == []  # while it loaded
    yield server, kubelet
    kubelet.close()
    if server.process.poll() is None:
        server.process.kill()
    server.process.wait(20)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def wait(holds: Callable[[], bool], seconds: float) -> float:
    """Until it holds; gives the seconds that it took."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < seconds
        time.sleep(0.02)
    return time.monotonic() - started


def ask(server: Server, tokens: int) -> httpx.Response:
    body = {"prompt": "Once", "max_tokens": tokens, "ignore_eos": True}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)


def test_a_slow_model_is_given_its_time(probes: dict[str, Any], tmp_path: Path) -> None:
    """The engine gets nothing done for 150 s, by the probes' time: a disk that stalls, a model of a hundred gigabytes."""
    port = _free_port()
    kubelet = Kubelet(probes, lambda: f"http://127.0.0.1:{port}")
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(start, tmp_path, "--port", f"{port}", "--num-threads", "1")
        wait(lambda: bool(_engines(port)), 30)
        (engine,) = _engines(port)
        engine.suspend()
        time.sleep(150 / FASTER)
        assert (kubelet.has_started, kubelet.is_ready, kubelet.restarts) == (False, False, [])
        engine.resume()
        server = starting.result()
    wait(lambda: kubelet.is_ready, 10)
    assert kubelet.restarts == []
    kubelet.close()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0


def _engines(port: int) -> list[psutil.Process]:
    """Those of the server on this port, while it starts."""
    servers = [child for child in psutil.Process().children() if str(port) in child.cmdline()]
    return [child for server in servers for child in server.children()]


def test_a_busy_pod_is_left_alone_and_a_draining_one_gets_no_traffic(pod: tuple[Server, Kubelet]) -> None:
    server, kubelet = pod
    with ThreadPoolExecutor(48) as pool:
        answers = [pool.submit(ask, server, 40) for _ in range(48)]
        assert {answer.result().status_code for answer in answers} == {200}
        assert (kubelet.restarts, kubelet.was_unready, kubelet.is_ready) == ([], 0, True)
        running = pool.submit(ask, server, 150)
        time.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        wait(lambda: not kubelet.is_ready, 5)
        assert not running.done()
        assert ask(server, 1).status_code == 503
        assert running.result().json()["usage"]["completion_tokens"] == 150
    assert server.process.wait(20) == 0


def test_a_stuck_engine_is_restarted_in_time(pod: tuple[Server, Kubelet], probes: dict[str, Any]) -> None:
    server, kubelet = pod
    os.kill(server.engine_pid, signal.SIGSTOP)
    live = probes["livenessProbe"]
    took = wait(lambda: bool(kubelet.restarts), 60)
    assert SILENT_S - 1 < took < SILENT_S + (live["failureThreshold"] + 1) * live["periodSeconds"] / FASTER + 2
    assert not kubelet.is_ready


def test_a_dead_engine_ends_its_pod(pod: tuple[Server, Kubelet]) -> None:
    server, kubelet = pod
    os.kill(server.engine_pid, signal.SIGKILL)
    wait(lambda: not kubelet.is_ready, 3)
    assert server.process.wait(20) == 1  # for the kubelet to start it again
