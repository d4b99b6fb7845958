"""The routes that tell what the server is doing: /stats for people, /v1/loads for routers, /metrics for Prometheus. Knows no prompt."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from .. import __version__
from ..runtime.client import EngineDead
from .context import ServeContext
from .errors import ApiError
from .metrics import Look
from .streaming import json_response

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PATIENCE_S = 2.0  # for an engine in the middle of a long step


def _context(request: Request) -> ServeContext:
    context: ServeContext = request.app.state.context
    return context


async def metrics(request: Request) -> Response:
    """Prometheus's text format. `?aliases=0` leaves SGLang's own names, `sglang:...`, out."""
    context = _context(request)
    if not context.options.enable_metrics:
        raise ApiError("metrics are off: start the server without --disable-metrics", status_code=404, code="metrics_disabled")
    aliases = request.query_params.get("aliases", "1")
    if aliases not in ("0", "1"):
        raise ApiError(f"aliases={aliases[:40]!r} is not valid: give 0 or 1", param="aliases")
    health = context.client.health()
    look = Look(
        model_name=context.model.name,
        active=len(context.active),
        engine_ok=health.ok,
        heartbeat_age_s=health.heartbeat_age_s,
        engine=await _engine_info(context),
    )
    return Response(context.metrics.render(look, aliases=aliases == "1"), media_type=_METRICS_TYPE)


async def _engine_info(context: ServeContext) -> Mapping[str, Any] | None:
    """The engine's figures; None where it is dead or does not answer soon."""
    try:
        return await asyncio.wait_for(context.client.server_info(), _PATIENCE_S)
    except (TimeoutError, EngineDead):
        return None


async def stats(request: Request) -> Response:
    """The figures of this moment, one a line, for people and grep."""
    context = _context(request)
    state = _state(await context.client.server_info())
    told = {
        "model": context.model.name,
        "uptime_seconds": round(time.monotonic() - context.started_s, 1),
        "requests_served": context.num_served,
        "active_requests": len(context.active),
        "running_requests": state.get("num_running_reqs", 0),
        "queue_size": state.get("num_waiting_reqs", 0),
        "cache_hit_rate": state.get("cache_hit_rate", 0.0),
        "cache_hit_tokens": state.get("cached_tokens", 0),
        "cache_query_tokens": state.get("prompt_tokens", 0),
        "cache_evictable_tokens": state.get("num_evictable_cached_tokens", 0),
        "cache_evicted_tokens": state.get("num_evicted_tokens", 0),
        "cache_max_evictable_tokens": state.get("max_radix_cache_len"),
        "kv_used_tokens": state.get("num_used_tokens", 0),
        "kv_total_tokens": state.get("max_total_num_tokens", 0),
        "kv_usage": state.get("token_usage", 0.0),
        "generated_tokens": state.get("generated_tokens", 0),
        "generated_tokens_per_second": state.get("gen_throughput", 0.0),
        "retractions": state.get("retractions", 0),
        "aborted_requests": state.get("aborted", 0),
    }
    return Response(json.dumps(told, indent=2) + "\n", media_type="application/json")


async def loads(request: Request) -> Response:
    """How busy the engine is, as SGLang's routers ask it. There is one engine, so one entry."""
    context = _context(request)
    info = await context.client.server_info()
    state = _state(info)
    running, limit = state.get("num_running_reqs", 0), info.get("max_running_requests") or 0
    load = {
        "dp_rank": 0,
        "num_running_reqs": running,
        "num_waiting_reqs": state.get("num_waiting_reqs", 0),
        "num_waiting_uncached_tokens": state.get("num_waiting_tokens", 0),
        "num_used_tokens": state.get("num_used_tokens", 0),
        "num_total_tokens": state.get("num_used_tokens", 0) + state.get("num_waiting_tokens", 0),
        "max_total_num_tokens": state.get("max_total_num_tokens", 0),
        "max_running_requests": limit,
        "token_usage": state.get("token_usage", 0.0),
        "gen_throughput": state.get("gen_throughput", 0.0),
        "cache_hit_rate": state.get("cache_hit_rate", 0.0),
        "utilization": round(running / limit, 4) if limit else 0.0,
    }
    return json_response({"timestamp": time.time(), "version": __version__, "dp_rank_count": 1, "loads": [load]})


def _state(info: Mapping[str, Any]) -> Mapping[str, Any]:
    states = info.get("internal_states")
    return {**info, **(states[0] if states else {})}
