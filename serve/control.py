"""The routes around generation: models, cache, aborts, what the server is. Knows no prompt."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import Request
from fastapi.responses import PlainTextResponse, Response

from .. import __version__
from ..runtime.client import ModelInfo
from ..runtime.config import default_memory_fraction
from .context import ServeContext
from .errors import ApiError
from .request_body import Body, parse_body
from .streaming import json_response, until_disconnect

_FLUSH_RETRY_S = 0.05
_MAX_FLUSH_TIMEOUT_S = 600.0


class AbortRequest(Body):
    """POST /abort_request: one job by its id, or all."""

    rid: str | None = None
    abort_all: bool = False


def _context(request: Request) -> ServeContext:
    context: ServeContext = request.app.state.context
    return context


async def list_models(request: Request) -> Response:
    return json_response({"object": "list", "data": [_context(request).model.entry()]})


async def get_model(request: Request) -> Response:
    return json_response(_context(request).model.entry(request.path_params["model"]))


async def flush_cache(request: Request) -> Response:
    """Drop all cached prefixes. With `?timeout=SECONDS` it waits so long for pending requests; 400 when some are left."""
    timeout_s = _timeout(request.query_params.get("timeout", "0"))
    return await until_disconnect(request.receive, _flush(_context(request), timeout_s))


async def _flush(context: ServeContext, timeout_s: float) -> Response:
    deadline = time.monotonic() + timeout_s
    while not await context.client.flush_cache():
        if time.monotonic() >= deadline:
            raise ApiError("requests are pending, so the cache was not flushed: try again later, or wait with ?timeout=SECONDS")
        await asyncio.sleep(_FLUSH_RETRY_S)
    return PlainTextResponse("Cache flushed.\n")


def _timeout(text: str) -> float:
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not 0 <= timeout_s <= _MAX_FLUSH_TIMEOUT_S:
        raise ApiError(f"timeout={text[:40]!r} is not valid: give seconds from 0 to {_MAX_FLUSH_TIMEOUT_S:g}", param="timeout")
    return timeout_s


async def model_info(request: Request) -> Response:
    """What model is loaded, by SGLang's keys and ours."""
    context = _context(request)
    info = context.info
    told = {
        "model_path": info.model_path,
        "tokenizer_path": info.model_path,
        "served_model_name": context.model.name,
        "is_generation": True,
        "weight_version": "default",
        "context_length": info.context_length,
        "max_total_num_tokens": info.max_total_tokens,
        "vocab_size": info.vocab_size,
        "eos_token_ids": info.eos_token_ids,
        "has_chat_template": context.tokenizer.has_chat_template,
        "preferred_sampling_params": dict(info.default_sampling),
    }
    return json_response(told)


async def embeddings(request: Request) -> Response:
    """Refused: every architecture that this server runs generates text."""
    raise ApiError(
        f"the model {_context(request).model.name!r} generates text and has no embeddings: ask a server with an embedding model",
        code="unsupported_model",
    )


async def server_info(request: Request) -> Response:
    """The engine's resolved options and figures, and the server's own. Keys are told by number only.

    `quantization` has the flag's value as `requested`, the method that it came to, and the kernel of every group of linear layers.
    Null stays where an option plays no part: no cap, no limit, no revision.
    """
    context = _context(request)
    engine = await context.client.server_info()
    own = asdict(context.options)
    own["api_keys"] = ["***"] * len(context.options.api_keys)
    own["admin_api_keys"] = ["***"] * len(context.options.admin_api_keys)
    own["served_model_name"] = context.model.name
    if engine.get("internal_states"):
        engine = {**engine, "internal_states": [_as_sglang_names(engine, state) for state in engine["internal_states"]]}
    return json_response({**engine, **_worked_out(engine, context.info), **own, "version": __version__, "active_jobs": len(context.active)})


def _as_sglang_names(engine: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's figures of this moment, with what SGLang's clients look for beside them."""
    return {
        **state,
        "last_gen_throughput": state.get("gen_throughput"),
        "effective_max_running_requests_per_dp": engine.get("max_running_requests"),
        "memory_usage": engine.get("memory_usage"),
    }


def _worked_out(engine: Mapping[str, Any], info: ModelInfo) -> dict[str, Any]:
    """What the start settled, for the options that were left to it."""
    settled: dict[str, Any] = {
        "startup_time": round(sum(engine.get("startup_seconds", {}).values()), 3),
        "model_path": info.model_path,
        "tokenizer_path": info.model_path,
        "context_length": info.context_length,
        "max_total_tokens": info.max_total_tokens,
    }
    if engine.get("max_total_tokens") is None:  # else the tokens alone sized the pool
        settled["mem_fraction_static"] = default_memory_fraction(str(engine.get("device", "cpu")))
    return {name: value for name, value in settled.items() if engine.get(name) is None}


async def abort_request(request: Request) -> Response:
    """End a job by the id of its response (or its `rid`), or all of them. An unknown id is no error: it may just have ended."""
    context = _context(request)
    body = parse_body(AbortRequest, await request.body())
    if body.abort_all:
        return json_response({"aborted": await context.active.abort_all()})
    if not body.rid:
        raise ApiError("give rid, the id of the response to end, or abort_all=true", param="rid")
    return json_response({"aborted": int(await context.active.abort(body.rid))})
