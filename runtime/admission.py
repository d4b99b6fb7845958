"""Admission: whether a request can be served at all, decided at the border from plain numbers. Knows no queue and no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import RequestRefused
from .sampling_params import InvalidParameter, SamplingParams


@dataclass(frozen=True)
class EngineLimits:
    """What an engine holds: tokens a sequence may have, tokens the KV pool has, and the size of the vocabulary."""

    context_length: int
    max_total_tokens: int
    vocab_size: int


def admit(prompt: Sequence[int], params: SamplingParams, limits: EngineLimits) -> int:
    """How many tokens the request may generate: `max_tokens`, or what context and pool leave. Raises RequestRefused when it cannot run."""
    length = len(prompt)
    if length == 0:
        raise RequestRefused("the prompt is empty: give at least one token", param="prompt")
    for token in prompt:
        if not isinstance(token, int) or not 0 <= token < limits.vocab_size:
            raise RequestRefused(
                f"token id {token!r} is out of range: the vocabulary has {limits.vocab_size} tokens, from 0", param="prompt"
            )
    wanted = min(1, params.max_tokens)
    if length + wanted > limits.context_length:
        raise RequestRefused(
            f"the prompt has {length} tokens, which leaves no room to answer in a context length of {limits.context_length} tokens: "
            "shorten it",
            code="context_length_exceeded",
            param="prompt",
        )
    if length + wanted > limits.max_total_tokens:
        raise RequestRefused(
            f"the prompt has {length} tokens, more than the KV pool of {limits.max_total_tokens} tokens can serve: "
            "shorten it, or start the server with a larger --max-total-tokens or --mem-fraction-static",
            code="context_length_exceeded",
            param="prompt",
        )
    try:
        params.check_vocabulary(limits.vocab_size)
    except InvalidParameter as error:
        raise RequestRefused(str(error), param=error.param) from error
    return min(params.max_tokens, limits.context_length - length, limits.max_total_tokens - length)
