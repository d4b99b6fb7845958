"""EngineClient: the only door from `serve/` to an engine. The protocol alone; who answers it lives in other files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .errors import EngineDead, RequestRefused
from .outputs import TextOutput
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer

__all__ = ["EngineClient", "EngineDead", "Health", "ModelInfo", "RequestRefused"]


@dataclass(frozen=True)
class ModelInfo:
    """What a server needs to know of the loaded model."""

    model_path: str
    served_name: str
    context_length: int  # tokens, prompt and answer together
    max_total_tokens: int  # tokens the KV pool holds
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    default_sampling: Mapping[str, float | int]  # from generation_config.json: temperature, top_p, top_k, ...
    max_queued_requests: int | None = None  # sequences that may wait in the engine; None: any number
    max_running_requests: int = 1  # sequences computed together
    request_timeout_s: float | None = None  # from a request's arrival, however many sequences it is


@dataclass(frozen=True)
class Health:
    """`ok` is False when the engine is starting, dead or silent; `reason` says which; `heartbeat_age_s` since its last sign of life."""

    ok: bool
    reason: str
    heartbeat_age_s: float


class EngineClient(Protocol):
    """Async door to one engine. Safe to use from one event loop."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def model_info(self) -> ModelInfo: ...

    def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, request_id: str, cache_namespace: str = "", priority: int = 0
    ) -> AsyncIterator[TextOutput]:
        """Run one sequence; yields until an output carries `finish`.

        Raises RequestRefused (empty prompt, token id out of range, prompt longer than the context or than the KV pool)
        before the first output, EngineDead when the engine ends. Leaving the iterator early (break, cancellation) aborts the request.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator gets a finish of type "abort". Unknown ids are ignored."""
        ...

    def health(self) -> Health:
        """Cheap: reads the last heartbeat, asks nobody."""
        ...

    async def flush_cache(self) -> bool:
        """Drop all cached prefixes. False when requests are pending and nothing was dropped."""
        ...

    async def server_info(self) -> dict[str, Any]:
        """Resolved options and live figures of the engine, JSON-able."""
        ...
