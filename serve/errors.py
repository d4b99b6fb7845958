"""Errors as clients of OpenAI's API expect them: one exception, one body, one table of causes. Knows no route."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from ..runtime.client import EngineDead, RequestRefused
from ..runtime.outputs import FinishReason
from ..runtime.sampling_params import InvalidParameter
from ..runtime.tokenizer import TemplateError
from .exchange import CLIENT_CLOSED_REQUEST, Exchange

logger = logging.getLogger("octavo.serve")

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ENGINE_CODES = {503: "engine_overloaded", 504: "request_timeout"}
_RETRY_AFTER_S = "1"
_MAX_SHOWN = 60
Handler = Callable[[Request], Awaitable[Response]]


class ApiError(Exception):
    """An answer that is an error. `param` names the field at fault, `code` is the machine-readable reason."""

    def __init__(
        self, message: str, *, status_code: int = 400, param: str | None = None, code: str | None = None, allow: str | None = None
    ) -> None:
        super().__init__(message)
        self.allow = allow  # methods, of a 405
        self.message = message
        self.status_code = status_code
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's nested error body."""
        kind = _TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.allow is not None:
            return {"Allow": self.allow}
        if self.status_code == 401:
            return {"WWW-Authenticate": "Bearer", "Connection": "close"}
        if self.status_code in (403, 408, 413):  # the body may not have been read
            return {"Connection": "close"}
        if self.status_code in (429, 503) and self.code != "engine_dead":
            return {"Retry-After": _RETRY_AFTER_S}
        return {}


def shown(value: object) -> str:
    """A value of a request as the client wrote it, in JSON, cut to what an error message can carry."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def as_api_error(error: Exception) -> ApiError:
    """What the client is told of `error`. An unforeseen one is logged with its stack and told without details."""
    match error:
        case ApiError():
            told = error
        case InvalidParameter():
            told = ApiError(str(error), param=error.param)
        case RequestRefused():
            told = ApiError(str(error), status_code=error.status_code, param=error.param, code=error.code)
        case TemplateError():
            told = ApiError(f"the chat template cannot render these messages: {error}", param="messages", code="chat_template_error")
        case EngineDead():
            told = ApiError(f"the engine does not answer: {error}", status_code=503, code="engine_dead")
        case ClientDisconnect():
            told = ApiError("the client left before its answer; its request is aborted", status_code=CLIENT_CLOSED_REQUEST)
        case HTTPException():
            told = ApiError(str(error.detail), status_code=error.status_code)
        case _:
            logger.error("a request failed in an unforeseen way", exc_info=error)
            told = ApiError("internal error; the server's log has the details", status_code=500, code="internal_error")
    return told


def raise_if_failed(finish: FinishReason) -> None:
    """Raise when the engine gave up on a request. One that its client ended is an answer like any other: it keeps its text."""
    if finish.type == "abort" and finish.status_code not in (0, CLIENT_CLOSED_REQUEST):
        code = _ENGINE_CODES.get(finish.status_code, "engine_failure" if finish.status_code >= 500 else None)
        raise ApiError(finish.message or "the engine ended this request", status_code=finish.status_code, code=code)


def failed(error: Exception, exchange: Exchange) -> ApiError:
    """What the client is told of `error`, which is noted as the end of `exchange`."""
    told = as_api_error(error)
    exchange.fail(told.status_code, told.message)
    return told


def error_response(error: Exception, exchange: Exchange) -> Response:
    """The whole HTTP answer for `error`, which is noted as the end of `exchange`."""
    told = failed(error, exchange)
    return Response(msgspec.json.encode(told.body), told.status_code, headers=told.headers, media_type="application/json")


def guarded(handler: Handler) -> Handler:
    """`handler`, whose every failure ends in the nested body."""

    @functools.wraps(handler)
    async def handle(request: Request) -> Response:
        request.state.exchange.route = request.scope["route"].path
        try:
            return await handler(request)
        except Exception as error:
            return error_response(error, request.state.exchange)

    return handle


def install_router_errors(app: FastAPI) -> None:
    """The router's own 404 and 405 in the nested body."""

    async def handle(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(_of_router(request, error), request.state.exchange)

    app.add_exception_handler(HTTPException, handle)


def _of_router(request: Request, error: HTTPException) -> ApiError:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(f"there is no {where}; GET /openapi.json lists what there is", status_code=404, code="unknown_url")
    if error.status_code == 405:
        methods = {method for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE for method in route.methods}
        told = f"{where} is not allowed; GET /openapi.json lists the methods"
        return ApiError(told, status_code=405, code="method_not_allowed", allow=", ".join(sorted(methods)))
    return ApiError(str(error.detail), status_code=error.status_code)
