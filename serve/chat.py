"""POST /v1/chat/completions: messages to a prompt, outputs to OpenAI's chat objects. Knows no socket."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from ..runtime.outputs import FinishReason, TextOutput, TokenLogprob
from .context import ServeContext, now
from .errors import ApiError, shown
from .exchange import Exchange
from .jobs import Job, new_id
from .logprobs import chat_logprobs
from .messages import template_messages
from .protocol import ChatRequest
from .request_body import parse_body
from .sampling import answer_length, check_n, check_token_ids, openai_sampling
from .streaming import DONE, EventStream, event, json_response, to_json, until_disconnect
from .usage import usage_of, usage_of_all

MAX_TOP_LOGPROBS = 20  # OpenAI's, of chat; completions and /generate give more
_TAIL = b',"logprobs":null,"finish_reason":null,"matched_stop":null}'
_ROLE_DELTA = b',"delta":{"reasoning_content":null,"role":"assistant","content":""}' + _TAIL
_EMPTY_DELTA = b',"delta":{"reasoning_content":null,"content":null},"logprobs":null,"finish_reason":'


@dataclass(frozen=True)
class ChatJob:
    """A checked request: what to run, and what its answer shall carry."""

    job: Job
    created: int
    model: str
    num_top_logprobs: int | None  # None: no log-probabilities
    include_usage: bool
    continuous_usage: bool


async def chat_completions(request: Request) -> Response:
    """Answer one request, streamed or whole. Raises ApiError and its kin for what cannot be answered."""
    context: ServeContext = request.app.state.context
    exchange: Exchange = request.state.exchange
    body = parse_body(ChatRequest, await request.body())
    if body.stream:
        return EventStream(_events(context, await _prepare(context, body), exchange))
    return await until_disconnect(request.receive, _whole(context, await _prepare(context, body), exchange))


async def _prepare(context: ServeContext, body: ChatRequest) -> ChatJob:
    context.model.check(body.model)
    n = check_n(body.n)
    num_top = _num_top_logprobs(body)
    prompt = check_token_ids(await _prompt(context, body), context.info, param="messages")
    max_tokens = answer_length(context.info, prompt_tokens=len(prompt), asked=_asked_length(body), default=None, prompt_param="messages")
    params = openai_sampling(body, info=context.info, max_tokens=max_tokens, logprobs=num_top)
    stream = body.stream_options
    if stream is not None and not body.stream:
        raise ApiError("stream_options is only allowed with stream=true", param="stream_options")
    return ChatJob(
        job=Job(body.rid or new_id("chatcmpl-"), [prompt], [params], n, body.cache_salt or "", body.priority or 0),
        created=now(),
        model=context.model.name,
        num_top_logprobs=num_top,
        include_usage=stream is not None and stream.include_usage,
        continuous_usage=stream is not None and stream.continuous_usage_stats,
    )


async def _prompt(context: ServeContext, body: ChatRequest) -> list[int]:
    tokenizer = context.tokenizer
    if not tokenizer.has_chat_template:
        raise ApiError("this model has no chat template: start the server with --chat-template FILE, or use /v1/completions")
    if body.tools and body.tool_choice != "none":
        raise ApiError(
            "tools are not supported unless tool_choice is 'none': this server does not parse tool calls yet",
            param="tools",
            code="unsupported_parameter",
        )
    if body.tool_choice not in (None, "none", "auto"):
        raise ApiError(f"tool_choice={shown(body.tool_choice)} is not valid without tools: leave it out", param="tool_choice")
    messages = template_messages(body.messages, most=context.info.context_length)
    context.check_characters((message["content"] for message in messages), param="messages")
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise ApiError("continue_final_message and add_generation_prompt exclude each other: set one", param="continue_final_message")
    if continues and messages[-1]["role"] != "assistant":
        raise ApiError("continue_final_message needs a last message of role assistant to continue", param="continue_final_message")
    adds_prompt = not continues if body.add_generation_prompt is None else body.add_generation_prompt

    def encode() -> list[int]:
        return tokenizer.apply_chat_template(
            messages,
            tools=body.tools or None,
            add_generation_prompt=adds_prompt,
            continue_final_message=continues,
            chat_template_kwargs=body.chat_template_kwargs,
        )

    return await context.tokenize(body.num_bytes, encode)


def _asked_length(body: ChatRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ApiError(f"max_tokens={old} and max_completion_tokens={new} differ: send one of them", param="max_completion_tokens")
    return old if new is None else new


def _num_top_logprobs(body: ChatRequest) -> int | None:
    num_top = body.top_logprobs or 0
    if not 0 <= num_top <= MAX_TOP_LOGPROBS:
        raise ApiError(f"top_logprobs={num_top} is not valid: it must be from 0 to {MAX_TOP_LOGPROBS}", param="top_logprobs")
    if body.logprobs:
        return num_top
    if body.top_logprobs:
        raise ApiError(f"top_logprobs={body.top_logprobs} needs logprobs=true", param="top_logprobs")
    return None


def finish_fields(finish: FinishReason | None) -> dict[str, Any]:
    """`finish_reason` as OpenAI names it, and SGLang's `matched_stop`: the stop token id or string, or null."""
    return {"finish_reason": finish and finish.type, "matched_stop": finish and finish.matched}


