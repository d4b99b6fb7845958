"""Probes: what an orchestrator is told, and when."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from octavo.runtime.client import EngineDead, Health, RequestRefused
from octavo.runtime.outputs import FinishReason

from .fake_engine import wait_until

PROBES = ("/health", "/ready", "/livez", "/health_generate")


@pytest.mark.parametrize("path", PROBES)
def test_all_is_well(served, path):
    response = served.http.get(path)
    assert (response.status_code, response.json()["status"]) == (200, "ok")


@pytest.mark.parametrize("path", PROBES)
def test_an_engine_that_is_silent(served, path):
    served.engine.state = Health(False, "no sign of life for 12 s", 12.0)
    response = served.http.get(path)
    assert (response.status_code, response.json()["reason"]) == (503, "no sign of life for 12 s")
    served.engine.state = Health(False, "not started", float("inf"))
    assert served.http.get(path).json()["heartbeat_age_s"] is None


def test_a_server_that_drains_is_alive_and_not_ready(served):
    served.app.state.context.is_draining = True
    try:
        assert [served.http.get(path).status_code for path in PROBES] == [503, 503, 200, 503]
    finally:
        served.app.state.context.is_draining = False


def test_a_busy_server_is_well(served):
    served.app.state.context.metrics.last_token_s = -math.inf
    served.engine.delay_s = 0.05
    with served.http.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 10, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        served.engine.refusal = RequestRefused("the queue is full", status_code=503, code="queue_full")
        assert served.http.get("/health_generate").status_code == 200
        assert list(lines)[-1] == ""
    assert len(served.engine.calls) == 1


def test_many_deep_probes_are_one_request(served):
    served.app.state.context.metrics.last_token_s = -math.inf
    served.engine.delay_s = 1.5
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: httpx.get(f"{served.url}/health_generate").status_code, range(10)))
    assert answers == [200] * 10
    assert len(served.engine.calls) == 1


def test_the_deep_probe_generates_one_token(served):
    served.app.state.context.metrics.last_token_s = -math.inf
    assert served.http.get("/health_generate").status_code == 200
    (call,) = served.engine.calls
    assert call.params.max_tokens == 1
    assert call.request_id.startswith("health-")


def test_the_deep_probe_notices_what_the_heartbeat_does_not(served, monkeypatch):
    monkeypatch.setattr("octavo.serve.probes._DEEP_TIMEOUT_S", 0.05)
    served.app.state.context.metrics.last_token_s = -math.inf
    served.engine.delay_s = 0.5
    response = served.http.get("/health_generate")
    assert (response.status_code, response.json()["reason"]) == (503, "no token within 0.05 s")
    wait_until(served.app.state.context.probe.done)
    served.engine.reset()
    served.engine.failure, served.engine.fail_after = EngineDead("killed"), 0
    assert served.http.get("/health_generate").json()["reason"] == "killed"
    served.engine.reset()
    served.engine.end, served.engine.fail_after = FinishReason("abort", message="out of memory", status_code=503), 0
    assert served.http.get("/health_generate").json()["reason"] == "out of memory"


def test_probes_need_no_key(start_server):
    server = start_server(api_keys=("secret",))
    for path in (*PROBES, "/metrics"):
        assert server.http.get(path).status_code == 200
