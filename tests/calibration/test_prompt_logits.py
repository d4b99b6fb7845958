"""Proves Engine.prompt_logits: every position's logits, piece by piece, whatever else the engine does and has cached."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import octavo
from octavo.runtime.errors import EngineDead, RequestRefused

POOL = 512
OPTIONS = {"device": "cpu", "max_total_tokens": POOL, "chunked_prefill_size": 64, "page_size": 16, "num_threads": 2, "show_progress": False}
TOKENS = [(7 * i * i + 3 * i) % 251 for i in range(150)]


@pytest.fixture(scope="module")
def engine(tiny: tuple[Path, Any]) -> Iterator[octavo.Engine]:
    with octavo.Engine(str(tiny[0]), **OPTIONS) as running:
        yield running


def expected(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def assert_equal(pieces: list[tuple[int, torch.Tensor]], model: Any, tokens: list[int]) -> None:
    logits = torch.cat([rows for _, rows in pieces])
    assert logits.dtype == torch.float32
    right = expected(model, tokens)
    assert logits.shape == right.shape
    assert (logits - right).abs().max() < 1e-4 * right.std()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
def test_every_position_in_pieces_of_a_chunk(engine: octavo.Engine, tiny: tuple[Path, Any], length: int) -> None:
    pieces = list(engine.prompt_logits(TOKENS[:length]))
    assert [start for start, _ in pieces] == list(range(0, length, 64))
    assert max(rows.shape[0] for _, rows in pieces) <= 64
    assert_equal(pieces, tiny[1], TOKENS[:length])


def test_a_cached_prefix_is_not_used(engine: octavo.Engine, tiny: tuple[Path, Any]) -> None:
    engine.generate(input_ids=TOKENS, sampling_params={"max_new_tokens": 2, "temperature": 0})
    before = engine.get_server_info()["internal_states"][0]["cached_tokens"]
    first, *_ = engine.prompt_logits(TOKENS)
    assert_equal([first], tiny[1], TOKENS[:64])
    again = list(engine.prompt_logits(TOKENS))
    assert_equal(again, tiny[1], TOKENS)
    pages_of_its_own = 2 * (64 + 128)  # what the second and the third piece of each call stand on
    assert engine.get_server_info()["internal_states"][0]["cached_tokens"] - before == pages_of_its_own


def test_requests_beside_it_get_what_they_get_alone(engine: octavo.Engine, tiny: tuple[Path, Any]) -> None:
    wish = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    alone = engine.generate(input_ids=TOKENS[:20], sampling_params=wish)["output_ids"]
    stream = engine.generate(input_ids=TOKENS[:40], sampling_params={**wish, "max_new_tokens": 100}, stream=True)
    next(stream)
    pieces = []
    for piece in engine.prompt_logits(TOKENS):  # in the midst of one, the engine answers others
        pieces.append(piece)
        assert engine.generate(input_ids=TOKENS[:20], sampling_params=wish)["output_ids"] == alone
    assert_equal(pieces, tiny[1], TOKENS)
    assert len(list(stream)[-1]["output_ids"]) == 100


def test_an_iterator_left_early_holds_nothing(engine: octavo.Engine) -> None:
    pieces = engine.prompt_logits(TOKENS)
    next(pieces)
    del pieces
    assert engine.flush_cache() is True
    assert engine.get_server_info()["internal_states"][0]["num_used_tokens"] == 0


def test_a_prompt_as_long_as_the_pool_and_the_context(engine: octavo.Engine, tiny: tuple[Path, Any]) -> None:
    tokens = (TOKENS * 4)[:POOL]
    assert_equal(list(engine.prompt_logits(tokens)), tiny[1], tokens)


def test_without_a_prefix_cache_it_is_slower_and_the_same(tiny: tuple[Path, Any]) -> None:
    with octavo.Engine(str(tiny[0]), **OPTIONS, disable_radix_cache=True) as engine:
        assert_equal(list(engine.prompt_logits(TOKENS)), tiny[1], TOKENS)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [([], "the prompt is empty"), ([263], "token id 263 is out of range"), ([1] * 513, "513 tokens.*context length of 512")],
)
def test_refusals_come_at_the_call(engine: octavo.Engine, tokens: list[int], words: str) -> None:
    with pytest.raises(RequestRefused, match=words):
        engine.prompt_logits(tokens)


def test_an_engine_that_was_shut_down_says_so(tiny: tuple[Path, Any]) -> None:
    with octavo.Engine(str(tiny[0]), **OPTIONS) as engine:
        pieces = engine.prompt_logits(TOKENS)
        next(pieces)
    with pytest.raises(EngineDead, match="shut down"):
        next(pieces)
