"""The server as a process: ready line, signals, a dying engine, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import octavo

from .fake_engine import wait_until

SCRIPT = Path(__file__).with_name("serve_fake.py")
ASK = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1000}


def _command(engine: dict[str, Any], *flags: str) -> list[str]:
    return [sys.executable, str(SCRIPT), json.dumps(engine), "--shutdown-timeout", "1", *flags]


@dataclass
class Process:
    popen: subprocess.Popen[str]
    ready: str
    url: str

    def stop(self, number: int, timeout_s: float = 10) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(timeout_s)


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    running: list[subprocess.Popen[str]] = []

    def run(*flags: str, **engine: Any) -> Process:
        command = _command(engine, "--port", "0", *flags)
        popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(popen)
        assert popen.stdout is not None
        ready = ""
        for line in popen.stdout:
            ready += line
            if "try it" in line:
                break
        url = re.search(r"http://127\.0\.0\.1:\d+", ready)
        assert url, ready
        return Process(popen, ready, url[0])

    yield run
    for popen in running:
        popen.kill()
        popen.communicate()


def _stream(process: Process, lines: list[str]) -> threading.Thread:
    """A client whose stream has begun: one that is stopped earlier gets a plain 503."""

    def read() -> None:
        with (
            suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", f"{process.url}/v1/chat/completions", json={**ASK, "stream": True}, timeout=20) as response,
        ):
            for line in response.iter_lines():
                if line:
                    lines.append(line)

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: bool(lines))
    return thread


def _active_jobs(process: Process) -> int:
    count: int = httpx.get(f"{process.url}/server_info").json()["active_jobs"]
    return count


def _wait_stopping(process: Process) -> None:
    """Until the first signal was taken: two that are pending together are one to the kernel."""

    def is_stopping() -> bool:
        try:
            return httpx.get(f"{process.url}/health").status_code == 503
        except httpx.TransportError:
            return True

    wait_until(is_stopping)


def test_ready_block_and_its_curl(start):
    process = start("--served-model-name", "nice", "--api-key", "s3cret")
    assert "nice" in process.ready
    assert "s3cret" not in process.ready
    command = process.ready.split("try it")[1].strip()
    answer = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "API_KEY": "s3cret"}, check=False, capture_output=True, text=True, timeout=10
    )
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == "Hello wörld!"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_with_zero(start, number):
    process = start()
    assert process.stop(number) == 0
    out, err = process.popen.communicate()
    assert "engine closed" in out
    assert "Traceback" not in err
    assert re.search(r"INFO octavo\.serve: stopped after 0:00:\d\d: 0 requests served\n", err), err


def test_the_first_and_the_last_line_of_the_log(start):
    process = start("some/model", "--device", "cpu", "--api-key", "s3cret", "--page-size", "32", "--host", "127.0.0.1")
    headers = {"Authorization": "Bearer s3cret"}
    for body in (ASK, {**ASK, "stream": True}, {"messages": "none"}):
        httpx.post(f"{process.url}/v1/chat/completions", json=body, headers=headers)
    httpx.get(f"{process.url}/health")
    process.stop(signal.SIGTERM)
    first, *_, last = process.popen.communicate()[1].splitlines()
    told = f"Octavo {octavo.__version__} starts: model some/model, device cpu, flags "
    assert first.endswith(f"INFO octavo.serve: {told}--device cpu --port 0 --api-key ... --shutdown-timeout 1.0 --page-size 32")
    assert re.search(r"INFO octavo\.serve: stopped after 0:00:\d\d: 2 requests served$", last)


def test_a_stream_may_finish_after_sigterm(start):
    process = start(delay_s=0.05)
    lines: list[str] = []
    thread = _stream(process, lines)
    assert process.stop(signal.SIGTERM) == 0
    thread.join(5)
    assert lines[-1] == "data: [DONE]"
    assert '"finish_reason":"stop"' in lines[-2]


def test_who_comes_while_a_stream_ends_is_sent_elsewhere(start):
    process = start("--shutdown-timeout", "10", delay_s=0.05, reply="x" * 40)
    lines: list[str] = []
    thread = _stream(process, lines)
    process.popen.send_signal(signal.SIGHUP)
    _wait_stopping(process)
    assert httpx.get(f"{process.url}/ready").status_code == 503
    assert httpx.head(f"{process.url}/livez").status_code == 200
    late = httpx.post(f"{process.url}/v1/completions", json={"prompt": "a"})
    assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
    assert int(late.headers["Retry-After"]) > 0
    thread.join(10)
    assert '"finish_reason":"stop"' in lines[-2]
    assert process.popen.wait(5) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("timeout", ["0", "0.4"])
def test_a_long_stream_is_cut_when_its_time_is_over(start, number, timeout):
    process = start("--shutdown-timeout", timeout, delay_s=0.05, reply="x" * 1000)
    lines: list[str] = []
    thread = _stream(process, lines)
    assert process.stop(number, 12) == 0
    thread.join(5)
    assert lines[-1] == "data: [DONE]"
    assert '"finish_reason":"abort"' in lines[-2]
    sent = sum('"content":"x"' in line for line in lines)
    err = process.popen.communicate()[1]
    told = rf"WARNING octavo\.serve: POST /v1/chat/completions 200 \(cut: the server stops\) in .* output_tokens={sent} finish=abort\n"
    assert re.search(told, err), err
    assert "time is over, cut 1 request; --shutdown-timeout gives more" in err


def test_a_stream_that_ends_in_time_was_not_cut(start):
    process = start("--shutdown-timeout", "5", delay_s=0.05)
    thread = _stream(process, [])
    assert process.stop(signal.SIGINT) == 0
    thread.join(5)
    err = process.popen.communicate()[1]
    assert re.search(r"INFO octavo\.serve: POST /v1/chat/completions 200 in .* finish=stop\n", err), err
    assert "WARNING" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_stream_with_an_error(start, number, code):
    process = start(delay_s=0.05, reply="x" * 1000)
    lines: list[str] = []
    thread = _stream(process, lines)
    process.popen.send_signal(number)
    _wait_stopping(process)
    assert process.stop(number) == code
    thread.join(5)
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "server_stopped"
    assert lines[-1] == "data: [DONE]"
    out, err = process.popen.communicate()
    assert "engine closed" in out
    assert "1 request may finish within 1 s; a second signal ends at once" in err
    assert "POST /v1/chat/completions 503 in " in err
    assert not [word for word in ("Traceback", "CancelledError", "lifespan") if word in err], err


def test_a_second_signal_answers_who_waits_for_a_whole_answer(start):
    process = start(delay_s=0.05, reply="x" * 1000)
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(httpx.post(f"{process.url}/v1/chat/completions", json=ASK, timeout=20)))
    thread.start()
    wait_until(lambda: _active_jobs(process) == 1)
    process.popen.send_signal(signal.SIGINT)
    _wait_stopping(process)
    assert process.stop(signal.SIGINT) == 130
    thread.join(5)
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "server_stopped")
    assert "Traceback" not in process.popen.communicate()[1]


def test_a_second_signal_does_not_wait_for_a_client_that_does_not_read(start):
    process = start(reply="x" * 20_000)
    body = json.dumps({"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 2000}})
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(process.url.rsplit(":", 1)[1]))) as deaf:
        deaf.sendall((head + body).encode())
        wait_until(lambda: _active_jobs(process) == 1)
        process.popen.send_signal(signal.SIGINT)
        _wait_stopping(process)
        assert process.stop(signal.SIGINT) == 130
    assert "Traceback" not in process.popen.communicate()[1]


def test_a_dead_engine_ends_the_server(start):
    process = start(delay_s=0.05, reply="x" * 1000, dies_after_s=1.0)
    lines: list[str] = []
    thread = _stream(process, lines)
    thread.join(10)
    assert "killed by signal 9" in lines[-2]
    assert lines[-1] == "data: [DONE]"
    assert httpx.get(f"{process.url}/health").status_code == 503
    error = httpx.post(f"{process.url}/v1/chat/completions", json=ASK)
    assert (error.status_code, error.json()["error"]["code"]) == (503, "engine_dead")
    assert process.popen.wait(10) == 1
    assert "the engine died: killed by signal 9" in process.popen.communicate()[1]


def test_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = subprocess.run(_command({}, "--port", port), check=False, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 1
    assert f"port {port} on 127.0.0.1 is in use" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_start_that_fails_says_why():
    ended = subprocess.run(
        _command({"start_failure": "no such model"}, "--port", "0"), check=False, capture_output=True, text=True, timeout=20
    )
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1] == "octavo serve: no such model"


def test_a_start_that_fails_says_so_in_the_log(tmp_path):
    file = tmp_path / "log"
    command = _command({"start_failure": "no such model"}, "--port", "0", "--log-file", str(file), "--log-format", "json")
    assert subprocess.run(command, check=False, capture_output=True, timeout=20).returncode == 1
    last = json.loads(file.read_text().splitlines()[-1])
    assert (last["level"], last["message"]) == ("critical", "the start failed: no such model")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads(number):
    with subprocess.Popen(
        _command({"start_hangs": True}, "--port", "0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as popen:
        assert popen.stdout is not None
        assert popen.stdout.readline() == "loading\n"
        popen.send_signal(number)
        assert popen.wait(5) == 0
        err = popen.communicate()[1]
    assert "Traceback" not in err
    assert err.endswith("INFO octavo.serve: stopped before the model was loaded\n")
