"""The FastAPI application: routes, middleware, error handlers put together. Knows no engine but its client, and no process."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from .. import __version__
from ..runtime.client import EngineClient
from . import control, figures, probes, tokens
from .chat import chat_completions
from .completions import completions
from .context import ServeContext
from .errors import Handler, guarded, install_router_errors
from .generate import generate
from .http_limits import BodyLimit
from .middleware import BearerAuth, Exchanges
from .openapi import openapi_of
from .options import ServerOptions

# path, methods, handler, summary
_ROUTES: tuple[tuple[str, list[str], Handler, str], ...] = (
    ("/v1/chat/completions", ["POST"], chat_completions, "Answer a conversation"),
    ("/v1/completions", ["POST"], completions, "Continue a text"),
    ("/v1/models", ["GET"], control.list_models, "The model served"),
    ("/v1/models/{model:path}", ["GET"], control.get_model, "One model by name"),
    ("/generate", ["POST"], generate, "Continue a text (SGLang's API)"),
    ("/tokenize", ["POST"], tokens.tokenize, "Text or a conversation to token ids"),
    ("/detokenize", ["POST"], tokens.detokenize, "Token ids to text"),
    ("/v1/tokenize", ["POST"], tokens.tokenize, "The same, where SGLang has it"),
    ("/v1/detokenize", ["POST"], tokens.detokenize, "The same, where SGLang has it"),
    ("/v1/embeddings", ["POST"], control.embeddings, "Refused: the model generates text"),
    ("/health", ["GET", "HEAD"], probes.health, "Whether the engine answers"),
    ("/ready", ["GET", "HEAD"], probes.ready, "Whether a request would be answered"),
    ("/livez", ["GET", "HEAD"], probes.live, "Whether anything but a restart could help"),
    ("/health_generate", ["GET"], probes.health_generate, "Whether the engine generates a token"),
    ("/stats", ["GET"], figures.stats, "Figures of this moment, one a line"),
    ("/v1/loads", ["GET"], figures.loads, "How busy the engine is"),
    ("/metrics", ["GET"], figures.metrics, "Metrics for Prometheus"),
    ("/model_info", ["GET"], control.model_info, "What model is loaded"),
    ("/get_model_info", ["GET"], control.model_info, "The same, under its older name"),
    ("/flush_cache", ["GET", "POST"], control.flush_cache, "Drop all cached prefixes"),
    ("/server_info", ["GET"], control.server_info, "Resolved options and live figures"),
    ("/get_server_info", ["GET"], control.server_info, "The same, under its older name"),
    ("/abort_request", ["POST"], control.abort_request, "End a request"),
)


def create_app(client: EngineClient, options: ServerOptions) -> FastAPI:
    """The HTTP face of one engine. `app.state.context` is its ServeContext, which the caller closes."""
    app = FastAPI(title="Octavo", version=__version__, description="The quantization-first LLM serving engine")
    app.state.context = context = ServeContext(client, options)
    for path, methods, handler, summary in _ROUTES:
        for method in methods:
            name = f"{method.lower()}_{path.strip('/').replace('/', '_').replace('{model:path}', 'one')}"
            app.add_api_route(path, guarded(handler), methods=[method], summary=summary, operation_id=name)
    app.openapi = lambda: openapi_of(app)  # type: ignore[method-assign]
    install_router_errors(app)
    if options.api_keys or options.admin_api_keys:
        app.add_middleware(BearerAuth, keys=options.api_keys, admin_keys=options.admin_api_keys)
    if options.cors_origins:  # before keys, which a browser's first question does not carry
        app.add_middleware(
            CORSMiddleware, allow_origins=options.cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["X-Request-Id"]
        )
    app.add_middleware(BodyLimit, max_bytes=options.max_body_mib << 20)
    app.add_middleware(Exchanges, on_end=context.count)  # outermost: a refusal carries an id and is logged too
    return app
