"""A scripted engine behind the EngineClient protocol: says what it is told to, and records what it was asked. Knows no model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.runtime.client import EngineDead, Health, ModelInfo
from octavo.runtime.outputs import FinishReason, TextOutput, TokenLogprob
from octavo.runtime.sampling_params import SamplingParams
from octavo.runtime.tokenizer import TemplateError

EOS = 256
VOCAB_SIZE = 260
CONTEXT = 2048


class ToyTokenizer:
    """Bytes are tokens; 256 ends a text; 257 opens a message."""

    vocab_size = VOCAB_SIZE
    eos_token_ids = (EOS,)
    special_token_ids = frozenset({EOS, 257})

    def __init__(self) -> None:
        self.has_chat_template = True

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return bytes([token_id]).decode(errors="replace") if token_id < 256 else f"<{token_id}>"

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else f"<{token_id}>".encode()

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        if (chat_template_kwargs or {}).get("fail"):
            raise TemplateError("roles must alternate")
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        text = text.removesuffix("\n") if continue_final_message else text
        return [257, *text.encode(), *(b"assistant: " if add_generation_prompt else b"")]


@dataclass(frozen=True)
class Call:
    prompt: list[int]
    params: SamplingParams
    request_id: str
    cache_namespace: str
    priority: int

    @property
    def text(self) -> str:
        return bytes(i for i in self.prompt if i < 256).decode(errors="replace")


@dataclass
class FakeEngine:
    """Answers every prompt with `reply`, a byte a token, `delay_s` apart."""

    reply: str = "Hello wörld!"
    delay_s: float = 0.0
    refusal: Exception | None = None  # raised before the first output
    failure: Exception | None = None  # raised after `fail_after` tokens
    end: FinishReason | None = None  # the finish in place of the usual one, after `fail_after` tokens
    fail_after: int = 3
    cached_tokens: int = 0
    default_sampling: dict[str, float | int] = field(default_factory=dict)
    state: Health = field(default_factory=lambda: Health(True, "running", 0.01))
    flushes: bool = True
    max_total_tokens: int = 10_000
    max_queued_requests: int | None = None
    max_running_requests: int = 1
    request_timeout_s: float | None = None
    calls: list[Call] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    live: dict[str, asyncio.Event] = field(default_factory=dict)
    most_live: int = 0
    tokenizer: Any = field(default_factory=ToyTokenizer)
    closed: bool = False
    dies_after_s: float | None = None

    def reset(self) -> None:
        self.__dict__.update(FakeEngine().__dict__)

    @property
    def model_info(self) -> ModelInfo:
        return ModelInfo(
            "/models/org/toy-model",
            "toy-model",
            CONTEXT,
            self.max_total_tokens,
            VOCAB_SIZE,
            (EOS,),
            self.default_sampling,
            self.max_queued_requests,
            self.max_running_requests,
            self.request_timeout_s,
        )

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, request_id: str, cache_namespace: str = "", priority: int = 0
    ) -> AsyncIterator[TextOutput]:
        self.calls.append(Call(list(prompt), params, request_id, cache_namespace, priority))
        if self.refusal is not None:
            raise self.refusal
        stop = self.live[request_id] = asyncio.Event()
        self.most_live = max(self.most_live, len(self.live))
        try:
            async for output in self._speak(list(prompt), params, request_id, stop):
                yield output
                if output.finish is not None and output.finish.type != "abort":
                    self.finished.append(request_id)
        finally:
            del self.live[request_id]
            if request_id not in self.finished:
                self.aborted.append(request_id)

    async def _speak(self, prompt: list[int], params: SamplingParams, request_id: str, stop: asyncio.Event) -> AsyncIterator[TextOutput]:
        tokens = [*self.reply.encode(), EOS][: params.max_tokens]
        pending, said = b"", ""
        prompt_logprobs = self._prompt_logprobs(prompt, params)

        def output(text: str, ids: tuple[int, ...], count: int, finish: FinishReason | None) -> TextOutput:
            logprobs = tuple(self._logprob(token, params.logprobs) for token in ids) if params.logprobs is not None else ()
            first = prompt_logprobs if count <= 1 else ()
            return TextOutput(request_id, text, ids, len(prompt), count, self.cached_tokens, logprobs, first, finish)

        if not tokens:
            yield output("", (), 0, FinishReason("length"))
            return
        for count, token in enumerate(tokens, 1):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if count > self.fail_after and (self.failure or self.end):
                if self.failure:
                    raise self.failure
                yield output("", (), count - 1, self.end)
                return
            if stop.is_set():
                yield output("", (), count - 1, FinishReason("abort", message="aborted", status_code=499))
                return
            if token == EOS:
                yield output("", (token,), count, FinishReason("stop", EOS))
                return
            pending += bytes([token])
            try:
                text, pending = pending.decode(), b""
            except UnicodeDecodeError:
                text = ""
            said += text
            matched = next((word for word in params.stop if said.endswith(word)), None)
            if matched is not None:
                yield output("", (token,), count, FinishReason("stop", matched))
                return
            yield output(text, (token,), count, FinishReason("length") if count == len(tokens) else None)

    @staticmethod
    def _logprob(token: int, num_top: int | None) -> TokenLogprob:
        best = ((token, -0.5), ((token + 1) % 256, -1.5), ((token + 2) % 256, float("-inf")))
        return TokenLogprob(token, -0.5, best[: num_top or 0])

    def _prompt_logprobs(self, prompt: list[int], params: SamplingParams) -> tuple[TokenLogprob, ...]:
        if params.prompt_logprobs is None:
            return ()
        return (TokenLogprob(prompt[0], None), *(self._logprob(token, params.prompt_logprobs) for token in prompt[1:]))

    async def abort(self, request_id: str) -> None:
        if request_id in self.live:
            self.live[request_id].set()

    def health(self) -> Health:
        return self.state

    async def flush_cache(self) -> bool:
        return self.flushes

    async def server_info(self) -> dict[str, Any]:
        return {"model_path": "/models/org/toy-model", "max_total_num_tokens": self.max_total_tokens}

    async def wait_dead(self) -> str:
        if self.dies_after_s is None:
            await asyncio.Event().wait()
        await asyncio.sleep(self.dies_after_s or 0)
        self.state = Health(False, "the engine process was killed by signal 9", 1.0)
        self.failure, self.fail_after = EngineDead("killed by signal 9"), 0
        self.refusal = self.failure
        return "killed by signal 9"

    def close(self) -> None:
        self.closed = True
        print("engine closed", flush=True)


def wait_until(condition: Any, timeout_s: float = 5.0) -> None:
    """Poll until `condition()` holds; AssertionError when it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
