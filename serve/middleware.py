"""What happens to every HTTP exchange before and after its route: an id, and the API key. Knows no route but the open ones."""

from __future__ import annotations

import hmac
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_response

_OPEN_PATHS = frozenset({"/health"})  # probes carry no key
_SAFE_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


class RequestId:
    """Gives each exchange an id: the client's X-Request-Id where it is sane, else a new one. The answer carries it back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class BearerAuth:
    """Lets in who carries one of `keys` as a bearer token. Compares every key in constant time."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS and not self._admits(Headers(scope=scope)):
            error = ApiError(
                "the API key is missing or wrong: send the header 'Authorization: Bearer KEY'", status_code=401, code="invalid_api_key"
            )
            await error_response(error, scope["state"]["request_id"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admits(self, headers: Headers) -> bool:
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip().encode("latin-1", "replace")
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return kind.lower() == "bearer" and any(matches)
