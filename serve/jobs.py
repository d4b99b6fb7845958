"""A job: the sequences that one HTTP request asks for, run together as one stream of outputs. Knows no response format."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar, cast

from ..runtime.client import EngineClient, ModelInfo, RequestRefused
from ..runtime.outputs import FinishReason, TextOutput
from ..runtime.sampling_params import SamplingParams
from .errors import ApiError, raise_if_failed, shown
from .exchange import CLIENT_CLOSED_REQUEST, Exchange
from .metrics import Metrics
from .sampling import for_choice

T = TypeVar("T")
MAX_SEQUENCES = 16384
MAX_ID = 256  # characters of a request's own
MAX_PROMPT_LOGPROBS = 1 << 20
_GRACE_S = 0.25  # in which the engine ends a sequence itself


@dataclass(frozen=True)
class Job:
    """`prompts[i]` answered `n` times with `params[i]`. Sequence `i * n + k` is the k-th answer to prompt i."""

    id: str  # the response's id, and the name to abort it by
    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]
    n: int = 1
    cache_namespace: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        check_count(len(self))
        if len(self.id) > MAX_ID:
            raise ApiError(f"rid has {len(self.id)} characters: give at most {MAX_ID}", param="rid")
        if not -(2**31) <= self.priority < 2**31:
            raise ApiError(f"priority={self.priority} is not valid: give a 32-bit whole number", param="priority")
        told = max(len(prompt) * (params.prompt_logprobs or 0) for prompt, params in zip(self.prompts, self.params, strict=True))
        if told > MAX_PROMPT_LOGPROBS:
            raise ApiError(f"{told} log-probabilities of a prompt are asked for: ask for at most {MAX_PROMPT_LOGPROBS}")

    def __len__(self) -> int:
        return len(self.prompts) * self.n

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def engine_ids(self) -> list[str]:
        """One id a sequence, as the engine knows it."""
        return [self.id] if len(self) == 1 else [f"{self.id}-{i}" for i in range(len(self))]


def check_count(sequences: int) -> None:
    """Raises ApiError for a request of too many sequences."""
    if not 1 <= sequences <= MAX_SEQUENCES:
        raise ApiError(f"{sequences} sequences are asked for, prompts times n: ask for 1 to {MAX_SEQUENCES} at once")


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


@dataclass
class _Flight:
    """A job that runs: its sequences' ids in the engine, the exchange that it is a part of, whether it is to end."""

    ids: list[str]
    exchange: Exchange
    is_aborted: bool = False


class ActiveJobs:
    """The jobs in flight, by id: so that they can be aborted from outside, and no id is used twice at a time."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._in_flight: dict[str, _Flight] = {}

    def __len__(self) -> int:
        return len(self._in_flight)

    @contextmanager
    def entered(self, job: Job, exchange: Exchange) -> Iterator[_Flight]:
        """Hold `job`, a part of `exchange`, in flight. Raises ApiError 400 when its id is taken."""
        if job.id in self._in_flight:
            raise ApiError(f"rid={shown(job.id)} is in flight already: choose another or leave it out", param="rid")
        flight = self._in_flight[job.id] = _Flight(job.engine_ids, exchange)
        try:
            yield flight
        finally:
            del self._in_flight[job.id]

    async def abort(self, job_id: str) -> bool:
        """End one job; its sequences finish with type "abort". False when no such job is in flight."""
        if job_id not in self._in_flight:
            return False
        flight = self._in_flight[job_id]
        flight.is_aborted = True  # what waits for its place does not begin
        for engine_id in flight.ids:
            await self._client.abort(engine_id)
        return True

    async def abort_all(self) -> int:
        """End every job; gives their number."""
        jobs = list(self._in_flight)
        for job_id in jobs:
            await self.abort(job_id)
        return len(jobs)

    async def cut_all(self, why: str) -> int:
        """End every job against its client's wish, which its exchange's line in the log tells; gives their number."""
        for flight in self._in_flight.values():
            flight.exchange.cut = why
        return await self.abort_all()


async def run_job(
    client: EngineClient, active: ActiveJobs, job: Job, exchange: Exchange, metrics: Metrics
) -> AsyncGenerator[tuple[int, TextOutput], None]:
    """Yield (sequence, output) as they come, until every sequence has finished. Closing it early aborts what still runs.

    `exchange` is told what has been made, `metrics` when.

    Raises what `EngineClient.generate` raises, and ApiError when the engine gives up on a sequence.
    """
    latest = exchange.begin(job.id, prompt_tokens=job.prompt_tokens, n=job.n)
    moments: dict[int, float] = {}
    exchange.places = exchange.places or asyncio.Semaphore(_most_at_once(client.model_info))
    with active.entered(job, exchange) as flight:
        streams = [_outputs(client, job, index, flight, exchange.places) for index in range(len(job))]
        async with aclosing(merged(streams)) as outputs:
            async for item in outputs:
                latest[item[0]] = item[1]
                metrics.output(exchange, moments, *item)
                yield item


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Run all of `streams` at once; yield (which, item) as they come. Ends with the last of them, or raises with the first that fails.

    However it ends, every stream is closed when it has ended.
    """
    if len(streams) == 1:  # the common case needs no task
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    arrivals: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(index, stream, arrivals)) for index, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            arrival = await arrivals.get()
            if isinstance(arrival, Exception):
                raise arrival
            if arrival is None:
                running -= 1
            else:
                yield arrival
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(index: int, stream: AsyncGenerator[T, None], arrivals: asyncio.Queue[tuple[int, T] | Exception | None]) -> None:
    try:
        async with aclosing(stream):
            async for item in stream:
                arrivals.put_nowait((index, item))
    except Exception as error:
        arrivals.put_nowait(error)
    else:
        arrivals.put_nowait(None)


