"""The load generator measures what a server with known delays does, and tells every way in which an answer can fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from octavo.benchmarks.datasets import IdVocabulary, Prompt, random_prompts, shared_prefix_prompts
from octavo.benchmarks.metrics import RunResult
from octavo.benchmarks.serving import ListedModel, Target, Unreachable, first_model, run_load, with_v1

SLACK = 1.3  # a busy machine makes everything later; nothing can be earlier
PROMPTS = random_prompts(IdVocabulary(100), np.random.default_rng(0), num_prompts=12, input_len=7).prompts


def measure(
    url: str, *, endpoint: Any = "completions", prompts: tuple[Prompt, ...] = PROMPTS, output_len: int = 5, **load: Any
) -> RunResult:
    timeout_s = load.pop("timeout_s", 10.0)
    target = Target(base_url=f"{url}/v1", model="m", endpoint=endpoint, timeout_s=timeout_s, ignore_eos=load.pop("ignore_eos", False))
    return asyncio.run(run_load(target, prompts, output_len=output_len, **load))


def test_known_delays_are_measured(fake_server: Callable[..., Any]) -> None:
    """12 requests, 4 at a time, 11 tokens: 80 ms to the first, 20 ms to each other, so 280 ms a request and 840 ms in all."""
    server = fake_server(first_token_s=0.08, token_s=0.02, cached_tokens=3)
    run = measure(server.url, concurrency=4, output_len=11)
    assert not run.failures
    expected_ms = {"ttft": 80, "tpot": 20, "itl": 20, "latency": 280}
    for name, value in expected_ms.items():
        summary = run.summaries_ms[name]
        assert summary is not None
        assert 0.97 * value <= summary.p50 <= SLACK * value, name
    assert 0.97 * 0.84 <= run.duration_s <= SLACK * 0.84
    assert run.output_tokens_per_s == pytest.approx(12 * 11 / run.duration_s)
    assert run.input_tokens_per_s == pytest.approx(12 * 7 / run.duration_s)
    assert (run.prompt_tokens, run.output_tokens, run.cached_tokens) == (84, 132, 36)
    assert len(run.latencies_ms["itl"]) == 12 * 10
    assert server.max_in_flight == 4


def test_requests_say_what_was_asked(fake_server: Callable[..., Any]) -> None:
    server = fake_server()
    measure(server.url, concurrency=1, ignore_eos=True)
    assert [tuple(body["prompt"]) for body in server.requests] == [prompt.content for prompt in PROMPTS]
    body = server.requests[0]
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"], body["ignore_eos"]) == ("m", 5, 0.0, True, True)


def test_a_shared_prefix_is_named_in_the_session_header(fake_server: Callable[..., Any]) -> None:
    server = fake_server()
    data = shared_prefix_prompts(IdVocabulary(100), np.random.default_rng(1), num_prompts=6, num_prefixes=2, prefix_len=4, input_len=3)
    target = Target(base_url=f"{server.url}/v1", model="m", session_header="X-Session-Id")
    asyncio.run(run_load(target, (*data.prompts, *PROMPTS[:1]), output_len=1, concurrency=1))
    named = {tuple(body["prompt"][:4]): head.get("x-session-id") for body, head in zip(server.requests, server.headers, strict=True)}
    assert sorted(named.values(), key=str) == [None, "prefix-0", "prefix-1"]


def test_ignore_eos_is_sent_only_when_wanted(fake_server: Callable[..., Any]) -> None:
    server = fake_server()
    measure(server.url, prompts=PROMPTS[:1])
    assert "ignore_eos" not in server.requests[0]


def test_chat_counts_neither_its_opening_nor_its_end_as_tokens(fake_server: Callable[..., Any]) -> None:
    server = fake_server(first_token_s=0.08, with_usage=False)
    run = measure(server.url, endpoint="chat", prompts=(Prompt("one two three", 3),))
    request = run.requests[0]
    assert request.error is None
    assert (request.output_tokens, request.counted_by, request.prompt_tokens) == (5, "stream", 3)
    assert request.ttft_s is not None
    assert 0.97 * 0.08 <= request.ttft_s <= 2 * 0.08
    assert server.requests[0]["messages"] == [{"role": "user", "content": "one two three"}]


def test_usage_wins_over_counted_events(fake_server: Callable[..., Any]) -> None:
    request = measure(fake_server(num_tokens=3).url, prompts=PROMPTS[:1]).requests[0]
    assert (request.output_tokens, request.counted_by) == (3, "usage")


def test_requests_arrive_at_the_rate_and_do_not_wait_for_answers(fake_server: Callable[..., Any]) -> None:
    """12 arrivals at 60 a second, each answered after 300 ms: a closed loop would never have more than one in flight for long."""
    server = fake_server(first_token_s=0.3)
    run = measure(server.url, request_rate=60.0, seed=3, output_len=1)
    starts = sorted(request.start_s for request in run.requests)
    expected = np.cumsum(np.random.default_rng(3).exponential(1 / 60, 12))
    assert np.array(starts) == pytest.approx(expected - expected[0], abs=0.1)
    assert server.max_in_flight >= 6


def test_concurrency_caps_the_rate(fake_server: Callable[..., Any]) -> None:
    server = fake_server(first_token_s=0.02)
    measure(server.url, request_rate=1000.0, concurrency=2, output_len=1)
    assert server.max_in_flight == 2


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        ("status", "HTTP 503: the queue is full"),
        ("stream", "the engine died"),
        ("cut", "the stream ended before the answer did, after 2 tokens"),
        ("drop", "the server closed the connection before its answer was complete"),
        ("silent", "no complete answer within 0.5 s"),
    ],
)
def test_every_failure_is_told_and_harms_no_other_request(fake_server: Callable[..., Any], failure: str, text: str) -> None:
    server = fake_server(fail=lambda number: failure if number % 4 == 1 else None)
    run = measure(server.url, concurrency=4, timeout_s=0.5)
    assert run.failures == {text: 3}
    assert len(run.succeeded) == 9
    assert run.output_tokens == 9 * 5


def test_a_refused_connection_is_a_failure_with_its_reason() -> None:
    run = measure("http://127.0.0.1:9", prompts=PROMPTS[:1])
    assert "connection failed" in next(iter(run.failures))


def test_first_model(fake_server: Callable[..., Any]) -> None:
    server = fake_server(models=[{"id": "a", "root": "/somewhere"}, {"id": "b"}])
    assert first_model(f"{server.url}/v1") == ListedModel("a", "/somewhere")
    assert first_model(f"{fake_server(models=None).url}/v1") is None
    assert first_model(f"{fake_server(models=[]).url}/v1") is None


def test_first_model_tells_what_is_wrong(fake_server: Callable[..., Any]) -> None:
    with pytest.raises(Unreachable, match=r"cannot reach http://127.0.0.1:9/v1/models: .*Is the server running"):
        first_model("http://127.0.0.1:9/v1")
    with pytest.raises(Unreachable, match="wants another --api-key"):
        first_model(f"{fake_server(api_key='k').url}/v1", api_key="wrong")
    with pytest.raises(Unreachable, match="something else than an OpenAI list"):
        first_model(f"{fake_server(models=['x']).url}/v1")


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_base_url_with_or_without_v1(url: str) -> None:
    assert with_v1(url) == "http://h:1/v1"
