"""OutputProcessor: turns one request's sampled tokens into text, and ends it at a stop string. Knows no engine and no HTTP."""

from __future__ import annotations

from .outputs import FinishReason, TextOutput, TokenOutput
from .sampling_params import InvalidParameter, SamplingParams
from .stop_strings import StopMatcher
from .tokenizer import Tokenizer


class OutputProcessor:
    """One request's way from tokens to text.

    The texts it returns add up to `tokenizer.decode` of the tokens, cut before the stop string that was complete first (after
    it with no_stop_trim). Half a character, and text that could begin a stop string, is held back until it is decided.
    Without a tokenizer the text is empty. Raises InvalidParameter for stop strings without a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt_tokens: int, params: SamplingParams, request_id: str) -> None:
        if tokenizer is None and params.stop:
            raise InvalidParameter("stop", f"stop={list(params.stop)!r} needs a tokenizer, and this engine has none: use stop_token_ids")
        self.request_id = request_id
        self._prompt_tokens = prompt_tokens
        self._params = params
        self._stream = tokenizer.stream(skip_special_tokens=params.skip_special_tokens) if tokenizer is not None else None
        self._matcher = StopMatcher(params.stop)
        self._pending = ""
        self._completion_tokens = 0
        self._finish: FinishReason | None = None

    @property
    def finished(self) -> bool:
        """True once an output carried `finish`. When a stop string did it, the engine does not know yet: abort the request."""
        return self._finish is not None

    def push(self, output: TokenOutput) -> TextOutput:
        """Take in the engine's next output. Raises RuntimeError after the end: the caller looks at `finished` first."""
        if self._finish is not None:
            raise RuntimeError(f"request {self.request_id!r} has finished ({self._finish.type}): drop what the engine still sends for it")
        text, used = self._take_tokens(output)
        if self._finish is None and output.finish is not None:
            text += self._rest()
            self._finish = output.finish
        return TextOutput(
            request_id=self.request_id,
            text=text,
            token_ids=output.token_ids[:used],
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            cached_tokens=output.cached_tokens,
            logprobs=output.logprobs[:used],
            prompt_logprobs=output.prompt_logprobs,
            finish=self._finish,
            num_retractions=output.num_retractions,
            queue_s=output.queue_s,
        )

    def _take_tokens(self, output: TokenOutput) -> tuple[str, int]:
        """New text that is decided, and how many of the tokens were used before a stop string ended the request."""
        pieces: list[str] = []
        last = len(output.token_ids) - 1
        for index, token_id in enumerate(output.token_ids):
            self._completion_tokens += 1
            shown = index < last or not self._is_stop_token(token_id, output.finish)
            if self._stream is not None and shown:
                pieces.append(self._add(self._stream.push(token_id)))
            if self._finish is not None:
                return "".join(pieces), index + 1
        return "".join(pieces), last + 1

    def _is_stop_token(self, token_id: int, finish: FinishReason | None) -> bool:
        """Whether the engine stopped at this token, so that it is a signal and no part of the text."""
        return finish is not None and finish.type == "stop" and finish.matched == token_id and not self._params.no_stop_trim

    def _add(self, piece: str) -> str:
        """Take in text; returns what of it and of the text held back is decided."""
        if not self._params.stop:
            return piece
        match = self._matcher.feed(piece, armed=self._completion_tokens >= self._params.min_tokens)
        if match is None:
            text = self._pending + piece
            cut = len(text) - self._matcher.held
            self._pending = text[cut:]
            return text[:cut]
        text = self._pending + piece[: match.end]
        self._pending = ""
        self._finish = FinishReason("stop", matched=match.text)
        return text if self._params.no_stop_trim else text[: len(text) - len(match.text)]

    def _rest(self) -> str:
        """What was held back, at the end: the beginning of a stop string is text after all, half a character is U+FFFD."""
        rest = self._pending + (self._stream.flush() if self._stream is not None else "")
        self._pending = ""
        return rest
