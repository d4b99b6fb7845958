"""What the engine tells a caller about one request. Plain values: no tensors, no HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishType = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class FinishReason:
    """Why a request ended.

    `matched` is the stop token id or stop string for type "stop". For type "abort", `message` says why, in words for the
    caller, and `status_code` is the HTTP status that fits (499 client went away, 500 engine failure, 503 overload).
    """

    type: FinishType
    matched: int | str | None = None
    message: str = ""
    status_code: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural log) of one token and of the best tokens at its position, best first."""

    token_id: int
    logprob: float | None  # None for the first prompt token, which nothing predicts
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenOutput:
    """New tokens of one request, as the engine sampled them. The last one of a request carries `finish`."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()  # one a token when asked for
    finish: FinishReason | None = None
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # whole prompt, once, with the first output
    num_retractions: int = 0
    queue_s: float = 0.0  # seconds that the request waited for its first step


@dataclass(frozen=True)
class TextOutput:
    """New text of one request, after detokenizing and stop strings. `text` and `token_ids` are what is new, never repeated.

    Text that could be the start of a stop string, or half of a character, is held back until it is decided, so `text` can be
    empty while `token_ids` is not. The last output of a request carries `finish`; nothing follows it.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int  # so far
    cached_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    num_retractions: int = 0
    queue_s: float = 0.0
    arrived_s: float | None = None  # by time.perf_counter, where it came from another process
