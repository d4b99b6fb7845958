"""The routes that orchestrators ask every few seconds. All but /health_generate answer at once under any load. Knows no prompt."""

from __future__ import annotations

import asyncio
import math
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
    """The same, for load balancers: whether a new request would be answered."""
    return await health(request)


async def live(request: Request) -> Response:
    """200 until only a restart can help: the engine is dead or stuck. A server that drains is alive."""
    state = _context(request).client.health()
    return _told(state.ok, state.reason, state.heartbeat_age_s)


def _told(ok: bool, reason: str, heartbeat_age_s: float) -> Response:
    age = heartbeat_age_s if math.isfinite(heartbeat_age_s) else None
    return json_response({"status": "ok" if ok else "unavailable", "reason": reason, "heartbeat_age_s": age}, 200 if ok else 503)


async def health_generate(request: Request) -> Response:
    """200 when the engine has generated a token within 20 seconds, else 503 and why. It waits in line like any request."""
    return await until_disconnect(request.receive, _deep(_context(request)))


async def _deep(context: ServeContext) -> Response:
    state = context.client.health()
    if context.is_draining or not state.ok:
        return _told(False, "the server is shutting down" if context.is_draining else state.reason, state.heartbeat_age_s)
    prompt = [context.info.eos_token_ids[0] if context.info.eos_token_ids else 0]
    try:
        async with asyncio.timeout(_DEEP_TIMEOUT_S):
            params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
            outputs = context.client.generate(prompt, params, request_id=new_id("health-"))
            async with aclosing(cast("AsyncGenerator[TextOutput, None]", outputs)) as stream:
                async for output in stream:
                    if output.finish is not None:
                        ok = output.finish.type != "abort"
                        return _told(ok, "ok" if ok else output.finish.message, context.client.health().heartbeat_age_s)
    except TimeoutError:
        return _told(False, f"no token within {_DEEP_TIMEOUT_S:g} s", context.client.health().heartbeat_age_s)
    except (EngineDead, RequestRefused) as error:
        return _told(False, str(error), context.client.health().heartbeat_age_s)
    return _told(False, "the engine ended without a token", context.client.health().heartbeat_age_s)