def _most_at_once(info: ModelInfo) -> int:
    """How many sequences of a request are in the engine together: as many as it computes, but a large batch must not fill the queue that
    others wait in."""
    bound = info.max_queued_requests
    return MAX_SEQUENCES if bound is None else max(1, bound // 2, min(bound, info.max_running_requests))


async def within(
    outputs: AsyncGenerator[tuple[int, TextOutput], None], exchange: Exchange, seconds: float
) -> AsyncGenerator[tuple[int, TextOutput], None]:
    """The same, until `exchange` is `seconds` old: then raises RequestRefused 504. The engine, which knows single sequences, ends those."""
    until = exchange.started + seconds + _GRACE_S
    async with aclosing(outputs):
        while True:
            try:
                item = await asyncio.wait_for(anext(outputs), max(0.0, until - time.perf_counter()))
            except StopAsyncIteration:
                return
            except TimeoutError:
                told = f"the request was not done within {seconds:g} s (--request-timeout)"
                raise RequestRefused(told, status_code=504, code="request_timeout") from None
            yield item


async def _outputs(
    client: EngineClient, job: Job, index: int, flight: _Flight, places: asyncio.Semaphore
) -> AsyncGenerator[TextOutput, None]:
    async with places:
        if flight.is_aborted:
            prompt = job.prompts[index // job.n]
            ended = FinishReason("abort", message="aborted on request", status_code=CLIENT_CLOSED_REQUEST)
            yield TextOutput(flight.ids[index], "", (), len(prompt), 0, 0, finish=ended)
            return
        async with aclosing(_of_sequence(client, job, index, flight.ids[index])) as outputs:
            async for output in outputs:
                yield output


async def _of_sequence(client: EngineClient, job: Job, index: int, engine_id: str) -> AsyncGenerator[TextOutput, None]:
    prompt, choice = divmod(index, job.n)
    stream = client.generate(
        job.prompts[prompt],
        for_choice(job.params[prompt], choice),
        request_id=engine_id,
        cache_namespace=hashlib.sha256(job.cache_namespace.encode()).hexdigest() if job.cache_namespace else "",
        priority=job.priority,
    )
    async with aclosing(cast(AsyncGenerator[TextOutput, None], stream)):
        async for output in stream:
            if output.finish is not None:
                raise_if_failed(output.finish)
            yield output
            if output.finish is not None:
                return
    raise ApiError("the engine ended this request without a reason", status_code=500, code="engine_failure")


async def gathered(running: AsyncGenerator[tuple[int, TextOutput], None], sequences: int) -> list[TextOutput]:
    """What `running` gives, to its end; one output a sequence, with all its text, tokens and log-probabilities."""
    parts: list[list[TextOutput]] = [[] for _ in range(sequences)]
    async with aclosing(running) as outputs:
        async for index, output in outputs:
            parts[index].append(output)
    return [joined(outputs) for outputs in parts]


def joined(parts: Sequence[TextOutput]) -> TextOutput:
    """Successive outputs of one sequence as one."""
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=tuple(chain.from_iterable(part.token_ids for part in parts)),
        logprobs=tuple(chain.from_iterable(part.logprobs for part in parts)),
        prompt_logprobs=tuple(chain.from_iterable(part.prompt_logprobs for part in parts)),
        cached_tokens=max(part.cached_tokens for part in parts),
    )
