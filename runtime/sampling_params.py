"""SamplingParams: the validated wishes of one caller. Knows no tensors and no HTTP."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 4096
MAX_TOP_LOGPROBS = 1024
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 1024


class InvalidParameter(ValueError):
    """A value the caller sent cannot be used. `param` names the field, the text gives value and remedy."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def _require(ok: bool, param: str, value: object, rule: str) -> None:
    if not ok:
        raise InvalidParameter(param, f"{param}={value!r} is not valid: it must be {rule}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN and infinity, and for whole numbers that no float can hold


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one sequence is sampled and when it ends. Names and meanings are SGLang's and vLLM's.

    temperature 0 is greedy. top_k -1 (or 0) is off, top_p 1 is off, min_p 0 is off. Penalties: frequency and presence
    count generated tokens only (OpenAI), repetition counts prompt and generated tokens (CTRL, arXiv:1909.05858).
    `seed` None draws a fresh one for each request. `logprobs` None is off; k >= 0 reports the sampled token's log-probability and
    the k best of each step. Log-probabilities are of the raw distribution: after log-softmax of the model's logits, before
    penalties, bias, temperature and filters. `prompt_logprobs` is the same for every prompt position but the first.
    Raises InvalidParameter on construction when a value cannot be used.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False  # keep the matched stop string in the text
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0  # first prompt position that is reported; what lies before may come from the prefix cache

    def __post_init__(self) -> None:
        for name in ("max_tokens", "min_tokens"):
            value = getattr(self, name)
            _require(_is_int(value) and 0 <= value < 2**62, name, value, "a whole number >= 0")
        start = self.prompt_logprobs_start
        _require(_is_int(start) and start >= 0, "prompt_logprobs_start", start, "a whole number >= 0")
        _require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("min_p", 0.0, 1.0),
            ("frequency_penalty", -2.0, 2.0),
            ("presence_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            _require(_is_finite(value) and low <= value <= high, name, value, f"between {low:g} and {high:g}")
        _require(_is_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(_is_int(self.top_k) and -1 <= self.top_k < 2**31, "top_k", self.top_k, "-1 or 0 (off) or a whole number >= 1, of 31 bits")
        repetition = self.repetition_penalty
        _require(_is_finite(repetition) and 0 < repetition <= 100, "repetition_penalty", repetition, "above 0 and at most 100")
        _require(len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", len(self.logit_bias), f"at most {MAX_LOGIT_BIAS} entries")
        for token, bias in self.logit_bias.items():
            _require(_is_int(token) and token >= 0, "logit_bias", token, "keyed by token ids >= 0")
            _require(_is_finite(bias) and -100 <= bias <= 100, "logit_bias", bias, "between -100 and 100")
        _require(self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**64), "seed", self.seed, "a 64-bit whole number")
        _require(len(self.stop) <= MAX_STOP_STRINGS, "stop", len(self.stop), f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            _require(isinstance(text, str) and text != "", "stop", text, "made of non-empty strings")
            _require(len(text) <= MAX_STOP_LENGTH, "stop", len(text), f"made of strings of at most {MAX_STOP_LENGTH} characters")
        most = MAX_STOP_TOKEN_IDS
        _require(len(self.stop_token_ids) <= most, "stop_token_ids", len(self.stop_token_ids), f"at most {most} token ids")
        for token in self.stop_token_ids:
            _require(_is_int(token) and token >= 0, "stop_token_ids", token, "made of token ids >= 0")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            ok = value is None or (_is_int(value) and 0 <= value <= MAX_TOP_LOGPROBS)
            _require(ok, name, value, f"absent or a whole number from 0 to {MAX_TOP_LOGPROBS}")

    @property
    def is_greedy(self) -> bool:
        """True when the most likely token is taken, whatever the filters say."""
        return self.temperature == 0.0 or self.top_k == 1

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have. Raises InvalidParameter."""
        for name, tokens in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in tokens:
                _require(token < vocab_size, name, token, f"made of token ids below the vocabulary size {vocab_size}")
