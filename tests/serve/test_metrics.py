"""/metrics, /stats and /v1/loads: the guide's names and SGLang's, counted right, whatever state the engine is in."""

from __future__ import annotations

import asyncio
import math
import shutil
import subprocess
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo.runtime.client import EngineDead, Health
from octavo.runtime.outputs import TextOutput
from octavo.serve.exchange import Exchange

GUIDE = (
    "sglang_request_total",
    "sglang_request_duration_seconds",
    "sglang_tokens_generated_total",
    "sglang_active_requests",
    "sglang_queue_size",
    "sglang_radix_cache_hit_rate",
    "sglang_gpu_memory_used_bytes",
)
SGLANG = (
    "sglang:num_requests_total",
    "sglang:e2e_request_latency_seconds",
    "sglang:generation_tokens_total",
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
    "sglang:cache_hit_rate",
    "sglang:token_usage",
    "sglang:time_to_first_token_seconds",
    "sglang:inter_token_latency_seconds",
)
STATE = {
    "num_running_reqs": 3,
    "num_waiting_reqs": 2,
    "num_waiting_tokens": 70,
    "num_used_tokens": 400,
    "max_total_num_tokens": 1000,
    "token_usage": 0.4,
    "cache_hit_rate": 0.75,
    "prompt_tokens": 80,
    "cached_tokens": 60,
    "generated_tokens": 123,
    "num_evicted_tokens": 5,
    "num_evictable_cached_tokens": 40,
    "gen_throughput": 12.5,
    "retractions": 1,
    "aborted": 4,
    "device_memory_used_bytes": 10**9,
}
INFO = {
    "device": "cuda:0",
    "max_running_requests": 6,
    "startup_seconds": {"load_weights": 1.5, "warm_up": 2.5},
    "kernels": {"cpu_wide": 120},
    "memory_usage": {"weight": 100, "kv": 200, "workspace": 0, "token_capacity": 1000},
    "internal_states": [STATE],
}


@pytest.fixture
def server(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server of its own, whose counts begin at 0."""
    server = start_server()

    async def engine_info() -> dict[str, Any]:
        return INFO

    monkeypatch.setattr(server.engine, "server_info", engine_info)
    return server


def samples(text: str) -> dict[tuple[str, str], float]:
    """Values by name and labels but for the model's."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "toy-model"
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()) if key != "model_name")
            found[sample.name, labels] = sample.value
    return found


def test_every_name_is_there_before_anything_happened(start_server):
    text = start_server().http.get("/metrics").text
    for name in (*GUIDE, *SGLANG):
        assert f"# TYPE {name} " in text
        assert f"# HELP {name} " in text


def test_what_is_counted(server):
    server.post("/v1/completions", prompt="abc", max_tokens=4)
    assert server.post("/v1/completions", prompt="abc", max_tokens=4, stream=True).status_code == 200
    server.error("/v1/completions", 400, prompt="")
    server.http.get("/no/such/path/17")
    server.http.get("/v1/models/default")
    server.http.get("/health")
    response = server.http.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = samples(response.text)
    assert {labels: value for (key, labels), value in found.items() if key == "sglang_request_total"} == {
        "path=/v1/completions,status=200": 2,
        "path=/v1/completions,status=400": 1,
        "path=/v1/models/{model:path},status=200": 1,
        "path=other,status=404": 1,
    }
    assert found["sglang:num_requests_total", ""] == 2  # SGLang counts what was generated
    assert found["sglang_request_duration_seconds_count", ""] == 2
    assert found["sglang:e2e_request_latency_seconds_count", ""] == 2
    assert found["sglang_time_to_first_token_seconds_count", ""] == 2
    assert found["sglang_queue_time_seconds_count", ""] == 2
    assert found["sglang_inter_token_latency_seconds_count", ""] == 2 * 3


