"""From the fields of a request to SamplingParams: which default holds, and how much room the context leaves. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..runtime.client import ModelInfo
from ..runtime.sampling_params import SamplingParams
from .errors import ApiError, shown
from .protocol import SamplingFields
from .request_body import as_list

MAX_N = 128
MAX_BIAS = 100
_SEED_RANGE = 2**64

# Taken from the model's generation_config.json where the caller does not say, as SGLang and vLLM do.
_MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_PLAIN = ("min_tokens", "frequency_penalty", "presence_penalty", "seed", "ignore_eos", "skip_special_tokens")


def openai_sampling(
    fields: SamplingFields, *, info: ModelInfo, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
) -> SamplingParams:
    """The caller's wishes, else the model's defaults, else OpenAI's. Raises InvalidParameter or ApiError."""
    wishes: dict[str, Any] = {name: info.default_sampling[name] for name in _MODEL_DEFAULTS if name in info.default_sampling}
    for name in (*_MODEL_DEFAULTS, *_PLAIN):
        value = getattr(fields, name)
        if value is not None:
            wishes[name] = value
    params = SamplingParams(
        **wishes,
        max_tokens=max_tokens,
        logit_bias=logit_bias_by_id(fields.logit_bias, info),
        stop=tuple(as_list(fields.stop)),
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        no_stop_trim=bool(fields.no_stop_trim or fields.include_stop_str_in_output),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    params.check_vocabulary(info.vocab_size)
    return params


def logit_bias_by_id(bias: Mapping[str, float] | None, info: ModelInfo) -> dict[int, float]:
    """JSON keys are strings; token ids are not. Raises ApiError 400, which tells keys and values apart."""
    result = {}
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < info.vocab_size):
            allowed = f'token ids of this model as strings, "0" to "{info.vocab_size - 1}"'
            raise ApiError(f"logit_bias has the key {shown(key)}: keys must be {allowed}", param="logit_bias")
        if not -MAX_BIAS <= value <= MAX_BIAS:
            rule = f"biases must be from -{MAX_BIAS} to {MAX_BIAS}"
            raise ApiError(f"logit_bias has {shown(value)} for the token {key}: {rule}", param="logit_bias")
        result[int(key)] = value
    return result


def answer_length(info: ModelInfo, *, prompt_tokens: int, asked: int | None, default: int | None, prompt_param: str) -> int:
    """How many tokens may be generated. `default` None stands for all the room that is left.

    Raises ApiError 400 `context_length_exceeded` when prompt and answer do not fit the context together. A prompt that is too long
    by itself is told in the words of runtime/admission.py, which guards callers without HTTP.
    """
    context = info.context_length
    room = context - prompt_tokens
    length = asked if asked is not None else default
    if length is None:
        length = max(min(room, info.max_total_tokens - prompt_tokens), 1)
    if prompt_tokens + max(0, min(length, 1)) > context:
        raise ApiError(
            f"the prompt has {prompt_tokens} tokens, which leaves no room to answer in a context length of {context} tokens: shorten it",
            param=prompt_param,
            code="context_length_exceeded",
        )
    if length > room:
        raise ApiError(
            f"the prompt has {prompt_tokens} tokens and {length} are to be generated, more than the context length of {context} tokens: "
            f"shorten the prompt or ask for at most {room} tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return length


def check_token_ids(ids: list[int], info: ModelInfo, *, param: str) -> list[int]:
    """Refuse an empty prompt and ids that the model does not have. Raises ApiError 400."""
    if not ids:
        raise ApiError(f"{param} is empty: give at least one token", param=param)
    for extreme in (min(ids), max(ids)):
        if not 0 <= extreme < info.vocab_size:
            raise ApiError(f"{param} has the token id {extreme}: ids must be from 0 to {info.vocab_size - 1}", param=param)
    return ids


def check_n(n: int | None) -> int:
    """How many answers to one prompt. Raises ApiError 400."""
    if n is None:
        return 1
    if not 1 <= n <= MAX_N:
        raise ApiError(f"n={n} is not valid: it must be from 1 to {MAX_N}", param="n")
    return n


def for_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """The same wishes for the `choice`-th answer to one prompt: a given seed is counted up, so that answers differ."""
    if params.seed is None or choice == 0:
        return params
    seed = params.seed + choice
    return replace(params, seed=seed if seed < _SEED_RANGE else seed - _SEED_RANGE)
