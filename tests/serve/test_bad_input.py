"""Whatever cannot be answered ends in OpenAI's nested error body, and the engine hears nothing of it."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import openai
import pytest

from octavo.runtime.admission import EngineLimits, admit
from octavo.runtime.client import EngineDead, RequestRefused
from octavo.runtime.outputs import FinishReason
from octavo.runtime.sampling_params import SamplingParams
from octavo.serve.generate_request import GenerateRequest
from octavo.serve.protocol import ChatRequest, CompletionRequest

from .fake_engine import CONTEXT, VOCAB_SIZE, wait_until

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
ASK: Any = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("path", [CHAT, TEXT, "/generate"])
@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"model": ', "not valid JSON"),
        (b'{"prompt": 1,}', "not valid JSON: trailing comma at line 1 column"),
        (b'{"prompt": "\xff\xfe"}', "not UTF-8: byte 12 is 0xff"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": "\\udc00 "}', "half of a surrogate pair"),
        (b'{"prompt": "\\u12"}', "not valid JSON"),
        (b"", "no body"),
        (b"[1, 2]", "must be a JSON object"),
        (b"[" * 5000, "nested too deeply at line 1 column 202: at most 200 levels"),
        (b"null", "not null"),
    ],
)
def test_not_a_json_object(served, path, raw, words):
    response = served.http.post(path, content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "did you mean temperature"),
        ({"zzz": 1}, "zzz", "unknown field"),
        ({"temperature": float("nan")}, "temperature", "nan"),
        ({"temperature": float("inf")}, "temperature", "inf"),
        ({"temperature": -0.1}, "temperature", "-0.1"),
        ({"temperature": "0.5"}, "temperature", 'temperature="0.5" is not valid: it must be a number'),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_p": 1.5}, "top_p", "1.5"),
        ({"top_k": -2}, "top_k", "-2"),
        ({"top_k": 1.5}, "top_k", "top_k=1.5 is not valid: it must be a whole number"),
        ({"min_p": 2}, "min_p", "2"),
        ({"frequency_penalty": 3}, "frequency_penalty", "3"),
        ({"presence_penalty": -3}, "presence_penalty", "-3"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"max_tokens": -1}, "max_tokens", "-1"),
        ({"max_tokens": True}, "max_tokens", "max_tokens=true is not valid: it must be a whole number"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens"),
        ({"n": 0}, "n", "from 1"),
        ({"n": 1000}, "n", "1000"),
        ({"seed": 2**70}, "seed", "64-bit"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"stop": 5}, "stop", "stop=5 is not valid: it must be a string or a list of strings"),
        ({"stop_token_ids": [3, None]}, "stop_token_ids.1", "stop_token_ids.1=null is not valid"),
        ({"stream": "yes"}, "stream", 'stream="yes" is not valid: it must be true or false'),
        ({"cache_salt": 3}, "cache_salt", "cache_salt=3 is not valid: it must be a string"),
        ({"stop": ["x"] * 65}, "stop", "65"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", str(VOCAB_SIZE)),
        ({"logit_bias": {"x": 1}}, "logit_bias", 'the key "x"'),
        ({"logit_bias": {"-1": 1}}, "logit_bias", 'the key "-1"'),
        ({"logit_bias": {"5": 101}}, "logit_bias", "has 101.0 for the token 5: biases must be from -100 to 100"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias", f'the key "{VOCAB_SIZE}": keys must be'),
        ({"logit_bias": [1]}, "logit_bias", "an object"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"stream_options": {"nope": 1}, "stream": True}, "stream_options.nope", "unknown field"),
        ({"response_format": {"type": "json_object"}}, "response_format", "constrain"),
        ({"regex": "a+"}, "regex", "constrain"),
        ({"lora_path": "x"}, "lora_path", "LoRA"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_fields_of_both_endpoints(served, path, extra, param, words):
    body = {"messages": ASK} if path == CHAT else {"prompt": "Hi"}
    response = served.http.post(path, content=json.dumps({**body, **extra}), headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert served.engine.calls == []


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "required"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": "Hi"}, "messages", "list of messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", '"robot"'),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "messages.0.role=null"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "string or a list"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "text parts only",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "string"),
        ({"messages": [{"role": "user", "content": "x", "weight": 3}]}, "messages.0.weight", "not supported"),
        ({"messages": ASK, "chat_template_kwargs": {"fail": True}}, "messages", "roles must alternate"),
        ({"messages": ASK, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tool_choice"),
        ({"messages": ASK, "tool_choice": "required"}, "tool_choice", "without tools"),
        ({"messages": ASK, "functions": [{"name": "f"}]}, "functions", "tool"),
        ({"messages": ASK, "modalities": ["audio"]}, "modalities", "text"),
        ({"messages": ASK, "audio": {"voice": "x"}}, "audio", "text"),
        ({"messages": ASK, "reasoning_effort": "high"}, "reasoning_effort", "chat_template_kwargs"),
        ({"messages": ASK, "top_logprobs": 3}, "top_logprobs", "logprobs=true"),
        ({"messages": ASK, "logprobs": True, "top_logprobs": -1}, "top_logprobs", "-1"),
        ({"messages": ASK, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs=21 is not valid: it must be from 0 to 20"),
        ({"messages": ASK, "tool_choice": 3}, "tool_choice", "tool_choice=3 is not valid: it must be"),
        ({"messages": ASK, "max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "differ"),
        ({"messages": ASK, "continue_final_message": True}, "continue_final_message", "assistant"),
        (
            {"messages": ASK, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "exclude",
        ),
    ],
)
def test_chat_fields(served, body, param, words):
    error = served.error(CHAT, 400, **body)
    assert error["param"] == param
    assert words in error["message"]
    assert served.engine.calls == []


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "required"),
        ({"prompt": None}, "prompt", "must be a string"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ["a", 1]}, "prompt", "a list of strings"),
        ({"prompt": [VOCAB_SIZE]}, "prompt", str(VOCAB_SIZE)),
        ({"prompt": [-1]}, "prompt", "-1"),
        ({"prompt": [2**80]}, "prompt", "ids must be"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "infill"),
        ({"prompt": "a", "best_of": 3}, "best_of", "3"),
        ({"prompt": "a", "logprobs": -1}, "logprobs", "-1"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "logprobs=true"),
        ({"prompt": ["a"] * 200, "n": 128}, None, "25600 sequences"),
    ],
)
def test_completion_fields(served, body, param, words):
    error = served.error(TEXT, 400, **body)
    assert error["param"] == param
    assert words in error["message"]
    assert served.engine.calls == []


@pytest.mark.parametrize("path", [CHAT, TEXT, "/generate"])
@pytest.mark.parametrize("value", [None, True, 1.5, "text", [None], [["x"]], {"a": None}, [{}], 10**400])
def test_no_field_of_a_wrong_type_is_told_in_the_words_of_a_library(served, path, value):
    body: dict[str, Any] = {CHAT: {"messages": ASK}, TEXT: {"prompt": "Hi"}}.get(path, {"text": "Hi"})
    model = {CHAT: ChatRequest, TEXT: CompletionRequest}.get(path, GenerateRequest)
    for field in model.model_fields:
        response = served.post(path, **{**body, "max_tokens": 1} | {field: value} if path != "/generate" else {**body, field: value})
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            message = response.json()["error"]["message"]
            assert not [words for words in ("Input", "should be", "None", "True", "dictionary", "another type") if words in message], (
                message
            )


def test_20_top_logprobs_are_not_too_many(served):
    assert served.post(CHAT, messages=ASK, logprobs=True, top_logprobs=20).status_code == 200
    assert served.post(TEXT, prompt="Hi", logprobs=21).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [(TEXT, {"prompt": "x" * CONTEXT}), (TEXT, {"prompt": "x" * CONTEXT, "max_tokens": 5}), ("/generate", {"text": "x" * CONTEXT})],
)
def test_a_prompt_that_is_too_long_is_told_as_the_engine_tells_it(served, path, body):
    with pytest.raises(RequestRefused) as refused:
        admit([0] * CONTEXT, SamplingParams(), EngineLimits(CONTEXT, 10 * CONTEXT, VOCAB_SIZE))
    assert served.error(path, 400, **body)["message"] == str(refused.value)


def test_too_long_names_both_lengths(served):
    error = served.error(TEXT, 400, prompt="x" * 3000)
    assert error["code"] == "context_length_exceeded"
    assert str(CONTEXT) in error["message"]
    assert "3000" in error["message"]
    error = served.error(TEXT, 400, prompt="x" * (CONTEXT - 10), max_tokens=11)
    assert "at most 10 tokens" in error["message"]
    error = served.error(CHAT, 400, messages=[{"role": "user", "content": "x" * 5000}])
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as caught:
        served.openai.completions.create(model="m", prompt="x" * CONTEXT)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("path", [CHAT, TEXT, "/generate"])
@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (RequestRefused("longer than the KV pool", code="context_length_exceeded", param="prompt"), 400, "context_length_exceeded"),
        (RequestRefused("the queue is full", status_code=503, code="queue_full"), 503, "queue_full"),
        (EngineDead("killed by signal 9"), 503, "engine_dead"),
        (RuntimeError("secret"), 500, "internal_error"),
    ],
)
def test_engine_refusals_keep_their_status(served, path, refusal, status, code):
    served.engine.refusal = refusal
    body = {"messages": ASK} if path == CHAT else {"prompt": "Hi"} if path == TEXT else {"text": "Hi"}
    for stream in (False, True):
        error = served.error(path, status, **body, stream=stream)
        assert error["code"] == code
        assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
        assert "secret" not in error["message"]


def test_queue_full_says_when_to_come_back(served):
    served.engine.refusal = RequestRefused("the queue is full", status_code=503, code="queue_full")
    response = served.post(TEXT, prompt="Hi", n=3)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_comes_back_after_503(served, stream):
    """It retries by itself, waits as long as Retry-After says, and gets its answer once there is room."""
    served.engine.refusal = RequestRefused("the queue is full", status_code=503, code="queue_full")
    threading.Timer(0.5, setattr, (served.engine, "refusal", None)).start()
    started = time.monotonic()
    answer = served.openai.with_options(max_retries=2).completions.create(model="default", prompt="Hi", stream=stream)
    text = "".join(chunk.choices[0].text for chunk in answer if chunk.choices) if stream else answer.choices[0].text
    assert text
    assert 0.9 < time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("trouble", "code"),
    [
        ({"failure": EngineDead("killed by signal 9")}, "engine_dead"),
        ({"end": FinishReason("abort", message="out of KV memory", status_code=500)}, "engine_failure"),
        ({"end": FinishReason("abort", message="overload", status_code=503)}, "engine_overloaded"),
    ],
)
@pytest.mark.parametrize("n", [1, 3])
def test_failure_after_the_first_token(served, trouble, code, n):
    served.engine.__dict__.update(trouble)
    whole = served.post(CHAT, messages=ASK, n=n)
    assert whole.status_code >= 500
    assert whole.json()["error"]["code"] == code
    streamed = served.post(CHAT, messages=ASK, stream=True, n=n)
    assert streamed.status_code == 200
    *_, error, done = [line for line in streamed.text.split("\n\n") if line]
    assert error.startswith('data: {"error":{"message":')
    assert done == "data: [DONE]"
    with pytest.raises(openai.APIError) as caught:
        list(served.openai.chat.completions.create(model="m", messages=ASK, stream=True, n=n))
    assert caught.value.code == code


def test_no_chat_template(served):
    served.engine.tokenizer.has_chat_template = False
    assert "--chat-template" in served.error(CHAT, 400, messages=ASK)["message"]


def test_unknown_paths_and_methods(served):
    assert served.error("/v1/nothing", 404)["code"] == "unknown_url"
    response = served.http.get(CHAT)
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"


def test_a_large_batch_does_not_fill_the_queue(served):
    served.engine.max_queued_requests, served.engine.delay_s = 8, 0.01
    answer = served.post("/v1/completions", prompt=["a"] * 30, max_tokens=2)
    assert answer.status_code == 200
    assert len(answer.json()["choices"]) == 30
    assert served.engine.most_live == 4


def test_as_many_answers_as_the_engine_computes_are_made_together(served):
    served.engine.max_queued_requests, served.engine.max_running_requests, served.engine.delay_s = 3, 4, 0.05
    assert len(served.post(TEXT, prompt="a", n=3, max_tokens=2).json()["choices"]) == 3
    assert served.engine.most_live == 3


@pytest.mark.parametrize("body", [{"n": 4}, {"prompt": ["a"] * 40}, {"n": 4, "stream": True}], ids=str)
def test_a_request_of_many_sequences_has_one_time_limit(served, body):
    served.engine.max_queued_requests, served.engine.delay_s, served.engine.request_timeout_s = 2, 0.05, 0.5
    started = time.monotonic()
    answer = served.post(TEXT, **{"prompt": "a", "max_tokens": 12, **body})
    assert time.monotonic() - started < 3
    told = answer.text.splitlines()[-4].removeprefix("data: ") if "stream" in body else answer.text
    assert json.loads(told)["error"]["code"] == "request_timeout"
    assert answer.status_code == (200 if "stream" in body else 504)
    wait_until(lambda: not served.engine.live)


def test_what_is_too_many_is_refused_unread(served):
    started = time.monotonic()
    assert "100000 sequences" in served.error(TEXT, 400, prompt=["a"] * 100_000)["message"]
    assert "100000 messages" in served.error(CHAT, 400, messages=[{"role": "user", "content": "a"}] * 100_000)["message"]
    assert "characters" in served.error("/tokenize", 400, prompt="a" * 10**7)["message"]
    assert time.monotonic() - started < 4


# -- what is large, or made to hurt ------------------------------------------------------------------------------------


def test_a_body_full_of_faults_is_told_of_the_first(served):
    started = time.monotonic()
    for path, body in ((CHAT, {"messages": [1] * 500_000}), (TEXT, {"prompt": [{}] * 500_000}), (TEXT, {"prompt": "a", "x" * 10**7: 1})):
        served.error(path, 400, **body)
    served.error(TEXT, 400, prompt="a", stop=["a" * 10**6])
    assert time.monotonic() - started < 5


def test_texts_beyond_any_context_are_refused_untokenized(served, monkeypatch):
    monkeypatch.setattr(type(served.app.state.context.tokenizer), "encode", lambda *_, **__: pytest.fail("tokenized"))
    text = "a" * (CONTEXT * 512 + 1)
    assert served.error(TEXT, 400, prompt=text)["code"] == "context_length_exceeded"
    assert served.error("/generate", 400, text=text)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 2**64), ("max_tokens", 2**64), ("min_tokens", 2**70), ("priority", 2**64), ("seed", 2**64)]
)
def test_whole_numbers_have_an_end(served, name, value):
    assert served.error(TEXT, 400, prompt="Hi", **{name: value})["param"] == name


def test_names_have_an_end(served):
    assert served.error("/generate", 400, text="Hi", rid="r" * 300)["param"] == "rid"


def test_what_is_no_http_is_told_with_an_id(served, caplog):
    caplog.set_level("INFO", "octavo.serve")
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"NONSENSE\r\n\r\n")
        answer = connection.makefile("rb").read().decode()
    head, _, body = answer.partition("\r\n\r\n")
    (given,) = (line.split(": ")[1] for line in head.splitlines() if line.startswith("x-request-id: "))
    assert json.loads(body)["error"]["code"] == "invalid_http"
    assert any(given in record.getMessage() for record in caplog.records)
