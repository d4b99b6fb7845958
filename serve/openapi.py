"""The OpenAPI page: request bodies are read by hand, so their schemas are added by hand. Knows the routes' bodies, not what they do."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from .control import AbortRequest
from .generate_request import GenerateRequest, GenerateSampling
from .protocol import ChatRequest, CompletionRequest
from .request_body import Body
from .tokens import DetokenizeRequest, TokenizeRequest

_BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/generate": GenerateRequest,
    "/abort_request": AbortRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/tokenize": TokenizeRequest,
    "/v1/detokenize": DetokenizeRequest,
}
_STREAMS = frozenset({"/v1/chat/completions", "/v1/completions", "/generate"})
_TEXTS = frozenset({"/flush_cache", "/metrics"})
_NULL = {"type": "null"}
_REF = "#/components/schemas/{model}"
_ERROR = {
    "description": "Error",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")},
                    }
                },
            }
        }
    },
}


def _as_parsed(model: type[Body], schema: dict[str, Any]) -> None:
    """Say of a body's schema what request_body.py does: null is as good as nothing, of strange fields too."""
    required = schema.get("required", [])
    for name, field in schema["properties"].items():
        if name not in required and _NULL not in field.get("anyOf", []):
            kept = {key: field.pop(key) for key in list(field) if key not in ("title", "default", "description")}
            field["anyOf"] = [kept, _NULL]
    schema["properties"] |= {name: {"description": "Accepted, and without effect."} for name in sorted(model.ignored)}
    schema["properties"] |= {name: {"description": f"Refused: {why}."} for name, why in sorted(model.unsupported.items())}
    schema["additionalProperties"] = _NULL


def openapi_of(app: FastAPI) -> dict[str, Any]:
    """The schema of `app` with every request body and the one shape of errors."""
    page = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    models: tuple[type[Body], ...] = tuple(dict.fromkeys((*_BODIES.values(), GenerateSampling)))
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    for model in models:
        _as_parsed(model, schemas["$defs"][model.__name__])
    page.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    for path, operations in page["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = _ERROR
            content = operation["responses"]["200"].setdefault("content", {})
            if path in _STREAMS:
                content["text/event-stream"] = {"schema": {"type": "string"}}
            elif path in _TEXTS:
                content.pop("application/json", None)
                content["text/plain"] = {"schema": {"type": "string"}}
            names = re.findall(r"{(\w+)}", path)
            if names:
                operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
            if method == "post" and path in _BODIES:
                schema = {"$ref": _REF.format(model=_BODIES[path].__name__)}
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return page
