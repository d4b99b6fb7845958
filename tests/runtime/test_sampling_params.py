"""Proves that every sampling value out of its range is refused by name, and that the edges of the ranges are allowed."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from octavo.runtime.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
    InvalidParameter,
    SamplingParams,
)

NAN, INF = float("nan"), float("inf")

REFUSED: dict[str, list[Any]] = {
    "max_tokens": [-1, 1.5, True, "5", None],
    "min_tokens": [-1, 0.5, False],
    "temperature": [-0.1, 100.1, NAN, INF, "1", None, True],
    "top_p": [0, 0.0, -0.5, 1.01, NAN, None],
    "top_k": [-2, 0.5, True, None],
    "min_p": [-0.01, 1.01, NAN],
    "frequency_penalty": [-2.01, 2.01, NAN, INF],
    "presence_penalty": [-2.01, 2.01, NAN, -INF],
    "repetition_penalty": [0, -1, 100.1, NAN, INF],
    "logit_bias": [{-1: 0.0}, {"5": 1.0}, {True: 1.0}, {1: NAN}, {1: 100.5}, {1: -101}, dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.0)],
    "seed": [1.0, "1", True, 2**64, -(2**63) - 1],
    "stop": [("",), (5,), ("x",) * (MAX_STOP_STRINGS + 1)],
    "stop_token_ids": [(-1,), (1.0,), (True,), (1,) * (MAX_STOP_TOKEN_IDS + 1)],
    "logprobs": [-1, 1.0, True, MAX_TOP_LOGPROBS + 1],
    "prompt_logprobs": [-1, "1", False, MAX_TOP_LOGPROBS + 1],
    "prompt_logprobs_start": [-1, 0.0, None, True],
}
ALLOWED: dict[str, list[Any]] = {
    "max_tokens": [0, 10**9],
    "min_tokens": [0, 128],
    "temperature": [0, 0.0, 100, 1e-6],
    "top_p": [1, 1e-9],
    "top_k": [-1, 0, 1, 10**6],
    "min_p": [0, 1.0],
    "frequency_penalty": [-2, 2.0],
    "presence_penalty": [-2.0, 2],
    "repetition_penalty": [1e-6, 100],
    "logit_bias": [{}, {0: -100, 7: 100.0}, dict.fromkeys(range(MAX_LOGIT_BIAS), 0.0)],
    "seed": [None, 0, -(2**63), 2**64 - 1],
    "stop": [(), ("x",) * MAX_STOP_STRINGS],
    "stop_token_ids": [(), (0, 10**6), (1,) * MAX_STOP_TOKEN_IDS],
    "logprobs": [None, 0, MAX_TOP_LOGPROBS],
    "prompt_logprobs": [None, 0, MAX_TOP_LOGPROBS],
    "prompt_logprobs_start": [0, 10**6],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert str(caught.value).startswith(f"{name}=")
    assert "it must be" in str(caught.value)


@pytest.mark.parametrize(("name", "value"), cases(ALLOWED))
def test_the_edges_of_a_range_are_allowed(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_a_whole_number_beyond_floats_is_refused(value: int) -> None:
    with pytest.raises(InvalidParameter, match="temperature"):
        SamplingParams(temperature=value)


def test_min_tokens_beyond_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidParameter, match=r"min_tokens=5 is not valid: it must be at most max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=4, max_tokens=4).min_tokens == 4


@pytest.mark.parametrize(
    ("params", "greedy"),
    [({"temperature": 0}, True), ({"top_k": 1}, True), ({}, False), ({"top_k": 2}, False), ({"temperature": 1e-6}, False)],
)
def test_greedy_is_zero_temperature_or_one_candidate(params: dict[str, Any], greedy: bool) -> None:
    assert SamplingParams(**params).is_greedy is greedy


@pytest.mark.parametrize("params", [{"logit_bias": {3: 1.0, 10: 1.0}}, {"stop_token_ids": (3, 10)}])
def test_tokens_the_model_lacks_are_refused(params: dict[str, Any]) -> None:
    wishes = SamplingParams(**params)
    wishes.check_vocabulary(11)
    with pytest.raises(InvalidParameter, match=r"=10 is not valid: .* below the vocabulary size 10") as caught:
        wishes.check_vocabulary(10)
    assert caught.value.param in params


def test_params_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]
