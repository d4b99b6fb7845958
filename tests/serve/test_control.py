"""Health, models, cache, server_info, keys, ids, the OpenAPI page."""

from __future__ import annotations

import time
from typing import Any

import httpx
import openai
import pytest

from octavo.serve.options import ServerOptions


def test_models(served):
    (model,) = served.openai.models.list().data
    assert (model.id, model.object, model.owned_by) == ("toy-model", "model", "octavo")
    assert model.model_extra == {"root": "/models/org/toy-model", "parent": None, "max_model_len": 2048}
    assert served.openai.models.retrieve("default").id == "toy-model"
    assert served.http.get("/v1/models//models/org/toy-model").status_code == 200
    with pytest.raises(openai.NotFoundError) as caught:
        served.openai.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


def test_strict_model_names(start_server):
    server = start_server(strict_model_names=True, served_model_name="nice")
    for name in ("default", "nice", "toy-model", "/models/org/toy-model", "", None):
        assert server.post("/v1/completions", model=name, prompt="a").status_code == 200
    error = server.error("/v1/completions", 404, model="gpt-9", prompt="a")
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'nice'" in error["message"]


def test_flush_cache(served):
    assert served.http.post("/flush_cache").status_code == 200
    assert served.http.get("/flush_cache").text == "Cache flushed.\n"
    served.engine.flushes = False
    started = time.perf_counter()
    assert served.http.get("/flush_cache?timeout=0.2").status_code == 400
    assert 0.2 <= time.perf_counter() - started < 2
    assert served.http.get("/flush_cache?timeout=soon").json()["error"]["param"] == "timeout"


def test_api_keys_and_their_absence_from_server_info(start_server):
    server = start_server(api_keys=("one", "zwei-secret"))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "one"}, {"Authorization": "Basic one"}):
        response = server.http.get("/v1/models", headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert server.http.get("/health").status_code == 200
    for key in ("one", "zwei-secret"):
        assert openai.OpenAI(base_url=f"{server.url}/v1", api_key=key).models.list().data
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="zwei").models.list()
    info = server.http.get("/server_info", headers={"Authorization": "Bearer one"})
    assert "zwei-secret" not in info.text
    assert info.json()["api_keys"] == ["***", "***"]


def test_what_changes_the_server_is_for_its_admin(start_server):
    def statuses(server: Any, key: str) -> list[int]:
        headers = {"Authorization": f"Bearer {key}"}
        control = [server.http.post(path, json={"abort_all": True}, headers=headers) for path in ("/flush_cache", "/abort_request")]
        return [response.status_code for response in (*control, server.http.get("/v1/models", headers=headers))]

    both = start_server(api_keys=("user",), admin_api_keys=("admin",))
    assert [statuses(both, key) for key in ("admin", "user", "wrong")] == [[200, 200, 200], [403, 403, 200], [401, 401, 401]]
    assert statuses(start_server(api_keys=("user",)), "user") == [403, 403, 200]
    assert statuses(start_server(admin_api_keys=("admin",)), "none") == [401, 401, 200]
    assert statuses(start_server(), "none") == [200, 200, 200]
    refused = both.http.post("/flush_cache", headers={"Authorization": "Bearer user"}).json()["error"]
    assert (refused["type"], refused["code"]) == ("permission_error", "admin_key_required")
    info = both.http.get("/server_info", headers={"Authorization": "Bearer user"})
    assert info.json()["admin_api_keys"] == ["***"]


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info(served, path):
    info = served.http.get(path).json()
    assert info["max_total_num_tokens"] == 10_000
    assert info["served_model_name"] == "toy-model"
    assert info["version"]


@pytest.mark.parametrize(("device", "fraction"), [("cpu", 0.5), ("cuda:0", 0.88)])
def test_server_info_has_what_the_start_settled(served, monkeypatch, device, fraction):
    left = dict.fromkeys(("model_path", "tokenizer_path", "context_length", "max_total_tokens", "mem_fraction_static", "revision"))

    async def engine_info() -> dict[str, Any]:
        return {**left, "device": device}

    monkeypatch.setattr(served.engine, "server_info", engine_info)
    info = served.http.get("/server_info").json()
    assert {name: info[name] for name in left} == {
        "model_path": "/models/org/toy-model",
        "tokenizer_path": "/models/org/toy-model",
        "context_length": 2048,
        "max_total_tokens": 10_000,
        "mem_fraction_static": fraction,
        "revision": None,
    }


