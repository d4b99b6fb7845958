"""Proves that admission refuses what can never run, with the remedy, and grants what context and pool leave."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.runtime.admission import EngineLimits, admit
from octavo.runtime.errors import RequestRefused
from octavo.runtime.sampling_params import SamplingParams

LIMITS = EngineLimits(context_length=20, max_total_tokens=32, vocab_size=50)
SMALL_POOL = EngineLimits(context_length=100, max_total_tokens=16, vocab_size=50)


def refusal(prompt: list[object], limits: EngineLimits = LIMITS, **params: object) -> RequestRefused:
    with pytest.raises(RequestRefused) as caught:
        admit(prompt, SamplingParams(**params), limits)  # type: ignore[arg-type]
    return caught.value


def test_an_empty_prompt_is_refused() -> None:
    error = refusal([])
    assert (error.status_code, error.param) == (400, "prompt")
    assert "empty" in str(error)


@pytest.mark.parametrize("token", [50, -1, 2**40, "7", 1.0, None])
def test_a_token_outside_the_vocabulary_is_named(token: object) -> None:
    error = refusal([3, token])
    assert str(error) == f"token id {token!r} is out of range: the vocabulary has 50 tokens, from 0"
    assert error.param == "prompt"


@pytest.mark.parametrize("length", [20, 21, 5000])
def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(length: int) -> None:
    error = refusal([1] * length)
    assert (error.status_code, error.code) == (400, "context_length_exceeded")
    assert f"{length} tokens" in str(error)
    assert "20 tokens" in str(error)


def test_a_prompt_larger_than_the_pool_is_refused_with_the_flags_that_help() -> None:
    error = refusal([1] * 16, SMALL_POOL)
    assert (error.status_code, error.code) == (400, "context_length_exceeded")
    assert "16 tokens" in str(error)
    assert "--max-total-tokens" in str(error)
    assert "--mem-fraction-static" in str(error)


@pytest.mark.parametrize("limits", [LIMITS, SMALL_POOL])
def test_a_prompt_may_fill_everything_when_nothing_is_generated(limits: EngineLimits) -> None:
    most = min(limits.context_length, limits.max_total_tokens)
    assert admit([1] * most, SamplingParams(max_tokens=0), limits) == 0
    refusal([1] * (most + 1), limits, max_tokens=0)


@pytest.mark.parametrize("params", [{"stop_token_ids": (3, 50)}, {"logit_bias": {50: 1.0}}])
def test_wishes_about_tokens_outside_the_vocabulary_are_refused(params: dict[str, object]) -> None:
    error = refusal([1], **params)
    assert error.param in params
    assert "50" in str(error)


@given(
    length=st.integers(1, 40),
    wanted=st.integers(0, 60),
    context=st.integers(1, 40),
    pool=st.integers(1, 40),
)
def test_what_is_granted_always_fits_and_is_the_most_that_does(length: int, wanted: int, context: int, pool: int) -> None:
    room = min(context, pool) - length
    limits = EngineLimits(context, pool, 50)
    params = SamplingParams(max_tokens=wanted)
    if room < min(1, wanted):
        with pytest.raises(RequestRefused):
            admit([1] * length, params, limits)
    else:
        assert admit([1] * length, params, limits) == min(wanted, room)
