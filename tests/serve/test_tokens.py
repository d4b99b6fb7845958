"""/tokenize and /detokenize, and what tells of the model."""

from __future__ import annotations

import pytest


def test_a_prompt(served):
    told = served.post("/tokenize", prompt="añ").json()
    assert served.post("/v1/tokenize", prompt="añ").json() == told
    assert told == {"tokens": list("añ".encode()), "count": 3, "max_model_len": 2048}
    assert served.post("/tokenize", prompt="a", return_token_strs=True).json()["token_strs"] == ["a"]


def test_a_list_of_prompts(served):
    told = served.post("/tokenize", prompt=["ab", ""], return_token_strs=True).json()
    assert told == {"tokens": [[97, 98], []], "count": [2, 0], "max_model_len": 2048, "token_strs": [["a", "b"], []]}


def test_a_conversation(served):
    messages = [{"role": "user", "content": "hi"}]
    told = served.post("/tokenize", messages=messages).json()["tokens"]
    served.post("/v1/chat/completions", messages=messages, max_tokens=1)
    assert told == served.engine.calls[0].prompt
    assert served.post("/tokenize", messages=messages, add_generation_prompt=False).json()["count"] < len(told)


def test_back(served):
    assert served.post("/detokenize", tokens=[104, 105, 256]).json() == {"text": "hi", "prompt": "hi"}
    assert served.post("/detokenize", tokens=[[104], [105]]).json()["text"] == ["h", "i"]
    assert served.post("/detokenize", tokens=[]).json()["text"] == ""


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/detokenize", {"tokens": [999]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_what_cannot_be(served, path, body, param):
    assert served.error(path, 400, **body)["param"] == param


def test_embeddings_are_refused_and_the_model_is_told_of(served):
    assert served.error("/v1/embeddings", 400, input="a")["code"] == "unsupported_model"
    told = served.http.get("/get_model_info").json()
    assert told == served.http.get("/model_info").json()
    assert (told["is_generation"], told["context_length"]) == (True, 2048)
