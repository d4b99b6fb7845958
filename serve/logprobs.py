"""Log-probabilities in the three shapes that clients read: chat, completions, /generate. Knows no request."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ..runtime.outputs import TokenLogprob
from ..runtime.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no infinity; vLLM's stand-in for it


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], *, num_top: int) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}`."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": tokenizer.token_text(token_id), "logprob": _finite(logprob), "bytes": list(tokenizer.token_bytes(token_id))}

    content = [
        {**entry(item.token_id, item.logprob or 0.0), "top_logprobs": [entry(*pair) for pair in item.top[:num_top]]} for item in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], *, num_top: int, offset: int, hidden: Collection[int]
) -> tuple[dict[str, Any], int]:
    """`{text_offset, token_logprobs, tokens, top_logprobs}` and the offset of the next token, in characters of the text.

    As in OpenAI's API the best tokens are joined by the sampled one, so there are up to num_top + 1; nothing predicts the
    first token of a prompt, so it has null. `hidden` tokens take no room in the text.
    """
    offsets: list[int] = []
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for item in logprobs:
        text = tokenizer.token_text(item.token_id)
        offsets.append(offset)
        tokens.append(text)
        offset += 0 if item.token_id in hidden else len(text)
        if item.logprob is None:
            values.append(None)
            tops.append(None)
            continue
        best: dict[str, float] = {}
        for token_id, logprob in item.top[:num_top]:
            best.setdefault(tokenizer.token_text(token_id), _finite(logprob))
        best.setdefault(text, _finite(item.logprob))
        values.append(_finite(item.logprob))
        tops.append(best)
    return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}, offset


GenerateEntry = tuple[float | None, int, str | None]


def generate_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], *, with_text: bool) -> list[GenerateEntry]:
    """SGLang's `[logprob, token_id, text|null]` for each token."""
    return [
        (None if item.logprob is None else _finite(item.logprob), item.token_id, tokenizer.token_text(item.token_id) if with_text else None)
        for item in logprobs
    ]


def generate_top_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], *, num_top: int, with_text: bool
) -> list[list[GenerateEntry] | None]:
    """SGLang's best tokens of each position, best first; null where nothing predicts the token."""
    return [
        None
        if item.logprob is None
        else [(_finite(value), token, tokenizer.token_text(token) if with_text else None) for token, value in item.top[:num_top]]
        for item in logprobs
    ]
