"""A real Prometheus scrapes the real server under load: every panel, rule and alert has series, and a picture of them can be drawn."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ..test_end_to_end import Server, start
from .test_monitoring import MONITORING, expressions

pytestmark = [
    pytest.mark.long,
    pytest.mark.needs_embedded_model,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus (Debian's package prometheus) is not installed"),
]

LOAD = "--dataset shared-prefix --num-prefixes 2 --prefix-len 128 --input-len 16 --output-len 12 --ignore-eos --concurrency 12"
OF_GPUS = {"DCGM_FI_DEV_GPU_UTIL", "sglang_gpu_memory_used_bytes"}  # there are none here


@contextmanager
def prometheus(server: Server, folder: Path) -> Iterator[str]:
    """Debian's Prometheus with the shipped files, every second instead of every fifteen; gives its URL."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(MONITORING / "rules.yml", folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("wb") as log, subprocess.Popen(["prometheus", *flags], stdout=log, stderr=log) as process:
        try:
            yield f"http://{address}"
        finally:
            process.terminate()


def series(url: str, expression: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expression}, timeout=10).json()
    assert answer["status"] == "success", (expression, answer)
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def test_every_expression_has_series(tmp_path: Path) -> None:
    server = start(tmp_path, "--num-threads", "1", "--max-running-requests", "8", "--kv-cache-dtype", "fp8_e4m3")
    with prometheus(server, tmp_path) as url:
        load = [sys.executable, "-m", "octavo", "bench", "serving", "--base-url", server.url, *LOAD.split(), "--num-requests", "120"]
        subprocess.run(load, check=True)
        time.sleep(3)
        targets = httpx.get(f"{url}/api/v1/targets", timeout=10).json()["data"]["activeTargets"]
        assert [(target["health"], target["lastError"]) for target in targets] == [("up", "")]
        rules = httpx.get(f"{url}/api/v1/rules", timeout=10).json()["data"]["groups"]
        assert [rule for group in rules for rule in group["rules"] if rule["health"] != "ok"] == []
        for where, expression in expressions():
            if any(name in expression for name in OF_GPUS):
                continue
            asked = expression.replace("$model", ".*").replace("$__rate_interval", "30s")
            if where.startswith("rule 'Octavo"):  # an alert: what it compares
                asked = re.sub(r" (==|<|>) [\d.]+", "", asked)
            assert series(url, asked), (where, asked)
        hits = float(series(url, "sum(sglang_radix_cache_hits_total) / sum(sglang_radix_cache_queries_total)")[0]["value"][1])
        assert 0.6 < hits < 128 / 144
        assert series(url, "sum(sglang_tokens_generated_total)")[0]["value"][1] == str(121 * 12)  # and one to warm up
        drawn = [sys.executable, str(MONITORING / "draw.py"), "--prometheus", url, "--minutes", "1", "--window", "10s"]
        told = subprocess.run([*drawn, "--out", str(tmp_path / "board.png")], check=True, capture_output=True, text=True).stdout
        assert told.strip().endswith("no data: GPU memory taken, GPU utilisation")
        assert (tmp_path / "board.png").stat().st_size > 20_000
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)
        time.sleep(3)
        assert series(url, 'ALERTS{alertname="OctavoDown"}')[0]["metric"]["alertstate"] == "pending"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "localhost:9", "http://[", "{folder}"])
def test_no_prometheus_is_told_in_a_line(url: str, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = url.replace("{folder}", f"http://127.0.0.1:{other.server_port}")
        drawn = [sys.executable, str(MONITORING / "draw.py"), "--prometheus", url, "--out", str(tmp_path / "board.png")]
        done = subprocess.run(drawn, capture_output=True, text=True, check=False)
        other.shutdown()
    assert done.returncode == 1
    assert done.stderr.startswith(f"draw.py: no Prometheus answers at {url}: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_that_cannot_be(minutes: str) -> None:
    drawn = [sys.executable, str(MONITORING / "draw.py"), "--minutes", minutes]
    done = subprocess.run(drawn, capture_output=True, text=True, check=False)
    assert (done.returncode, "give a number above 0" in done.stderr) == (2, True)
