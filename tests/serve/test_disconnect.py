"""A client that leaves frees its place in the engine at once; a request can be ended from outside."""

from __future__ import annotations

import threading

import httpx
import pytest

from .fake_engine import wait_until

ASK = [{"role": "user", "content": "Hi"}]
REQUESTS = [
    ("/v1/chat/completions", {"messages": ASK}),
    ("/v1/chat/completions", {"messages": ASK, "n": 3}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 100}),
    ("/generate", {"text": ["a", "b"]}),
]


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_whole_answer_abandoned(served, path, body):
    served.engine.delay_s = 0.5
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(served.url + path, json=body, timeout=httpx.Timeout(5, read=0.1))
    wait_until(lambda: not served.engine.live, 1.0)
    assert len(served.engine.aborted) == len(served.engine.calls) > 0
    assert served.engine.finished == []


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_stream_abandoned(served, path, body):
    served.engine.reply, served.engine.delay_s = "x" * 100, 0.05
    with httpx.stream("POST", served.url + path, json={**body, "stream": True}, timeout=5) as response:
        lines = response.iter_lines()  # held, because httpx hangs up when it is collected
        assert next(lines).startswith("data: ")
        assert served.engine.live
    wait_until(lambda: not served.engine.live, 1.0)
    assert len(served.engine.aborted) == len(served.engine.calls)


def test_stream_abandoned_before_its_first_token(served):
    served.engine.delay_s = 0.5
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(served.url + "/v1/completions", json={"prompt": "a", "stream": True}, timeout=httpx.Timeout(5, read=0.1))
    wait_until(lambda: not served.engine.live, 1.0)


def test_client_that_stops_reading_and_leaves(served):
    served.engine.reply = "x" * 200_000
    body = {"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 2000}}
    with httpx.stream("POST", served.url + "/generate", json=body, timeout=5) as response:
        chunks = response.iter_bytes()
        assert next(chunks)
        wait_until(lambda: len(served.engine.live) == 1)
    wait_until(lambda: not served.engine.live, 2.0)


@pytest.mark.parametrize("everything", [False, True])
def test_abort_request(served, everything):
    served.engine.reply, served.engine.delay_s = "x" * 500, 0.01
    answers = []

    def ask() -> None:
        answers.append(served.post("/generate", text="a", rid="mine", sampling_params={"n": 2, "max_new_tokens": 500}).json())

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: len(served.engine.live) == 2)
    assert served.post("/abort_request", **({"abort_all": True} if everything else {"rid": "mine"})).json() == {"aborted": 1}
    thread.join(5)
    assert [result["meta_info"]["finish_reason"]["type"] for result in answers[0]] == ["abort", "abort"]


def test_abort_of_nothing(served):
    assert served.post("/abort_request", rid="gone").json() == {"aborted": 0}
    assert served.error("/abort_request", 400)["param"] == "rid"


def test_an_id_in_flight_is_taken(served):
    served.engine.delay_s = 0.05
    body = {"text": "a", "rid": "twice", "stream": True}
    with httpx.stream("POST", served.url + "/generate", json=body, timeout=5) as response:
        lines = response.iter_lines()
        assert next(lines)
        assert served.error("/generate", 400, **body)["param"] == "rid"
