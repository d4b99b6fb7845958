"""The routes that orchestrators ask every few seconds. All but /health_generate answer at once under any load. Knows no prompt."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

from fastapi import Request
from fastapi.responses import Response

from ..runtime.client import EngineDead, RequestRefused
from ..runtime.outputs import TextOutput
from ..runtime.sampling_params import SamplingParams
from .context import ServeContext
from .jobs import new_id
from .streaming import json_response, until_disconnect

_DEEP_TIMEOUT_S = 20.0
_RECENT_S = 1.0
_LOOK_EVERY_S = 0.02
_BUSY = "the queue is full"


def _context(request: Request) -> ServeContext:
    context: ServeContext = request.app.state.context
    return context


async def health(request: Request) -> Response:
    """200 while the engine answers and the server takes requests, else 503 and why. Asks nobody: it reads the last heartbeat."""
    context = _context(request)
    state = context.client.health()
    ok, reason = (False, "the server is shutting down") if context.is_draining else (state.ok, state.reason)
    return _told(ok, reason, state.heartbeat_age_s)


async def ready(request: Request) -> Response:
    """The same, for load balancers. A full queue is not looked at: it says 503 itself, and clears in seconds."""
    return await health(request)


async def live(request: Request) -> Response:
    """200 until only a restart can help: the engine is dead or stuck. A server that drains is alive."""
    state = _context(request).client.health()
    return _told(state.ok, state.reason, state.heartbeat_age_s)


def _told(ok: bool, reason: str, heartbeat_age_s: float) -> Response:
    age = heartbeat_age_s if math.isfinite(heartbeat_age_s) else None
    return json_response({"status": "ok" if ok else "unavailable", "reason": reason, "heartbeat_age_s": age}, 200 if ok else 503)


async def health_generate(request: Request) -> Response:
    """200 when the engine makes tokens, for whomever, else 503 and why: with nothing under way, one is asked for and waited for."""
    return await until_disconnect(request.receive, _deep(_context(request)))


async def _deep(context: ServeContext) -> Response:
    state = context.client.health()
    if context.is_draining or not state.ok:
        return _told(False, "the server is shutting down" if context.is_draining else state.reason, state.heartbeat_age_s)
    began = time.perf_counter()
    if began - context.metrics.last_token_s < _RECENT_S:
        return _told(True, "ok", state.heartbeat_age_s)
    if context.probe is None or context.probe.done():  # however many ask, one token is asked for
        context.probe = asyncio.create_task(_one_token(context))
    fault = f"no token within {_DEEP_TIMEOUT_S:g} s"
    while time.perf_counter() < began + _DEEP_TIMEOUT_S:
        if context.metrics.last_token_s > began:
            fault = ""
        elif context.probe.done() and context.probe.result() != _BUSY:
            fault = context.probe.result()
        else:
            await asyncio.sleep(_LOOK_EVERY_S)
            continue
        break
    return _told(not fault, fault or "ok", context.client.health().heartbeat_age_s)


async def _one_token(context: ServeContext) -> str:
    """Have the engine make one; gives what went wrong."""
    prompt = [context.info.eos_token_ids[0] if context.info.eos_token_ids else 0]
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    try:
        outputs = context.client.generate(prompt, params, request_id=new_id("health-"))
        async with aclosing(cast("AsyncGenerator[TextOutput, None]", outputs)) as stream:
            async for output in stream:
                if output.finish is not None:
                    return output.finish.message if output.finish.type == "abort" else ""
    except RequestRefused as error:
        return _BUSY if error.code == "queue_full" else str(error)
    except EngineDead as error:
        return str(error)
    return "the engine ended without a token"
