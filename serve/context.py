"""ServeContext: what every route needs to answer, made once when the app is made. Knows no route."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TypeVar

from ..runtime.client import EngineClient, ModelInfo
from ..runtime.outputs import TextOutput
from ..runtime.sampling_params import SamplingParams
from ..runtime.tokenizer import Tokenizer
from .errors import ApiError
from .exchange import Exchange
from .jobs import ActiveJobs, Job, gathered, run_job, within
from .metrics import Metrics
from .options import ServerOptions
from .served_model import ServedModel

logger = logging.getLogger("octavo.serve")

T = TypeVar("T")
_SHOWN_TOKENS = 200  # of a prompt, by --log-requests
_CHARACTERS_A_TOKEN = 512  # more than any vocabulary's longest token has
_INLINE_BYTES = 4096  # about a millisecond of tokenizing; above, other streams would feel the pause


class ServeContext:
    """The engine's client, the options, the names of the model and the jobs in flight."""

    def __init__(self, client: EngineClient, options: ServerOptions) -> None:
        self.client = client
        self.options = options
        self.model = ServedModel(client.model_info, options)
        self.active = ActiveJobs(client)
        self.is_draining = False  # set when the server stops: health turns red while streams end
        self.num_served = 0  # requests that the model answered
        self.started_s = time.monotonic()
        self.metrics = Metrics()
        self.probe: asyncio.Task[str] | None = None  # of /health_generate
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="octavo-tokenize")

    @property
    def tokenizer(self) -> Tokenizer:
        return self.client.tokenizer

    @property
    def info(self) -> ModelInfo:
        return self.client.model_info

    def check_characters(self, texts: Iterable[str], *, param: str) -> None:
        """Raises ApiError for a text that no tokenizer could fit into the context, before it is tokenized at length."""
        most = self.info.context_length * _CHARACTERS_A_TOKEN
        for text in texts:
            if len(text) > most:
                told = f"the prompt has {len(text)} characters, more than a context length of {self.info.context_length} tokens can hold"
                raise ApiError(f"{told}: shorten it", param=param, code="context_length_exceeded")

    async def tokenize(self, num_bytes: int, encode: Callable[[], T]) -> T:
        """Run `encode`, a tokenizer's or template's call for a request of so many bytes: here when it is small, else on a thread."""
        if num_bytes <= _INLINE_BYTES:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, encode)

    def run(self, job: Job, exchange: Exchange) -> AsyncGenerator[tuple[int, TextOutput], None]:
        if self.is_draining:
            raise ApiError("the server is shutting down: ask another, or again later", status_code=503, code="shutting_down")
        self._log_request(job, exchange)
        outputs = run_job(self.client, self.active, job, exchange, self.metrics)
        seconds = self.info.request_timeout_s
        return outputs if seconds is None else within(outputs, exchange, seconds)

    async def gather(self, job: Job, exchange: Exchange) -> list[TextOutput]:
        return await gathered(self.run(job, exchange), len(job))

    def _log_request(self, job: Job, exchange: Exchange) -> None:
        if not self.options.log_requests:
            return
        default = SamplingParams()
        for prompt, params in zip(job.prompts, job.params, strict=True):
            asked = {name: value for name, value in asdict(params).items() if value != getattr(default, name)}
            text = self.tokenizer.decode(prompt[:_SHOWN_TOKENS], skip_special_tokens=False)
            logger.info("request=%s id=%s n=%d asks %s prompt=%r", exchange.request_id, job.id, job.n, asked, text)

    def count(self, exchange: Exchange) -> None:
        """Note an exchange that is over."""
        self.num_served += exchange.was_served
        self.metrics.ended(exchange)

    def close(self) -> None:
        self._tokenizing.shutdown(wait=False, cancel_futures=True)


def now() -> int:
    """Seconds since 1970, as `created` fields want it."""
    return int(time.time())
