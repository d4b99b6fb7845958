"""Proves the Python door: one engine in this process, called by threads and coroutines, ended while it works, told nonsense."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import octavo
from octavo.runtime.errors import EngineDead, RequestRefused
from octavo.runtime.sampling_params import SamplingParams

GREEDY = {"max_new_tokens": 6, "temperature": 0}

pytestmark = pytest.mark.needs_embedded_model


@pytest.fixture(scope="module")
def engine() -> Iterator[octavo.Engine]:
    with octavo.Engine(max_total_tokens=4096, random_seed=0, show_progress=False) as running:
        yield running


def test_a_prompt_gives_a_result_and_a_list_gives_a_list(engine: octavo.Engine) -> None:
    one = engine.generate("The capital of France is", GREEDY)
    assert one["text"].startswith(" Paris")
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
    assert (one["meta_info"]["prompt_tokens"], one["meta_info"]["completion_tokens"]) == (5, 6)
    many = engine.generate(["The capital of France is", "The capital of Italy is"], GREEDY)
    assert many[0]["text"] == one["text"]
    assert many[1]["text"].startswith(" Rome")
    ids = engine.tokenizer.encode("The capital of France is")
    assert engine.generate(input_ids=ids, sampling_params=GREEDY)["output_ids"] == one["output_ids"]


def test_a_stream_grows_to_the_whole_result(engine: octavo.Engine) -> None:
    whole = engine.generate("Once upon a time", GREEDY)
    steps = list(engine.generate("Once upon a time", GREEDY, stream=True))
    texts = [step["text"] for step in steps]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert steps[-1]["text"] == whole["text"]
    assert steps[-1]["output_ids"] == whole["output_ids"]
    assert [step["meta_info"]["finish_reason"] is None for step in steps] == [True] * (len(steps) - 1) + [False]


def test_a_model_is_inspected_without_loading_it(engine: octavo.Engine) -> None:
    model = engine.get_model_info()
    assert octavo.Engine.inspect() == {name: model[name] for name in ("context_length", "vocab_size")}
    assert octavo.Engine.inspect(context_length=64)["context_length"] == 64
    for options, words in (
        ({"context_length": 9000}, "beyond the model's 8192"),
        ({"linear_backend": "magic"}, "--linear-backend 'magic'"),
        ({"dtype": "float33"}, "--dtype 'float33'"),
    ):
        with pytest.raises(ValueError, match=words):
            octavo.Engine.inspect(**options)
    with pytest.raises(TypeError, match="no option dtpye"):
        octavo.Engine.inspect(dtpye="float32")


def test_leaving_a_stream_aborts_the_request(engine: octavo.Engine) -> None:
    stream = engine.generate("Once upon a time", {"max_new_tokens": 3000, "ignore_eos": True}, stream=True)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    state = engine.get_server_info()["internal_states"][0]
    assert state["num_running_reqs"] == 0
    assert engine.flush_cache() is True
    assert engine.get_server_info()["internal_states"][0]["num_used_tokens"] == 0


def test_a_stop_string_ends_the_text_and_the_engine_with_it(engine: octavo.Engine) -> None:
    result = engine.generate("The capital of France is", {"max_new_tokens": 500, "temperature": 0, "stop": "ari"})
    assert result["text"] == " P"
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": "ari"}
    assert engine.get_server_info()["internal_states"][0]["num_running_reqs"] == 0


def test_n_samples_differ_with_the_seed_and_repeat_with_it(engine: octavo.Engine) -> None:
    wish = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5, "n": 3, "ignore_eos": True}
    first = [result["text"] for result in engine.generate("My favourite", wish)]
    assert len(set(first)) == 3
    again = engine.generate(["Unrelated text", "My favourite"], [{"max_new_tokens": 30, "seed": 1}, wish])
    assert [result["text"] for result in again[1:]] == first


def test_score_is_the_sum_of_what_prompt_logprobs_say(engine: octavo.Engine) -> None:
    engine.flush_cache()
    prompt = "The capital of France is " * 8 + "The capital of France is"
    scores = engine.score(prompt, [" Paris", " London", " Paris is"])
    assert scores[0][0] > scores[1][0]
    assert scores[2][0] == pytest.approx(scores[0][0], abs=1e-4)
    whole = engine.generate(prompt + " Paris", {"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0)
    entries = whole["meta_info"]["input_token_logprobs"]
    assert entries[0][0] is None
    assert entries[-1][0] == pytest.approx(scores[0][0], abs=1e-2)  # bfloat16 pages: a cached prefix is rounded, a fresh one too
    cached = engine.generate(prompt + " Paris", GREEDY)["meta_info"]["cached_tokens"]
    assert cached > 16


def test_logprobs_of_the_answer(engine: octavo.Engine) -> None:
    result = engine.generate("The capital of France is", GREEDY, return_logprob=True, top_logprobs_num=3)
    meta = result["meta_info"]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == result["output_ids"]
    for (logprob, token, _), top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert (logprob, token) == top[0][:2]
        assert top[0][0] >= top[1][0] >= top[2][0]


def test_threads_and_coroutines_share_one_engine(engine: octavo.Engine) -> None:
    expected = engine.generate("One two three", GREEDY)["text"]
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(engine.generate("One two three", GREEDY)["text"])) for _ in range(6)]
    for thread in threads:
        thread.start()

    async def streams() -> list[str]:
        async def one() -> str:
            text = ""
            async for step in await engine.async_generate("One two three", GREEDY, stream=True):
                text = step["text"]
            return text

        return await asyncio.gather(*(one() for _ in range(6)))

    found += asyncio.run(streams())
    for thread in threads:
        thread.join()
    assert found == [expected] * 12


@pytest.mark.parametrize(
    ("prompt", "wish", "words"),
    [
        ("", {}, "the prompt is empty"),
        ("a", {"temprature": 1}, "has no 'temprature'"),
        ("a", {"temperature": float("nan")}, "temperature=nan"),
        ("a", {"top_p": 0}, "top_p=0"),
        ("a", {"n": 0}, "n=0"),
        ("a", {"max_new_tokens": -1}, "max_tokens=-1"),
        ("a", {"stop_token_ids": [49152]}, "below the vocabulary size 49152"),
        ("a " * 9000, {}, r"tokens.*context length of 8192"),
        ("a " * 5000, {}, r"KV pool of 4096 tokens.*--max-total-tokens"),
    ],
)
def test_bad_requests_are_refused_with_the_value_and_the_remedy(
    engine: octavo.Engine, prompt: str, wish: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestRefused, match=words):
        engine.generate(prompt, wish)


def test_token_ids_out_of_range_are_refused(engine: octavo.Engine) -> None:
    with pytest.raises(RequestRefused, match="token id 49152 is out of range"):
        engine.generate(input_ids=[1, 49152])
    with pytest.raises(RequestRefused, match="either a prompt or input_ids"):
        engine.generate("a", input_ids=[1])


def test_an_answer_never_outgrows_the_pool() -> None:
    with octavo.Engine(max_total_tokens=512, show_progress=False) as small:
        result = small.generate(input_ids=[5] * 506, sampling_params=SamplingParams(max_tokens=100, ignore_eos=True, temperature=0.0))
    assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 6}


def test_unknown_options_are_named() -> None:
    with pytest.raises(TypeError, match=r"no option max_total_token; .*max_total_tokens"):
        octavo.Engine(max_total_token=5)


def test_shutdown_fails_what_runs_and_what_comes_later() -> None:
    short = octavo.Engine(max_total_tokens=512, show_progress=False)
    stream = short.generate("Once", {"max_new_tokens": 400, "ignore_eos": True}, stream=True)
    next(stream)
    short.shutdown()
    with pytest.raises(EngineDead, match="shut down"):
        list(stream)
    with pytest.raises(EngineDead, match="shut down"):
        short.generate("Twice")
    short.shutdown()
