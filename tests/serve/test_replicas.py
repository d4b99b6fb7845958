"""`octavo serve --dp-size N`, as a user starts it: several engines behind one address, keys, signals, and what cannot be."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from octavo.serve import cli
from octavo.serve.arguments import flags_of, mapping_of, options_of, serve_parser

READY_S = 180
ARGS = ("--num-threads", "1", "--max-total-tokens", "4096", "--max-running-requests", "4")


def test_without_ray_it_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["--dp", "2"]) == 2
    assert "--dp-size 2 stands on Ray Serve, which is not installed here: pip install 'octavo[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1"])
def test_no_replicas_are_none(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--dp", count]) == 2
    assert f"--dp-size {count} is not valid: give a whole number of at least 1" in capsys.readouterr().err


def test_flags_as_a_mapping_are_the_same_flags(tmp_path: Path) -> None:
    words = [
        "--num-threads",
        "3",
        "--log-requests",
        "--cors-origin",
        "https://a.b",
        "--cors-origin",
        "https://c.d",
        "--kv-cache-dtype=int8",
    ]
    words += ["--disable-radix-cache", "--queue-timeout", "2.5", "--served-model-name", "a name"]
    wanted = options_of(serve_parser("").parse_all(words))
    assert options_of(serve_parser("").parse_mapping(mapping_of(flags_of(*wanted)), "here")) == wanted


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def served(words: Sequence[str], folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    port, told = free_port(), folder / "told"
    command = [sys.executable, "-m", "octavo", "serve", "--dp", "2", "--port", str(port), *ARGS, *words]
    environment: dict[str, Any] = {**os.environ, "RAY_TMPDIR": "/tmp", "OMP_NUM_THREADS": "1"}
    with told.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment) as process:
        try:
            until = time.monotonic() + READY_S
            while "Octavo is ready." not in told.read_text(errors="replace"):
                assert process.poll() is None, told.read_text(errors="replace")
                assert time.monotonic() < until, told.read_text(errors="replace")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", process, told
        finally:
            if process.poll() is None:
                process.kill()


@pytest.fixture(scope="module")
def _ray() -> None:
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'octavo[ray]'")


@pytest.mark.long
@pytest.mark.needs_embedded_model
@pytest.mark.usefixtures("_ray")
def test_two_engines_behind_one_address_end_with_a_signal(tmp_path: Path) -> None:
    with served(["--api-key", "secret", "--shutdown-timeout", "20"], tmp_path) as (url, process, told):
        keyed = {"Authorization": "Bearer secret"}
        body = {"prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 401
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=keyed, timeout=60)
        assert "Paris" in answer.json()["choices"][0]["text"]
        metrics = httpx.get(f"{url}/metrics", headers=keyed, timeout=60).text
        assert len({line.split('replica="')[1].split('"')[0] for line in metrics.splitlines() if 'replica="' in line}) == 2
        events = []
        asked = {**body, "max_tokens": 100, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, headers=keyed, timeout=60) as stream:
            for line in stream.iter_lines():
                events += [line] if line else []
                if len(events) == 3:
                    process.send_signal(signal.SIGTERM)
        assert events[-1] == "data: [DONE]"
        assert '"length"' in events[-2]
        family = psutil.Process(process.pid).children(recursive=True)
        assert process.wait(60) == 0
        _, alive = psutil.wait_procs(family, timeout=20)
        assert alive == [], [child.cmdline() for child in alive]
        text = told.read_text(errors="replace")
        assert "2 replicas" in text
        assert "secret" not in text
        assert "Traceback" not in text


@pytest.mark.long
@pytest.mark.usefixtures("_ray")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model-path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--log-file", "x.log"], "Ray keeps the logs of replicas"),
        (["--tp", "2"], "--tp-size 2 cannot cut this model"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(words: list[str], told: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "octavo", "serve", "--dp", "2", "--port", str(free_port()), *ARGS, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=READY_S, check=False, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert told in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.usefixtures("_ray")
def test_a_stop_before_replicas_are_ready_ends_with_zero() -> None:
    command = [sys.executable, "-m", "octavo", "serve", "--dp", "2", "--port", str(free_port()), *ARGS]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Starting 2 replicas" in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
    assert process.returncode == 0
    assert "stopped before the replicas were ready" in rest


@pytest.mark.long
@pytest.mark.usefixtures("_ray")
def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, suppress(subprocess.TimeoutExpired):
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "octavo", "serve", "--dp", "2", "--port", str(port), *ARGS]
        done = subprocess.run(command, capture_output=True, text=True, timeout=READY_S, check=False)
        assert done.returncode == 1
        assert f"port {port} on 127.0.0.1 is in use" in done.stderr