async def _whole(context: ServeContext, chat: ChatJob, exchange: Exchange) -> Response:
    outputs = await context.gather(chat.job, exchange)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None, "reasoning_content": None, "tool_calls": None},
            "logprobs": _logprobs(context, chat, output.logprobs),
            **finish_fields(output.finish),
        }
        for index, output in enumerate(outputs)
    ]
    return json_response(
        {
            "id": chat.job.id,
            "object": "chat.completion",
            "created": chat.created,
            "model": chat.model,
            "choices": choices,
            "usage": usage_of_all(enumerate(outputs), chat.job.n),
        }
    )


def _logprobs(context: ServeContext, chat: ChatJob, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
    if chat.num_top_logprobs is None:
        return None
    return chat_logprobs(context.tokenizer, logprobs, num_top=chat.num_top_logprobs)


async def _events(context: ServeContext, chat: ChatJob, exchange: Exchange) -> AsyncGenerator[bytes, None]:
    """Role chunk, text chunks, finish chunk for each choice; then usage where wanted; then [DONE].

    Chunks are put together from bytes: this runs once a token.
    """
    head = {"id": chat.job.id, "object": "chat.completion.chunk", "created": chat.created, "model": chat.model}
    start = b"data: " + to_json(head)[:-1] + b',"choices":[{"index":'
    latest: dict[int, TextOutput] = {}
    held: dict[int, tuple[TokenLogprob, ...]] = {}  # log-probabilities of tokens whose text is not decided yet
    async with aclosing(context.run(chat.job, exchange)) as outputs:
        async for index, output in outputs:
            prefix = start + str(index).encode()
            end = b"]}\n\n"
            if chat.continuous_usage:
                usage = usage_of(output.prompt_tokens, output.completion_tokens, output.cached_tokens)
                end = b'],"usage":' + to_json(usage) + b"}\n\n"
            chunks = [] if index in latest else [prefix, _ROLE_DELTA, end]
            latest[index] = output
            logprobs = held.pop(index, ()) + output.logprobs
            if output.text or (logprobs and output.finish):
                chunks += [prefix, _text_delta(output.text, _logprobs(context, chat, logprobs)), end]
            elif logprobs:
                held[index] = logprobs
            if output.finish:
                chunks += [prefix, _EMPTY_DELTA, _finish(output.finish), end]
            if chunks:
                yield b"".join(chunks)
    if chat.include_usage:
        yield event({**head, "choices": [], "usage": usage_of_all(latest.items(), chat.job.n)})
    yield DONE


def _text_delta(text: str, logprobs: dict[str, Any] | None) -> bytes:
    delta = b',"delta":{"reasoning_content":null,"content":' + to_json(text) + b"}"
    if logprobs is None:
        return delta + _TAIL
    return delta + b',"logprobs":' + to_json(logprobs) + b',"finish_reason":null,"matched_stop":null}'


def _finish(finish: FinishReason) -> bytes:
    return to_json(finish.type) + b',"matched_stop":' + to_json(finish.matched) + b"}"