def test_server_info_keeps_what_was_given(served, monkeypatch):
    given = {"tokenizer_path": "t", "context_length": 100, "max_total_tokens": 200, "mem_fraction_static": None, "device": "cpu"}

    async def engine_info() -> dict[str, Any]:
        return given

    monkeypatch.setattr(served.engine, "server_info", engine_info)
    info = served.http.get("/server_info").json()
    assert {name: info[name] for name in given} == given


def test_request_id_in_and_out(served):
    assert served.http.get("/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    fresh = {served.http.get("/health", headers={"X-Request-Id": value}).headers["x-request-id"] for value in ("", "a b", "x" * 200)}
    assert len(fresh) == 3
    assert served.post("/v1/completions", prompt="").headers["x-request-id"]
    assert served.post("/v1/completions", prompt="a", stream=True).headers["x-request-id"]


def test_openapi_knows_the_bodies(served):
    page = served.http.get("/openapi.json").json()
    body = page["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    assert "StreamOptions" in page["components"]["schemas"]
    completion = page["components"]["schemas"]["CompletionRequest"]
    assert {"type": "null"} in completion["properties"]["echo"]["anyOf"]
    assert completion["properties"]["user"] == {"description": "Accepted, and without effect."}
    assert "text/event-stream" in page["paths"]["/generate"]["post"]["responses"]["200"]["content"]
    assert list(page["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    assert page["paths"]["/v1/models/{model}"]["get"]["parameters"][0]["name"] == "model"
    assert "422" not in page["paths"]["/generate"]["post"]["responses"]


def test_a_wrong_method_is_told_the_right_ones(served):
    assert served.http.delete("/flush_cache").headers["allow"] == "GET, POST"
    refused = served.http.get("/generate")
    assert (refused.status_code, refused.headers["allow"], refused.json()["error"]["code"]) == (405, "POST", "method_not_allowed")


def test_health_is_quick_while_a_long_text_is_tokenized(served):
    real = served.engine.tokenizer.encode

    def slow(text: str, **options: bool) -> list[int]:
        time.sleep(0.3)
        return real(text[:10], **options)

    served.engine.tokenizer.encode = slow
    with httpx.Client(base_url=served.url) as other, pytest.raises(httpx.ReadTimeout):
        other.post("/v1/completions", json={"prompt": "x" * 5000}, timeout=httpx.Timeout(5, read=0.05))
    started = time.perf_counter()
    assert served.http.get("/health").status_code == 200
    assert time.perf_counter() - started < 0.2
    time.sleep(0.3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"log_level": "loud"},
        {"port": 70000},
        {"host": ""},
        {"api_keys": ("",)},
        {"api_keys": ("schlüssel",)},
        {"api_keys": ("abc\n",)},
        {"served_model_name": " "},
    ],
)
def test_options_refuse_what_cannot_work(wrong):
    with pytest.raises(ValueError):
        ServerOptions(**wrong)


def test_pages_of_other_origins(start_server):
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    closed = start_server()
    assert "access-control-allow-origin" not in closed.http.get("/v1/models", headers=asked).headers
    server = start_server(cors_origins=("https://chat.example",), api_keys=("key",))
    ahead = server.http.options("/v1/chat/completions", headers=asked)
    assert (ahead.status_code, ahead.headers["access-control-allow-origin"]) == (200, "https://chat.example")
    other = server.http.options("/v1/chat/completions", headers={**asked, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert server.http.get("/v1/models", headers=asked).status_code == 401


def test_server_info_has_what_sglangs_clients_look_for(served, monkeypatch):
    memory = {"weight": 1, "kv": 2, "token_capacity": 3}

    async def engine_info() -> dict[str, Any]:
        state = {"gen_throughput": 12.5, "num_running_reqs": 1}
        known = {"startup_seconds": {"import": 1.0, "load_weights": 0.5}, "max_running_requests": 8, "memory_usage": memory}
        return {**known, "internal_states": [state]}

    monkeypatch.setattr(served.engine, "server_info", engine_info)
    info = served.http.get("/server_info").json()
    (state,) = info["internal_states"]
    assert info["startup_time"] == 1.5
    assert (state["last_gen_throughput"], state["effective_max_running_requests_per_dp"], state["memory_usage"]) == (12.5, 8, memory)
    assert state["num_running_reqs"] == 1
