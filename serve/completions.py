"""POST /v1/completions: prompts to sequences, outputs to OpenAI's text completion objects. Knows no socket."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, cast

from fastapi import Request
from fastapi.responses import Response

from ..runtime.outputs import TextOutput, TokenLogprob
from .chat import finish_fields
from .context import ServeContext, now
from .errors import ApiError
from .exchange import Exchange
from .jobs import Job, check_count, new_id
from .logprobs import completion_logprobs
from .protocol import CompletionRequest
from .request_body import parse_body
from .sampling import answer_length, check_n, check_token_ids, openai_sampling
from .streaming import DONE, EventStream, event, json_response, to_json, until_disconnect
from .usage import usage_of, usage_of_all

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class CompletionJob:
    """A checked request: what to run, and what its answer shall carry."""

    job: Job
    created: int
    model: str
    echoes: list[str] | None  # the text of each prompt, when the answer shall repeat it
    num_logprobs: int | None  # None: no log-probabilities
    hides_special: bool
    include_usage: bool
    continuous_usage: bool

    def echo(self, index: int) -> str:
        """What stands before the answer of sequence `index`."""
        return self.echoes[index // self.job.n] if self.echoes is not None else ""


async def completions(request: Request) -> Response:
    """Answer one request, streamed or whole. Raises ApiError and its kin for what cannot be answered."""
    context: ServeContext = request.app.state.context
    exchange: Exchange = request.state.exchange
    body = parse_body(CompletionRequest, await request.body())
    if body.stream:
        return EventStream(_events(context, await _prepare(context, body), exchange))
    return await until_disconnect(request.receive, _whole(context, await _prepare(context, body), exchange))


async def _prepare(context: ServeContext, body: CompletionRequest) -> CompletionJob:
    context.model.check(body.model)
    n = check_n(body.n)
    if body.best_of is not None and body.best_of != n:
        message = f"best_of={body.best_of} is not supported: leave it out or set it to n={n}"
        raise ApiError(message, param="best_of", code="unsupported_parameter")
    stream = body.stream_options
    if stream is not None and not body.stream:
        raise ApiError("stream_options is only allowed with stream=true", param="stream_options")
    prompts = [check_token_ids(ids, context.info, param="prompt") for ids in await _encode(context, body)]
    default = min(DEFAULT_MAX_TOKENS, max(1, context.info.context_length - max(len(ids) for ids in prompts)))
    params = [
        openai_sampling(
            body,
            info=context.info,
            max_tokens=answer_length(context.info, prompt_tokens=len(ids), asked=body.max_tokens, default=default, prompt_param="prompt"),
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        for ids in prompts
    ]
    return CompletionJob(
        job=Job(body.rid or new_id("cmpl-"), prompts, params, n, body.cache_salt or "", body.priority or 0),
        created=now(),
        model=context.model.name,
        echoes=_echoes(context, body, prompts) if body.echo else None,
        num_logprobs=body.logprobs,
        hides_special=body.skip_special_tokens is not False,
        include_usage=stream is not None and stream.include_usage,
        continuous_usage=stream is not None and stream.continuous_usage_stats,
    )


def _listed(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """One or many prompts, as many."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    if not prompt:
        raise ApiError("prompt is empty: give text or token ids", param="prompt")
    return cast("list[str] | list[list[int]]", prompt)


async def _encode(context: ServeContext, body: CompletionRequest) -> list[list[int]]:
    prompts = _listed(body.prompt)
    check_count(len(prompts) * check_n(body.n))
    adds_special = body.add_special_tokens is not False
    context.check_characters((prompt for prompt in prompts if isinstance(prompt, str)), param="prompt")

    def encode() -> list[list[int]]:
        encoder = context.tokenizer.encode
        return [encoder(prompt, add_special_tokens=adds_special) if isinstance(prompt, str) else prompt for prompt in prompts]

    return await context.tokenize(body.num_bytes, encode)


def _echoes(context: ServeContext, body: CompletionRequest, prompts: list[list[int]]) -> list[str]:
    skip_special = body.skip_special_tokens is not False
    return [
        given if isinstance(given, str) else context.tokenizer.decode(ids, skip_special_tokens=skip_special)
        for given, ids in zip(_listed(body.prompt), prompts, strict=True)
    ]


def _logprobs(
    context: ServeContext, completion: CompletionJob, logprobs: tuple[TokenLogprob, ...], offset: int
) -> tuple[dict[str, Any] | None, int]:
    if completion.num_logprobs is None:
        return None, offset
    hidden = context.tokenizer.special_token_ids if completion.hides_special else ()
    return completion_logprobs(context.tokenizer, logprobs, num_top=completion.num_logprobs, offset=offset, hidden=hidden)


def _with_echo(completion: CompletionJob, index: int, output: TextOutput) -> TextOutput:
    """`output` with its prompt's text and log-probabilities before its own, where the answer shall repeat them."""
    if completion.echoes is None:
        return output
    return replace(output, text=completion.echo(index) + output.text, logprobs=output.prompt_logprobs + output.logprobs)


async def _whole(context: ServeContext, completion: CompletionJob, exchange: Exchange) -> Response:
    outputs = [_with_echo(completion, index, output) for index, output in enumerate(await context.gather(completion.job, exchange))]
    choices = [
        {
            "index": index,
            "text": output.text,
            "logprobs": _logprobs(context, completion, output.logprobs, 0)[0],
            **finish_fields(output.finish),
        }
        for index, output in enumerate(outputs)
    ]
    return json_response(
        {
            "id": completion.job.id,
            "object": "text_completion",
            "created": completion.created,
            "model": completion.model,
            "choices": choices,
            "usage": usage_of_all(enumerate(outputs), completion.job.n),
        }
    )


async def _events(context: ServeContext, completion: CompletionJob, exchange: Exchange) -> AsyncGenerator[bytes, None]:
    """Text chunks, the last of each choice with its finish_reason; then usage where wanted; then [DONE].

    Chunks are put together from bytes: this runs once a token.
    """
    head = {"id": completion.job.id, "object": "text_completion", "created": completion.created, "model": completion.model}
    start = b"data: " + to_json(head)[:-1] + b',"choices":[{"index":'
    latest: dict[int, TextOutput] = {}
    held: dict[int, tuple[TokenLogprob, ...]] = {}  # log-probabilities of tokens whose text is not decided yet
    offsets: dict[int, int] = {}
    async with aclosing(context.run(completion.job, exchange)) as outputs:
        async for index, raw in outputs:
            output = raw if index in latest else _with_echo(completion, index, raw)
            latest[index] = output
            logprobs = held.pop(index, ()) + output.logprobs
            if not output.text and not output.finish:
                held[index] = logprobs
                continue
            shown, offsets[index] = _logprobs(context, completion, logprobs, offsets.get(index, 0))
            finish = output.finish
            chunk = [
                start,
                str(index).encode(),
                b',"text":',
                to_json(output.text),
                b',"logprobs":',
                to_json(shown),
                b',"finish_reason":',
                to_json(finish and finish.type),
                b',"matched_stop":',
                to_json(finish and finish.matched),
                b"}]",
            ]
            if completion.continuous_usage:
                chunk += [b',"usage":', to_json(usage_of(output.prompt_tokens, output.completion_tokens, output.cached_tokens))]
            yield b"".join([*chunk, b"}\n\n"])
    if completion.include_usage:
        yield event({**head, "choices": [], "usage": usage_of_all(latest.items(), completion.job.n)})
    yield DONE
