"""POST /v1/completions through the openai package and raw."""

from __future__ import annotations

import json

import pytest

from .fake_engine import CONTEXT, EOS


def test_whole_answer(served):
    answer = served.openai.completions.create(model="m", prompt="Say")
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("Hello wörld!", "stop", None)
    assert choice.model_extra == {"matched_stop": EOS}
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert served.engine.calls[0].params.max_tokens == 16


def test_default_length_gives_way_to_the_context(served):
    served.openai.completions.create(model="m", prompt="x" * (CONTEXT - 3))
    assert served.engine.calls[0].params.max_tokens == 3


def test_finish_reason_rides_on_the_last_text(served):
    stream = served.openai.completions.create(model="m", prompt="Say", stream=True, max_tokens=5, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in chunks] == [
        ("H", None), ("e", None), ("l", None), ("l", None), ("o", "length"),
    ]  # fmt: skip
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 5)
    assert all(chunk.usage is None for chunk in chunks)


def test_half_characters_make_no_chunk(served):
    served.engine.reply = "ö"
    chunks = list(served.openai.completions.create(model="m", prompt="Say", stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == ["ö", ""]


@pytest.mark.parametrize("streamed", [False, True])
def test_many_prompts_times_n(served, streamed):
    request = {"model": "m", "prompt": ["a", "bb"], "n": 2, "echo": True, "seed": 5}
    if streamed:
        texts: dict[int, str] = {}
        for chunk in served.openai.completions.create(**request, stream=True):
            texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    else:
        answer = served.openai.completions.create(**request)
        texts = {choice.index: choice.text for choice in answer.choices}
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4 * 14)
    assert texts == {0: "aHello wörld!", 1: "aHello wörld!", 2: "bbHello wörld!", 3: "bbHello wörld!"}
    assert sorted((call.text, call.params.seed) for call in served.engine.calls) == [("a", 5), ("a", 6), ("bb", 5), ("bb", 6)]


@pytest.mark.parametrize(("prompt", "prompts"), [([72, 105], [[72, 105]]), ([[72], [105, 106]], [[72], [105, 106]])])
def test_token_ids_as_prompt(served, prompt, prompts):
    answer = served.openai.completions.create(model="m", prompt=prompt, echo=True, max_tokens=1)
    assert [call.prompt for call in served.engine.calls] == prompts
    assert [choice.text for choice in answer.choices] == [bytes(ids).decode() + "H" for ids in prompts]


def test_logprobs(served):
    logprobs = served.openai.completions.create(model="m", prompt="Say", logprobs=2, max_tokens=3).choices[0].logprobs
    assert logprobs.tokens == ["H", "e", "l"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs[0] == {"H": -0.5, "I": -1.5}


def test_logprobs_zero_still_tells_the_sampled_token(served):
    logprobs = served.openai.completions.create(model="m", prompt="Say", logprobs=0, max_tokens=1).choices[0].logprobs
    assert logprobs.top_logprobs == [{"H": -0.5}]


def test_streamed_logprobs_lose_no_token(served):
    chunks = list(served.openai.completions.create(model="m", prompt="ab", logprobs=1, echo=True, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for part in parts for token in part.tokens] == [*"abHello w", "\ufffd", "\ufffd", *"rld!", "<256>"]
    assert [offset for part in parts for offset in part.text_offset] == list(range(16))
    assert parts[0].token_logprobs == [None, -0.5, -0.5]


@pytest.mark.parametrize("streamed", [False, True])
def test_echo_without_answer_scores_the_prompt(served, streamed):
    response = served.post("/v1/completions", prompt="abc", echo=True, logprobs=1, max_tokens=0, stream=streamed)
    if streamed:
        first, done = [line for line in response.text.split("\n\n") if line]
        assert done == "data: [DONE]"
        choice = json.loads(first.removeprefix("data: "))["choices"][0]
    else:
        choice = response.json()["choices"][0]
        assert response.json()["usage"]["completion_tokens"] == 0
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"] == {
        "text_offset": [0, 1, 2],
        "token_logprobs": [None, -0.5, -0.5],
        "tokens": ["a", "b", "c"],
        "top_logprobs": [None, {"b": -0.5}, {"c": -0.5}],
    }
    assert served.engine.calls[0].params.prompt_logprobs == 1


def test_best_of_equal_to_n_is_no_wish(served):
    assert len(served.openai.completions.create(model="m", prompt="Say", n=2, best_of=2).choices) == 2
