"""Chat messages as clients send them, turned into what chat templates read. Knows no template and no token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from .errors import ApiError, shown

# Templates know "system"; OpenAI defines "developer" as its newer name.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_PASSED_ON = frozenset({"name", "tool_call_id", "reasoning_content", "reasoning"})
_IGNORED = frozenset({"annotations", "id", "refusal"})  # echoed back from earlier answers; no template reads them
_EMPTY: tuple[object, ...] = (None, [], {}, "", False)


def template_messages(messages: Sequence[Mapping[str, Any]], *, most: int) -> list[dict[str, Any]]:
    """Check `messages`, of which there may be `most`, and normalise them: text parts joined by newlines, tool call arguments parsed.

    Raises ApiError 400.
    """
    if not messages:
        raise ApiError("messages is empty: send at least one message", param="messages")
    if len(messages) > most:
        told = f"there are {len(messages)} messages, more than a context length of {most} tokens can hold: leave out the oldest"
        raise ApiError(told, param="messages", code="context_length_exceeded")
    return [_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ApiError(f"{where}.role={shown(role)} is not valid: it must be one of {', '.join(_ROLES)}", param=f"{where}.role")
    result: dict[str, Any] = {"role": _ROLES[role], "content": _content(message.get("content"), role, message, where)}
    for name, value in message.items():
        if name in ("role", "content") or name in _IGNORED or value in _EMPTY:
            continue
        if name == "tool_calls" and role == "assistant":
            result[name] = _tool_calls(value, f"{where}.tool_calls")
        elif name in _PASSED_ON and isinstance(value, str):
            result[name] = value
        else:
            raise ApiError(f"{where}.{name[:60]} is not supported: remove it", param=f"{where}.{name[:60]}", code="unsupported_parameter")
    return result


def _content(content: object, role: str, message: Mapping[str, Any], where: str) -> str:
    param = f"{where}.content"
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(_part(part, f"{param}.{i}") for i, part in enumerate(content))
    if content is None and role == "assistant" and message.get("tool_calls"):
        return ""
    raise ApiError(f"{param}={shown(content)} is not valid: it must be a string or a list of text parts", param=param)


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ApiError(f'{where} must be an object such as {{"type": "text", "text": "..."}}', param=where)
    kind = part["type"]
    if kind not in ("text", "input_text", "output_text"):
        message = f"{where}.type={shown(kind)} is not supported: this model reads text parts only"
        raise ApiError(message, param=f"{where}.type", code="unsupported_parameter")
    if not isinstance(part.get("text"), str):
        raise ApiError(f"{where}.text must be a string", param=f"{where}.text")
    return str(part["text"])


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Templates print arguments as JSON themselves, so they want the object, where OpenAI's API has its text."""
    if not isinstance(calls, list):
        raise ApiError(f"{where} must be a list", param=where)
    result = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(f"{where}.{i}.function must be an object with a name", param=f"{where}.{i}.function")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = from_json(arguments)
            except ValueError as error:
                raise ApiError(f"{where}.{i}.function.arguments is not valid JSON: {error}", param=where) from None
        result.append({**call, "function": {**function, "arguments": arguments}})
    return result
