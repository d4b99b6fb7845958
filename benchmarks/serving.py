"""Load on one OpenAI-compatible URL, and what came back. Knows no server of ours in particular, no files and no terminal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import numpy as np

from .datasets import Content, Prompt
from .metrics import RequestResult, RunResult
from .sse import Event, Exchange, StreamingClient

Endpoint = Literal["completions", "chat"]


class Unreachable(RuntimeError):
    """The URL does not answer, or not as an OpenAI-compatible server does. The text names the URL and what to do."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server and how to ask it. `base_url` ends before the endpoint's path and includes `/v1`.

    `session_header`: sent with requests that share a prefix, and names it.
    """

    base_url: str
    model: str
    endpoint: Endpoint = "completions"
    api_key: str | None = None
    timeout_s: float = 600.0
    ignore_eos: bool = False
    session_header: str | None = None

    def headers(self, prompt: Prompt) -> dict[str, str]:
        """What a gateway keeps requests with one prefix together by."""
        return {} if self.session_header is None or prompt.prefix is None else {self.session_header: f"prefix-{prompt.prefix}"}

    def client(self) -> StreamingClient:
        path = "completions" if self.endpoint == "completions" else "chat/completions"
        return StreamingClient(f"{self.base_url}/{path}", headers=_authorization(self.api_key), timeout_s=self.timeout_s)

    def payload(self, content: Content, output_len: int) -> dict[str, Any]:
        """The body of one greedy, streamed request."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": output_len, "temperature": 0.0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": content}]
        else:
            body["prompt"] = content
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body


def with_v1(url: str) -> str:
    """`http://host:port` and `http://host:port/v1/` both become `http://host:port/v1`."""
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


@dataclass(frozen=True)
class ListedModel:
    """An entry of /v1/models. `root` is where the model came from (vLLM, SGLang and Octavo give it; OpenAI does not)."""

    id: str
    root: str | None


def first_model(base_url: str, *, api_key: str | None = None, timeout_s: float = 10.0) -> ListedModel | None:
    """The first model of /v1/models; None when the server answers but has no such list. Raises Unreachable."""
    url = f"{base_url}/models"
    try:
        response = httpx.get(url, headers=_authorization(api_key), timeout=timeout_s)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreachable(
            f"cannot reach {url}: {error or type(error).__name__}. Is the server running? `octavo serve` starts one."
        ) from error
    if response.status_code in (401, 403):
        raise Unreachable(f"{url} answered {response.status_code}: the server wants another --api-key")
    if response.status_code != 200:
        return None
    try:
        models = response.json()["data"]
        return ListedModel(str(models[0]["id"]), models[0].get("root")) if models else None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Unreachable(f"{url} answered something else than an OpenAI list of models: {response.text[:200]!r}") from error


async def run_load(
    target: Target,
    prompts: Sequence[Prompt],
    *,
    output_len: int,
    concurrency: int | None = None,
    request_rate: float | None = None,
    seed: int = 0,
    on_done: Callable[[], object] = lambda: None,
) -> RunResult:
    """Send every prompt once and wait for all answers.

    With `concurrency`, at most so many requests are in flight. With `request_rate`, requests arrive as a Poisson process of that many a
    second, whatever the server does, and wait their turn where `concurrency` also caps them (that wait is not in their latency).
    """
    client = target.client()
    permits = asyncio.Semaphore(concurrency if concurrency is not None else max(1, len(prompts)))

    async def one(prompt: Prompt) -> Exchange:
        try:
            return await client.post(target.payload(prompt.content, output_len), target.headers(prompt))
        finally:
            permits.release()
            on_done()

    running: list[Awaitable[Exchange]] = []
    async with asyncio.TaskGroup() as group:
        async for prompt in _arrivals(prompts, request_rate, seed):
            await permits.acquire()
            running.append(group.create_task(one(prompt)))
    exchanges = [await task for task in running]
    origin_s = min((exchange.start_s for exchange in exchanges), default=0.0)
    results = (read_answer(exchange, prompt, origin_s) for exchange, prompt in zip(exchanges, prompts, strict=True))
    return RunResult(concurrency=concurrency, request_rate=request_rate, requests=tuple(results))


async def _arrivals(prompts: Sequence[Prompt], request_rate: float | None, seed: int) -> AsyncIterator[Prompt]:
    if request_rate is None:
        for prompt in prompts:
            yield prompt
        return
    loop = asyncio.get_running_loop()
    due = loop.time() + np.cumsum(np.random.default_rng(seed).exponential(1 / request_rate, len(prompts)))
    for prompt, due_s in zip(prompts, due, strict=True):
        await asyncio.sleep(max(0.0, due_s - loop.time()))
        yield prompt


def read_answer(exchange: Exchange, prompt: Prompt, origin_s: float) -> RequestResult:
    """Turn what came over the wire into one request's figures. What is no complete stream becomes an error with the server's text."""
    start_s, end_s = exchange.start_s - origin_s, exchange.end_s - origin_s
    try:
        if exchange.error is not None:
            raise _Failed(exchange.error)
        if exchange.status != 200:
            raise _Failed(f"HTTP {exchange.status}: {_error_text(exchange.body)}")
        answer = _Answer.of(exchange.events())
    except _Failed as failure:
        return RequestResult(start_s=start_s, end_s=end_s, error=str(failure))
    usage = answer.usage
    counted = usage.get("completion_tokens")
    return RequestResult(
        start_s=start_s,
        end_s=answer.end_s - origin_s,
        token_times_s=tuple(time_s - origin_s for time_s in answer.token_times_s),
        prompt_tokens=usage.get("prompt_tokens") or prompt.num_tokens,
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        output_tokens=counted if counted is not None else len(answer.token_times_s),
        counted_by="usage" if counted is not None else "stream",
    )


class _Failed(Exception):
    """Why a request has no figures."""


@dataclass(frozen=True)
class _Answer:
    token_times_s: list[float]
    end_s: float
    usage: dict[str, Any]

    @staticmethod
    def of(events: Sequence[Event]) -> _Answer:
        token_times_s: list[float] = []
        end_s: float | None = None
        finished = False
        usage: dict[str, Any] = {}
        for event in events:
            if event.data == b"[DONE]":
                finished = finished or end_s is not None
                break
            try:
                chunk = json.loads(event.data)
            except ValueError:
                raise _Failed(f"the stream holds something else than JSON: {event.data[:200]!r}") from None
            if not isinstance(chunk, dict) or "error" in chunk:
                raise _Failed(_error_text(event.data))
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices") or ():
                end_s = event.time_s
                finished = finished or choice.get("finish_reason") is not None
                if _carries_token(choice):
                    token_times_s.append(event.time_s)
        if end_s is None or not finished:
            raise _Failed(f"the stream ended before the answer did, after {len(token_times_s)} tokens")
        return _Answer(token_times_s, end_s, usage)


def _carries_token(choice: dict[str, Any]) -> bool:
    """True for an event with text, and for one without that is neither a chat's opening nor an end: half a character, say, held back."""
    delta = choice.get("delta")
    text = choice.get("text") if delta is None else delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
    opens = delta is not None and "role" in delta
    return bool(text) or not (opens or choice.get("finish_reason") is not None)


def _error_text(body: bytes) -> str:
    """The message in an OpenAI error body, nested or flat; otherwise the body's beginning."""
    try:
        parsed = json.loads(body)
        inner = parsed.get("error", parsed)
        message = inner["message"] if isinstance(inner, dict) else inner
        return str(message)[:500]
    except (ValueError, KeyError, AttributeError):
        return body[:500].decode(errors="replace") or "(empty answer)"


def _authorization(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