def test_what_the_engine_says(server):
    found = samples(server.http.get("/metrics").text)
    wanted = {
        ("sglang_tokens_generated_total", ""): 123,
        ("sglang:generation_tokens_total", ""): 123,
        ("sglang_queue_size", ""): 2,
        ("sglang:num_queue_reqs", ""): 2,
        ("sglang_num_running_reqs", ""): 3,
        ("sglang_active_requests", ""): 0,
        ("sglang_radix_cache_hit_rate", ""): 0.75,
        ("sglang_radix_cache_hits_total", ""): 60,
        ("sglang_radix_cache_queries_total", ""): 80,
        ("sglang_gpu_memory_used_bytes", "gpu=cuda:0"): 1e9,
        ("sglang_memory_bytes", "kind=kv"): 200,
        ("sglang_startup_time_seconds", "phase=load_weights"): 1.5,
        ("sglang_startup_time_seconds", "phase=warm_up"): 2.5,
        ("sglang_linear_kernel_info", "kernel=cpu_wide,layers=120"): 1,
        ("sglang_num_retracted_requests_total", ""): 1,
        ("sglang_num_aborted_requests_total", ""): 4,
        ("sglang_evicted_tokens_total", ""): 5,
        ("sglang_engine_up", ""): 1,
    }
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("silent", [False, True])
def test_an_engine_that_does_not_answer(start_server, monkeypatch, silent):
    server = start_server()
    server.engine.state = Health(False, "the engine is gone", math.inf)

    async def engine_info() -> dict[str, Any]:
        if silent:
            await asyncio.sleep(60)
        raise EngineDead("gone")

    monkeypatch.setattr(server.engine, "server_info", engine_info)
    monkeypatch.setattr("octavo.serve.figures._PATIENCE_S", 0.05)
    found = samples(server.http.get("/metrics").text)
    assert found["sglang_engine_up", ""] == 0
    assert found["sglang_engine_heartbeat_age_seconds", ""] == math.inf
    assert ("sglang_queue_size", "") not in found


def test_a_slow_reader_is_not_the_engines_latency(served, monkeypatch):
    metrics = served.app.state.context.metrics
    moments: dict[int, float] = {}
    exchange = Exchange("r", "POST", "/v1/completions", started=100.0)
    for at in (100.5, 100.6, 100.7):
        metrics.output(exchange, moments, 0, TextOutput("r", "a", (1,), 1, 1, 0, arrived_s=at))
    assert moments == {0: 100.7}


def test_aliases_can_be_left_out(server):
    text = server.http.get("/metrics?aliases=0").text
    assert "sglang:" not in text
    assert all(name in text for name in GUIDE)
    assert server.http.get("/metrics?aliases=none").json()["error"]["param"] == "aliases"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not installed")
def test_promtool_finds_nothing_but_the_colons(server):
    """Colons are reserved for recording rules, and SGLang's names have one."""

    def told(text: str) -> list[str]:
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        return (done.stdout + done.stderr).splitlines()

    server.post("/v1/completions", prompt="abc", max_tokens=4)
    assert told(server.http.get("/metrics?aliases=0").text) == []
    assert all(line.endswith("metric names should not contain ':'") for line in told(server.http.get("/metrics").text))


def test_metrics_can_be_turned_off(start_server):
    error = start_server(enable_metrics=False).http.get("/metrics").json()["error"]
    assert error["code"] == "metrics_disabled"
    assert "--disable-metrics" in error["message"]


def test_stats_satisfy_the_guides_greps(server):
    response = server.http.get("/stats")
    lines = response.text.splitlines()
    for word in ("cache", "queue_size", "cache_hit_rate"):
        assert any(word in line for line in lines)
    told = response.json()
    assert len(lines) == len(told) + 2  # one key a line
    assert (told["queue_size"], told["cache_hit_rate"], told["running_requests"]) == (2, 0.75, 3)


def test_loads(server):
    told = server.http.get("/v1/loads").json()
    (load,) = told["loads"]
    assert load["num_waiting_reqs"] == 2
    assert load["num_total_tokens"] == 470
    assert load["utilization"] == 0.5
    assert load["max_running_requests"] == 6
