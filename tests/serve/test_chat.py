"""POST /v1/chat/completions through the openai package and raw."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from .fake_engine import CONTEXT, EOS

ASK: Any = [{"role": "user", "content": "Hi"}]
PROMPT = "user: Hi\nassistant: "


def _events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_whole_answer(served):
    served.engine.cached_tokens = 7
    answer = served.openai.chat.completions.create(model="default", messages=ASK)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "toy-model"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello wörld!", "stop")
    assert choice.model_extra == {"matched_stop": EOS}
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(PROMPT) + 1, 14, len(PROMPT) + 15)
    assert usage.prompt_tokens_details.cached_tokens == 7
    (call,) = served.engine.calls
    assert call.text == PROMPT
    assert call.params.max_tokens == CONTEXT - len(call.prompt)
    assert call.request_id == answer.id
    assert (call.params.temperature, call.params.top_p, call.params.seed) == (1.0, 1.0, None)


def test_stream_to_the_letter(served):
    response = served.post("/v1/chat/completions", model="default", messages=ASK, stream=True, max_tokens=2)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = _events(response.text)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert all(set(chunk) == {"id", "object", "created", "model", "choices"} for chunk in chunks)
    empty = {"index": 0, "logprobs": None, "finish_reason": None, "matched_stop": None}
    assert [chunk["choices"][0] for chunk in chunks] == [
        {**empty, "delta": {"reasoning_content": None, "role": "assistant", "content": ""}},
        {**empty, "delta": {"reasoning_content": None, "content": "H"}},
        {**empty, "delta": {"reasoning_content": None, "content": "e"}},
        {**empty, "delta": {"reasoning_content": None, "content": None}, "finish_reason": "length"},
    ]


def test_stream_with_usage(served):
    served.engine.cached_tokens = 3
    stream = served.openai.chat.completions.create(
        model="m", messages=ASK, stream=True, stream_options={"include_usage": True}, stop=["ö"], n=2
    )
    chunks = list(stream)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT) + 1, 2 * 9)
    assert usage.prompt_tokens_details.cached_tokens == 3
    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == "Hello w"
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["stop"]
        assert mine[-1].model_extra == {"matched_stop": "ö"}


def test_continuous_usage(served):
    options = {"continuous_usage_stats": True}
    chunks = _events(served.post("/v1/chat/completions", messages=ASK, stream=True, stream_options=options, max_tokens=3).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 3, 3]


@pytest.mark.parametrize("streamed", [False, True])
def test_logprobs(served, streamed):
    served.engine.reply = "aö"
    request = {"model": "m", "messages": ASK, "logprobs": True, "top_logprobs": 3}
    if streamed:
        chunks = list(served.openai.chat.completions.create(**request, stream=True))
        given = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs]
        content = [entry for logprobs in given for entry in logprobs.content]
    else:
        content = served.openai.chat.completions.create(**request).choices[0].logprobs.content
    assert [entry.bytes for entry in content] == [[97], [0xC3], [0xB6], list(b"<256>")]
    assert content[0].token == "a"
    assert content[0].logprob == -0.5
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("a", -0.5), ("b", -1.5), ("c", -9999.0)]


def test_logprobs_without_top(served):
    content = served.openai.chat.completions.create(model="m", messages=ASK, logprobs=True, max_tokens=1).choices[0].logprobs.content
    assert content[0].top_logprobs == []
    assert served.engine.calls[0].params.logprobs == 0


def test_n_answers_have_seeds_of_their_own(served):
    served.engine.delay_s = 0.005
    answer = served.openai.chat.completions.create(model="m", messages=ASK, n=3, seed=40)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(call.params.seed for call in served.engine.calls) == [40, 41, 42]
    assert served.engine.most_live == 3
    assert answer.usage.completion_tokens == 3 * 14
    assert answer.usage.prompt_tokens == len(PROMPT) + 1


def test_every_sampling_field_reaches_the_engine(served):
    served.post(
        "/v1/chat/completions", messages=ASK, max_completion_tokens=9, min_tokens=2, temperature=0.3, top_p=0.8, top_k=5, min_p=0.1,
        frequency_penalty=0.5, presence_penalty=-0.5, repetition_penalty=1.2, logit_bias={"65": -100, "66": 3}, seed=7, stop="x",
        stop_token_ids=[66], ignore_eos=True, skip_special_tokens=False, no_stop_trim=True, priority=4, cache_salt="tenant",
    ).raise_for_status()  # fmt: skip
    (call,) = served.engine.calls
    params = call.params
    assert (params.max_tokens, params.min_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (9, 2, 0.3, 0.8, 5, 0.1)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.5, -0.5, 1.2)
    assert (params.logit_bias, params.seed, params.stop, params.stop_token_ids) == ({65: -100, 66: 3}, 7, ("x",), (66,))
    assert (params.ignore_eos, params.skip_special_tokens, params.no_stop_trim) == (True, False, True)
    assert call.priority == 4
    assert len(call.cache_namespace) == 64  # a digest: a salt may be long, and is kept with every prefix


def test_defaults_come_from_the_model_where_it_has_them(served):
    served.engine.default_sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.9}
    served.post("/v1/chat/completions", messages=ASK, top_p=0.5)
    params = served.engine.calls[0].params
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 0.5)


def test_the_answer_fits_a_pool_smaller_than_the_context(served):
    served.engine.max_total_tokens = 100
    context = served.app.state.context
    assert context.info.max_total_tokens == 100
    served.post("/v1/chat/completions", messages=ASK)
    assert served.engine.calls[0].params.max_tokens == 100 - len(served.engine.calls[0].prompt)


def test_messages_of_every_kind(served):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    served.post("/v1/chat/completions", messages=messages).raise_for_status()
    assert served.engine.calls[0].text == "system: Be brief\nuser: one\ntwo\nassistant: \ntool: 42\nassistant: "


def test_continue_final_message(served):
    messages = [*ASK, {"role": "assistant", "content": "I am"}]
    served.post("/v1/chat/completions", messages=messages, continue_final_message=True).raise_for_status()
    assert served.engine.calls[0].text == "user: Hi\nassistant: I am"
    served.post("/v1/chat/completions", messages=ASK, add_generation_prompt=False).raise_for_status()
    assert served.engine.calls[1].text == "user: Hi\n"


def test_fields_that_cannot_change_the_answer_are_accepted(served):
    served.openai.chat.completions.create(
        model="", messages=ASK, user="u", store=False, metadata={"a": "b"}, service_tier="auto", safety_identifier="s",
        prompt_cache_key="k", parallel_tool_calls=True, response_format={"type": "text"}, modalities=["text"], tool_choice="none",
        extra_body={"reasoning_effort": None, "tools": [], "regex": "", "unheard_of": None},
    )  # fmt: skip


async def test_64_at_once_async(served):
    served.engine.delay_s = 0.01
    client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

    async def one() -> str:
        stream = await client.chat.completions.create(model="m", messages=ASK, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    answers = await asyncio.gather(*[one() for _ in range(64)])
    assert answers == ["Hello wörld!"] * 64
    assert served.engine.most_live > 32
    await client.close()
