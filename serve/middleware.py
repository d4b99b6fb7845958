"""What happens to every HTTP exchange before and after its route: an id, a line in the log, the API key. Knows no route but probes."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_response, failed
from .exchange import CONTROL, PROBES, Exchange
from .streaming import error_event

logger = logging.getLogger("octavo.serve")

_LAST_WORD_S = 0.5  # for a client that does not read what it is sent
_SAFE_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


class Exchanges:
    """Gives each exchange an id: the client's X-Request-Id where it is sane, else a new one. The answer carries it back.

    When an exchange is over, one line in the log tells it, and `on_end` is told. One that is cancelled, because the server ends at once,
    ends with an error.
    """

    def __init__(self, app: ASGIApp, on_end: Callable[[Exchange], None]) -> None:
        self._app = app
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        client = scope.get("client")
        exchange = Exchange(request_id, scope["method"], scope["path"], client=client[0] if client else "")
        scope.setdefault("state", {})["exchange"] = exchange
        answer = _Answer(send, exchange)
        try:
            await self._app(scope, receive, answer.send)
        except asyncio.CancelledError:  # by the server, which waits for this and nothing else
            await answer.cut_off(scope, receive)
        except Exception as error:
            exchange.fail(500, type(error).__name__)
            raise
        finally:
            exchange.log(logger)
            self._on_end(exchange)


class _Answer:
    """The sending side of one exchange, and how far it has got."""

    def __init__(self, send: Send, exchange: Exchange) -> None:
        self._send = send
        self._exchange = exchange
        self._progress: Literal["none", "stream", "whole", "complete"] = "none"

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._exchange.request_id
            self._exchange.status_code = message["status"]
            self._progress = "stream" if headers.get("content-type", "").startswith("text/event-stream") else "whole"
        elif not message.get("more_body", False):
            self._progress = "complete"
        await self._send(message)

    async def cut_off(self, scope: Scope, receive: Receive) -> None:
        """Tell the client that there will be no more, if it listens."""
        error = ApiError("the server was stopped before this request had ended", status_code=503, code="server_stopped")
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORD_S):
                if self._progress == "none":
                    await error_response(error, self._exchange)(scope, receive, self.send)
                elif self._progress == "stream":
                    told = error_event(failed(error, self._exchange))
                    await self.send({"type": "http.response.body", "body": told, "more_body": False})


class BearerAuth:
    """Lets in who carries one of `keys` or `admin_keys` as a bearer token, and probes, which carry none.

    What changes the server is for `admin_keys` alone, once there is a key of either kind. Without `keys`, everything else is open. Every
    key is compared in constant time.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], admin_keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._admin_keys = [key.encode() for key in admin_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        if refusal is not None:
            await error_response(refusal, scope["state"]["exchange"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        is_admin, is_known = _carries(headers, self._admin_keys), _carries(headers, self._keys)
        if path in PROBES or is_admin:
            return None
        if path in CONTROL and (self._admin_keys or self._keys):
            if is_known:
                start = "" if self._admin_keys else ", which is set with --admin-api-key"
                told = f"{path} changes the server and is closed to this key: send the admin key{start}"
                return ApiError(told, status_code=403, code="admin_key_required")
        elif is_known or not self._keys:
            return None
        return ApiError(
            "the API key is missing or wrong: send the header 'Authorization: Bearer KEY'", status_code=401, code="invalid_api_key"
        )


def _carries(headers: Headers, keys: Sequence[bytes]) -> bool:
    kind, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip().encode("latin-1", "replace")
    matches = [hmac.compare_digest(given, key) for key in keys]
    return kind.lower() == "bearer" and any(matches)
