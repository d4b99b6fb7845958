"""POST /generate: SGLang's shapes."""

from __future__ import annotations

import json

import pytest

from .fake_engine import CONTEXT, EOS


def _events(text: str) -> list:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_one_text(served):
    served.engine.default_sampling = {"temperature": 0.1}
    result = served.post("/generate", text="Say", rid="mine").json()
    assert result["text"] == "Hello wörld!"
    assert result["output_ids"] == [*"Hello wörld!".encode(), EOS]
    meta = result["meta_info"]
    assert meta.pop("e2e_latency") > 0
    assert meta == {
        "id": "mine", "finish_reason": {"type": "stop", "matched": EOS}, "prompt_tokens": 3, "completion_tokens": 14, "cached_tokens": 0,
        "reasoning_tokens": 0, "weight_version": "default", "num_retractions": 0,
    }  # fmt: skip
    assert served.engine.calls[0].params.max_tokens == 128
    assert served.engine.calls[0].params.temperature == 1.0


def test_length_and_null_length(served):
    result = served.post("/generate", input_ids=[72], sampling_params={"max_new_tokens": 2}).json()
    assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
    served.post("/generate", input_ids=[72], sampling_params={"max_new_tokens": None})
    assert served.engine.calls[1].params.max_tokens == CONTEXT - 1


def test_null_is_as_if_not_sent(served):
    body = {"text": "a", "stream": None, "return_logprob": None, "rid": None, "sampling_params": {"temperature": None, "n": None}}
    assert served.post("/generate", **body).json()["text"] == "Hello wörld!"
    assert served.engine.calls[0].params.temperature == 1.0


def test_batch_with_params_of_their_own(served):
    params = [{"max_new_tokens": 1}, {"max_new_tokens": 2, "temperature": 0, "sampling_seed": 3, "stop": ["zz"], "min_new_tokens": 1}]
    results = served.post("/generate", text=["a", "b"], sampling_params=params, rid="job").json()
    assert [result["text"] for result in results] == ["H", "He"]
    assert [result["meta_info"]["id"] for result in results] == ["job_0", "job_1"]
    second = next(call.params for call in served.engine.calls if call.text == "b")
    assert (second.temperature, second.seed, second.stop, second.min_tokens) == (0, 3, ("zz",), 1)


def test_batch_of_one_is_a_list(served):
    assert len(served.post("/generate", input_ids=[[72]]).json()) == 1


def test_n_is_a_list(served):
    results = served.post("/generate", text="a", sampling_params={"n": 3, "max_new_tokens": 1}).json()
    assert [result["text"] for result in results] == ["H"] * 3


def test_logprobs(served):
    body = {"text": "ab", "sampling_params": {"max_new_tokens": 2}, "return_logprob": True, "top_logprobs_num": 2}
    meta = served.post("/generate", **body).json()["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, 72, None], [-0.5, 101, None]]
    assert meta["output_top_logprobs"][0] == [[-0.5, 72, None], [-1.5, 73, None]]
    assert meta["input_token_logprobs"] == []
    meta = served.post("/generate", **body, logprob_start_len=0, return_text_in_logprobs=True).json()["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 97, "a"], [-0.5, 98, "b"]]
    assert meta["input_top_logprobs"] == [None, [[-0.5, 98, "b"], [-1.5, 99, "c"]]]
    meta = served.post("/generate", **body, logprob_start_len=1).json()["meta_info"]
    assert meta["input_token_logprobs"] == [[-0.5, 98, None]]


def test_stream_repeats_its_text(served):
    events = _events(served.post("/generate", text="a", stream=True, sampling_params={"max_new_tokens": 3}).text)
    assert [event["text"] for event in events] == ["H", "He", "Hel"]
    assert [event["output_ids"] for event in events] == [[72], [72, 101], [72, 101, 108]]
    assert [event["meta_info"]["completion_tokens"] for event in events] == [1, 2, 3]
    assert [event["meta_info"]["finish_reason"] for event in events] == [None, None, {"type": "length", "length": 3}]
    assert all("index" not in event for event in events)


def test_streamed_batch_carries_indices(served):
    events = _events(served.post("/generate", text=["a", "b"], stream=True, sampling_params={"max_new_tokens": 2, "n": 2}).text)
    last = {event["index"]: event["text"] for event in events}
    assert last == {0: "He", 1: "He", 2: "He", 3: "He"}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "text", "one of text and input_ids"),
        ({"text": "a", "input_ids": [1]}, "text", "one of text and input_ids"),
        ({"text": []}, "text", "empty"),
        ({"text": ["a", ""]}, "text", "empty"),
        ({"input_ids": [1, 999]}, "input_ids", "999"),
        ({"input_ids": [1, True]}, "input_ids", "list of token ids"),
        ({"text": "a", "sampling_params": {"max_tokens": 3}}, "sampling_params.max_tokens", "max_new_tokens"),
        ({"text": "a", "sampling_params": {"regex": "a+"}}, "sampling_params.regex", "constrain"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "temperature", "-1"),
        ({"text": "a", "sampling_params": {"temperature": "hot"}}, "sampling_params.temperature", "hot"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params", "1 entries for 2 prompts"),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid", "different"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 5}, "logprob_start_len", "5"),
        ({"text": "a", "image_data": "x.png"}, "image_data", "text only"),
        ({"text": "a", "sampling_params": {"max_new_tokens": CONTEXT}}, "max_tokens", str(CONTEXT)),
    ],
)
def test_refusals(served, body, param, words):
    error = served.error("/generate", 400, **body)
    assert error["param"] == param
    assert words in error["message"]
    assert served.engine.calls == []


def test_one_bad_prompt_of_a_batch_ends_the_batch(served):
    served.engine.delay_s = 0.01
    body = {"text": ["a", "b"], "rid": ["one", "one-more"]}
    served.post("/generate", **body).raise_for_status()
    served.engine.refusal = RuntimeError("secret")
    assert "secret" not in served.error("/generate", 500, **body)["message"]
