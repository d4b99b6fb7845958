"""POST /generate: SGLang's native endpoint, whole or as a stream of cumulative text. Knows no prompt format."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from ..runtime.outputs import FinishReason, TextOutput, TokenLogprob
from .context import ServeContext
from .exchange import Exchange
from .generate_request import GenerateJob, GenerateRequest, generate_jobs
from .jobs import joined, merged
from .logprobs import generate_logprobs, generate_top_logprobs
from .request_body import parse_body
from .streaming import DONE, EventStream, event, json_response, until_disconnect


async def generate(request: Request) -> Response:
    """Answer one request, streamed or whole. Raises ApiError and its kin for what cannot be answered."""
    context: ServeContext = request.app.state.context
    exchange: Exchange = request.state.exchange
    body = parse_body(GenerateRequest, await request.body())
    jobs, is_batch = await generate_jobs(context, body)
    is_list = is_batch or jobs[0].job.n > 1
    if body.stream:
        return EventStream(_events(context, jobs, is_list, exchange))
    return await until_disconnect(request.receive, _whole(context, jobs, is_list, exchange))


async def _whole(context: ServeContext, jobs: list[GenerateJob], is_list: bool, exchange: Exchange) -> Response:
    parts: dict[tuple[int, int], list[TextOutput]] = {}
    async with aclosing(merged([context.run(job.job, exchange) for job in jobs])) as outputs:
        async for number, (sequence, output) in outputs:
            parts.setdefault((number, sequence), []).append(output)
    results = [_result(context, jobs[key[0]], joined(parts[key]), exchange.started) for key in sorted(parts)]
    return json_response(results if is_list else results[0])


def _result(context: ServeContext, job: GenerateJob, output: TextOutput, started: float) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "id": job.job.id,
        "finish_reason": _finish(output.finish, output.completion_tokens),
        "prompt_tokens": output.prompt_tokens,
        "completion_tokens": output.completion_tokens,
        "cached_tokens": output.cached_tokens,
        "reasoning_tokens": 0,
        "weight_version": "default",
        "num_retractions": output.num_retractions,
    }
    if output.finish is not None:
        meta["e2e_latency"] = time.perf_counter() - started
    if job.with_logprobs:
        meta |= _logprob_fields(context, job, "input", output.prompt_logprobs[job.logprob_start :])
        meta |= _logprob_fields(context, job, "output", output.logprobs)
    return {"text": output.text, "output_ids": output.token_ids, "meta_info": meta}


def _logprob_fields(context: ServeContext, job: GenerateJob, side: str, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    fields: dict[str, Any] = {f"{side}_token_logprobs": generate_logprobs(context.tokenizer, logprobs, with_text=job.with_text)}
    if job.num_top > 0:
        tops = generate_top_logprobs(context.tokenizer, logprobs, num_top=job.num_top, with_text=job.with_text)
        fields[f"{side}_top_logprobs"] = tops
    return fields


def _finish(finish: FinishReason | None, completion_tokens: int) -> dict[str, Any] | None:
    match finish:
        case None:
            return None
        case FinishReason(type="stop"):
            return {"type": "stop", "matched": finish.matched}
        case FinishReason(type="length"):
            return {"type": "length", "length": completion_tokens}
    return {"type": "abort", "message": finish.message, "status_code": finish.status_code or None, "err_type": None}


async def _events(context: ServeContext, jobs: list[GenerateJob], is_list: bool, exchange: Exchange) -> AsyncGenerator[bytes, None]:
    """Each event repeats all that its sequence has given so far, as SGLang's clients expect; batches carry `index`."""
    so_far: dict[int, TextOutput] = {}
    offsets = [0]
    for job in jobs:
        offsets.append(offsets[-1] + len(job.job))
    async with aclosing(merged([context.run(job.job, exchange) for job in jobs])) as outputs:
        async for number, (sequence, output) in outputs:
            index = offsets[number] + sequence
            known = so_far[index] = joined([so_far[index], output]) if index in so_far else output
            if not (output.token_ids or output.finish):
                continue
            result = _result(context, jobs[number], known, exchange.started)
            yield event({**result, "index": index} if is_list else result)
    yield DONE
