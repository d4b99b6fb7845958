"""Generation: one sequence as the Python API sees it, and SGLang's spelling of sampling parameters. Knows no threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .detokenizer import OutputProcessor
from .errors import EngineDead, RequestRefused
from .outputs import FinishReason, TokenLogprob, TokenOutput
from .sampling_params import InvalidParameter, SamplingParams

SamplingDict = Mapping[str, Any]

_SYNONYMS = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}


def parse_sampling(wish: SamplingParams | SamplingDict | None) -> tuple[SamplingParams, int]:
    """Sampling parameters and `n` from what a caller gave: SamplingParams, or a dict with SGLang's or our names. Raises RequestRefused."""
    if wish is None:
        return SamplingParams(), 1
    if isinstance(wish, SamplingParams):
        return wish, 1
    known = {field.name for field in fields(SamplingParams)}
    values: dict[str, Any] = {}
    for key, value in wish.items():
        name = _SYNONYMS.get(key, key)
        if name not in known | {"n"}:
            names = sorted(known | {"n"} | set(_SYNONYMS))
            raise RequestRefused(f"sampling_params has no {key!r}; it has {', '.join(names)}", param=key)
        if value is not None:
            values[name] = value
    n = values.pop("n", 1)
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise RequestRefused(f"n={n!r} is not valid: give a whole number of at least 1", param="n")
    stop = values.get("stop", ())
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    values["stop_token_ids"] = tuple(values.get("stop_token_ids", ()))
    try:
        return SamplingParams(**values), n
    except InvalidParameter as error:
        raise RequestRefused(str(error), param=error.param) from error


class Generation:
    """Collects what the engine makes of one sequence."""

    def __init__(self, request_id: str, prompt: list[int], params: SamplingParams, processor: OutputProcessor) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.engine_is_done = False
        self.prompt_logprobs: list[TokenLogprob] = []
        self._processor = processor
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish: FinishReason | None = None
        self._cached_tokens = 0
        self._num_retractions = 0

    def take(self, event: TokenOutput | Exception) -> int:
        """Take in one event; 1 when it ended the sequence, 0 otherwise (also for what comes after the end). Raises what failed it."""
        if isinstance(event, Exception):
            self.engine_is_done = True
            raise event
        self.engine_is_done = self.engine_is_done or event.finish is not None
        if self._finish is not None:
            return 0
        output = self._processor.push(event)
        self._texts.append(output.text)
        self._tokens.extend(output.token_ids)
        self._logprobs.extend(output.logprobs)
        self.prompt_logprobs.extend(output.prompt_logprobs)
        self._cached_tokens, self._num_retractions = output.cached_tokens, output.num_retractions
        self._finish = output.finish
        if output.finish is not None and output.finish.type == "abort" and output.finish.status_code >= 500:
            raise EngineDead(output.finish.message)
        return int(output.finish is not None)

    def result(self) -> dict[str, Any]:
        """What there is so far, in the shape of SGLang's answers."""
        meta: dict[str, Any] = {
            "id": self.request_id,
            "finish_reason": None if self._finish is None else self._finish_dict(self._finish),
            "prompt_tokens": len(self.prompt),
            "completion_tokens": len(self._tokens),
            "cached_tokens": self._cached_tokens,
            "num_retractions": self._num_retractions,
        }
        if self.params.logprobs is not None:
            meta["output_token_logprobs"] = [(entry.logprob, entry.token_id, None) for entry in self._logprobs]
            meta["output_top_logprobs"] = [[(value, token, None) for token, value in entry.top] for entry in self._logprobs]
        if self.params.prompt_logprobs is not None:
            meta["input_token_logprobs"] = [(entry.logprob, entry.token_id, None) for entry in self.prompt_logprobs]
            meta["input_top_logprobs"] = [[(value, token, None) for token, value in entry.top] for entry in self.prompt_logprobs]
        return {"text": "".join(self._texts), "output_ids": list(self._tokens), "meta_info": meta}

    def _finish_dict(self, finish: FinishReason) -> dict[str, Any]:
        if finish.type == "stop":
            return {"type": "stop", "matched": finish.matched}
        if finish.type == "length":
            return {"type": "length", "length": len(self._tokens)}
        return {"type": "abort", "message": finish.message, "status_code": finish.status_code}
