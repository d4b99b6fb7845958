"""The usage object: prompts counted once, answers summed over n. Knows no engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..runtime.outputs import TextOutput


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object, with SGLang's flat `reasoning_tokens` beside it."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "reasoning_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def usage_of_all(outputs: Iterable[tuple[int, TextOutput]], n: int) -> dict[str, Any]:
    """Usage of a whole job from the last output of each sequence; the first of every n speaks for its prompt."""
    prompt_tokens = completion_tokens = cached_tokens = 0
    for index, output in outputs:
        completion_tokens += output.completion_tokens
        if index % n == 0:
            prompt_tokens += output.prompt_tokens
            cached_tokens += output.cached_tokens
    return usage_of(prompt_tokens, completion_tokens, cached_tokens)
