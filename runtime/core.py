"""EngineCore: one step after another: schedule, launch, collect, hand out. Knows no threads, sockets or text.

On a device that computes while the host goes on, a step is launched before the one ahead of it has landed: it is scheduled on tokens that
only the device knows, and the host's own work hides behind the device's. A step so costs one wait, for the tokens of the one before.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .admission import EngineLimits, admit
from .batch import Batch
from .config import EngineConfig
from .errors import RequestRefused
from .forward_batch import StepArrays
from .model_runner import ModelRunner
from .outputs import FinishReason, TokenLogprob, TokenOutput
from .pacer import ChunkPacer
from .page_allocator import PageAllocator
from .radix_cache import RadixCache
from .request import Request
from .sampler import PendingPromptLogprobs, PendingSample, Sampler, SampleResult, SampleRow, launch_prompt_logprobs
from .sampling_params import SamplingParams
from .scheduler import QueueFull, Scheduler, SchedulerLimits
from .transfer import Fetch, HostCopy, to_device

_MIXED_CHUNK = {"cpu": 32, "cuda": 512}
_FIRST_PACE = 8  # tokens of a long prompt, until it is known what they take
_RATE_WINDOW_S = 10.0
_RATE_LEAST_S = 1.0  # a first token is no rate
_EXPIRE_EVERY_S = 0.1

logger = logging.getLogger("octavo.runtime")

LogitsSink = Callable[[int, torch.Tensor], None]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on CUDA or on the CPU, whose allocator raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@dataclass(frozen=True)
class _Flight:
    """A step that is launched: the requests that get a token, those of them that still wanted one, and what will tell which."""

    batch: Batch
    rows: list[Request]
    sampled: list[Request]
    sample: PendingSample | None
    prompt_logprobs: list[tuple[Request, range, PendingPromptLogprobs]]


@dataclass(frozen=True)
class _Begun:
    """A step that the other ranks compute, and this one when it lands: `steps` are how many tokens its requests had been sampled for."""

    batch: Batch
    arrays: StepArrays
    steps: list[int]


class EngineCore:
    """A scheduler, a model runner and a sampler, and the step that joins them. Used by one thread."""

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        *,
        fetch: Fetch = HostCopy,
        overlap: bool | None = None,
        num_batches: int | None = None,
    ) -> None:
        """`fetch` brings tensors to the host; `overlap` launches steps ahead, None: on CUDA unless the options forbid it.

        With stages, `num_batches` are under way instead, each with requests of its own; None: as many as there are stages.
        """
        assert config.chunked_prefill_size is not None
        self.config = config
        self.runner = runner
        num_batches = runner.num_stages if num_batches is None else num_batches
        self.limits = EngineLimits(runner.context_length, runner.pool.num_tokens, runner.model_config.vocab_size)
        allocator = PageAllocator(runner.pool.num_pages)
        cache = RadixCache(
            config.page_size, allocator.free, max_evictable_tokens=config.max_radix_cache_len, enabled=not config.disable_radix_cache
        )
        limits = SchedulerLimits(
            max_running_requests=config.max_running_requests,
            max_queued_requests=config.max_queued_requests,
            chunk_tokens=config.chunked_prefill_size,
            mixed_chunk_tokens=_MIXED_CHUNK[runner.device.type],
            policy=config.schedule_policy,
            num_batches=num_batches,
        )
        self.scheduler = Scheduler(allocator, cache, limits)
        self.sampler = Sampler(device=runner.device, random_seed=config.random_seed, fetch=fetch, draw=runner.draw)
        self._fetch = fetch
        is_cpu = runner.device.type == "cpu"
        overlap = not is_cpu and not config.disable_overlap_schedule if overlap is None else overlap
        # Steps that are still under way when another one has landed.
        self._ahead = num_batches - 1 if runner.num_stages > 1 else int(overlap)
        self._flights: deque[_Flight | _Begun] = deque()
        # A CPU computes when it is told: a step that waits for another stage would keep the next from being told.
        self._computes_late = is_cpu and runner.num_stages > 1
        # A GPU's steps overlap, and what they take is not known here.
        self._pacer = ChunkPacer(_FIRST_PACE, config.chunked_prefill_size) if is_cpu and not self._ahead else None
        self.num_steps = 0
        self._prompt_logprobs: dict[str, dict[int, TokenLogprob]] = {}
        self._logits_sinks: dict[str, LogitsSink] = {}
        self._recent: deque[tuple[float, int]] = deque()
        self._expired_s = 0.0  # when it was last looked for what has waited too long

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        stop_token_ids: frozenset[int] = frozenset(),
        namespace: str = "",
        priority: int = 0,
        on_logits: LogitsSink | None = None,
    ) -> None:
        """Queue a request. `stop_token_ids` are all that end it, the model's end tokens included. Raises RequestRefused.

        `on_logits` is given the logits that prompt log-probabilities would be read off, in place of these, and those of the last position:
        the first row's position and float32 [n, vocab_size], to be copied before it returns. A retracted request gives rows again.
        """
        max_tokens = admit(prompt, params, self.limits)
        tokens = list(prompt)
        request = Request(
            request_id,
            len(tokens),
            tokens,
            params,
            max_tokens,
            stop_token_ids,
            namespace=namespace,
            priority=priority,
            arrived_s=time.monotonic(),
        )
        try:
            self.scheduler.add(request)
        except QueueFull as error:
            raise RequestRefused(str(error), status_code=503, code="queue_full") from error
        except ValueError as error:
            raise RequestRefused(str(error), param="rid") from error
        known = tuple(token for token in stop_token_ids if token < self.limits.vocab_size)  # tokenizers may end texts with more
        self.sampler.add(request_id, params, tokens, known if params.min_tokens else ())
        if on_logits is not None:
            self._logits_sinks[request_id] = on_logits

    def abort(self, request_id: str, finish: FinishReason) -> TokenOutput | None:
        """End a request now. None when it is not here."""
        request = self.scheduler.abort(request_id, finish)
        if request is None:
            return None
        self._forget(request_id)
        return TokenOutput(request_id, (), finish=finish, cached_tokens=request.cached_tokens or 0, num_retractions=request.num_retractions)

    def abort_all(self, finish: FinishReason) -> list[TokenOutput]:
        outputs = [self.abort(request.request_id, finish) for request in self.scheduler.requests]
        return [output for output in outputs if output is not None]

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._flights)

    @torch.inference_mode()  # the sampler edits the runner's logits in place, which torch allows in this mode alone
    def step(self) -> list[TokenOutput]:
        """Launch one batch and give what has landed: this very batch, or one launched before it. Empty when there is nothing."""
        expired = self._expire()
        return expired + self._step()

    def _step(self) -> list[TokenOutput]:
        batch = self.scheduler.schedule()
        if batch is None:
            return self._land()
        begun = time.perf_counter()
        try:
            flight = self._launch(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self.runner.num_ranks > 1:  # where one rank found no memory, others are in the step
                raise
            return self._land() + self._relieve(batch, error)
        self.scheduler.launch(batch)
        now = time.monotonic()
        for row in batch.rows:
            if row.request.started_s is None:
                row.request.started_s = now
        self._flights.append(flight)
        if len(self._flights) <= self._ahead:
            return []
        outputs = self._land()
        if self._pacer is not None:
            decoding = [row for row in batch.rows if row.samples and row.count == 1]
            prompt_tokens = batch.num_tokens - len(decoding)
            if len(batch.rows) - len(decoding) <= 1:
                self._pacer.note(decoding=len(decoding), prompt_tokens=prompt_tokens, seconds=time.perf_counter() - begun)
                self.scheduler.paced_tokens = self._pacer.size
        return outputs

    def _expire(self) -> list[TokenOutput]:
        """End what has waited or run for longer than it may."""
        queue, total = self.config.queue_timeout_s, self.config.request_timeout_s
        now = time.monotonic()
        if (queue is None and total is None) or now - self._expired_s < _EXPIRE_EVERY_S:
            return []
        self._expired_s = now
        outputs = []
        for request in self.scheduler.requests:
            age = now - request.arrived_s
            if total is not None and age > total:
                finish = FinishReason("abort", message=f"the request was not done within {total:g} s (--request-timeout)", status_code=504)
            elif queue is not None and request.started_s is None and age > queue:
                told = f"the request waited {age:.1f} s for its turn, longer than {queue:g} s (--queue-timeout): try again later"
                finish = FinishReason("abort", message=told, status_code=503)
            else:
                continue
            outputs.append(self.abort(request.request_id, finish))
        return [output for output in outputs if output is not None]

    def _launch(self, batch: Batch) -> _Flight | _Begun:
        """Have the device compute and sample a batch, or only the other ranks. What the host knows stays as it was."""
        steps = [row.request.num_sampled for row in batch.rows if row.samples]
        if self._computes_late:
            return _Begun(batch, self.runner.begin(batch), steps)
        awaited = None
        if self._flights and any(row.request.num_awaited for row in batch.rows):
            before = self._flights[-1]
            assert isinstance(before, _Flight)
            awaited = before.sample.tokens if before.sample is not None else None
        return self._sampled(batch, self.runner.forward(batch, awaited), steps)

    def _sampled(self, batch: Batch, logits: torch.Tensor, steps: Sequence[int]) -> _Flight:
        """Have tokens sampled from a batch's logits, for the requests that have not ended meanwhile."""
        places, scored = self._launch_prompt_logprobs(batch, logits)
        rows = [row.request for row in batch.rows if row.samples]
        wanted = [entry for entry in zip(rows, places, steps, strict=True) if entry[0].finish is None]
        sampled = [request for request, _, _ in wanted]
        if not wanted:
            return _Flight(batch, rows, sampled, None, scored)
        if len(wanted) < logits.shape[0]:
            logits = logits.index_select(0, *to_device([np.array([place for _, place, _ in wanted], dtype=np.int64)], logits.device))
        sample = self.sampler.launch(logits, [SampleRow(request.request_id, step) for request, _, step in wanted])
        return _Flight(batch, rows, sampled, sample, scored)

    def _land(self) -> list[TokenOutput]:
        """Wait for the first step in flight, if there is one, and take it in. What was aborted meanwhile has no part in it."""
        if not self._flights:
            return []
        flight = self._flights.popleft()
        if isinstance(flight, _Begun):
            flight = self._sampled(flight.batch, self.runner.finish(flight.arrays), flight.steps)
        for request, positions, pending in flight.prompt_logprobs:
            if request.finish is None:
                by_position = self._prompt_logprobs.setdefault(request.request_id, {})
                by_position.update((position + 1, logprob) for position, logprob in zip(positions, pending.wait(), strict=True))
        result = flight.sample.wait() if flight.sample is not None else SampleResult([], [])
        self.runner.check()  # a step that another rank has left computed nothing
        landed = [
            (request, token, logprob)
            for request, token, logprob in zip(flight.sampled, result.token_ids, result.logprobs, strict=True)
            if request.finish is None
        ]
        tokens = result.token_ids
        if len(flight.sampled) < len(flight.rows):
            found = dict(zip(map(id, flight.sampled), tokens, strict=True))
            tokens = [found.get(id(request), 0) for request in flight.rows]
        self.scheduler.commit(flight.batch, tokens)
        self.num_steps += 1
        outputs = [self._output(request, token, logprob) for request, token, logprob in landed]
        self._note_rate(len(landed))
        for output in outputs:
            if output.finish is not None:
                self._forget(output.request_id)
        return outputs

    def _relieve(self, batch: Batch, error: Exception) -> list[TokenOutput]:
        """Go on with smaller steps; a request that finds no memory even alone ends."""
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()
        hopeless = self.scheduler.relieve(batch)
        if hopeless is None:
            logger.warning(
                "no memory for a step of %d tokens of %d requests (%s): going on with half of it. Lower --mem-fraction-static, "
                "--max-running-requests or --chunked-prefill-size", batch.num_tokens, len(batch.rows), told,
            )  # fmt: skip
            return []
        logger.error("no memory for a step of one token (%s): request %s ends", told, hopeless.request_id)
        ended = self.abort(hopeless.request_id, FinishReason("abort", message=f"the device is out of memory: {told}", status_code=503))
        return [ended] if ended is not None else []

    def check(self) -> None:
        """Raises EngineDead where a rank that computes for this core has ended."""
        self.runner.check()

    def use_device(self) -> None:
        """Call on the thread that steps, where that is not the one that loaded: CUDA's current device is a thread's own."""
        if self.runner.device.type == "cuda" and self.runner.device.index is not None:
            torch.cuda.set_device(self.runner.device)

    def finish_steps(self) -> None:
        """Compute what the other ranks were told, which would wait for this one. Raises EngineDead where one has ended."""
        while self._flights:
            self.runner.check()
            self._land()

    def close(self) -> None:
        """End the other ranks."""
        self.runner.close()

    def flush_cache(self) -> bool:
        """Drop every cached prefix; False, and nothing dropped, while requests are here."""
        if self.scheduler.has_work:
            return False
        self.finish_steps()  # of requests that have ended
        self.scheduler.cache.flush()
        return True

    def info(self) -> dict[str, Any]:
        """Live figures, JSON-able."""
        scheduler, cache, counters = self.scheduler, self.scheduler.cache, self.scheduler.counters
        page = self.config.page_size
        used = self.runner.pool.num_tokens - (scheduler.allocator.num_free + cache.num_evictable_pages) * page
        return {
            "num_running_reqs": len(scheduler.running),
            "num_waiting_reqs": len(scheduler.waiting),
            "num_waiting_tokens": sum(request.num_pending for request in scheduler.waiting),
            "num_used_tokens": used,
            "max_total_num_tokens": self.runner.pool.num_tokens,
            "token_usage": round(used / self.runner.pool.num_tokens, 4),
            "num_evictable_cached_tokens": cache.num_evictable_pages * page,
            "num_evicted_tokens": cache.num_evicted_pages * page,
            "cache_hit_rate": round(counters.cached_tokens / counters.prompt_tokens, 4) if counters.prompt_tokens else 0.0,
            "gen_throughput": round(self._rate(), 2),
            "num_steps": self.num_steps,
            "device_memory_used_bytes": self._device_memory(),
            **vars(counters),
        }

    def _device_memory(self) -> int | None:
        """Bytes of the GPU that are taken, by whomever; None on the CPU."""
        if self.runner.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.runner.device)
        return total - free

    def _launch_prompt_logprobs(
        self, batch: Batch, logits: torch.Tensor
    ) -> tuple[list[int], list[tuple[Request, range, PendingPromptLogprobs]]]:
        """Read off the log-probabilities of prompts that asked for them; gives the rows of `logits` that are to be sampled, and those."""
        at = 0
        sampled: list[int] = []
        pending: list[tuple[Request, range, PendingPromptLogprobs]] = []
        for row in batch.rows:
            request = row.request
            scored = request.scored_positions(row.start, row.count)
            if (sink := self._logits_sinks.get(request.request_id)) is not None:
                count = len(scored) + row.samples  # the row that samples follows the scored ones
                if count:
                    sink(scored.start if scored else row.start + row.count - 1, logits[at : at + count])
            elif scored:
                targets = [request.tokens[position + 1] for position in scored]
                k = request.params.prompt_logprobs or 0
                found = launch_prompt_logprobs(logits[at : at + len(scored)], targets, k=k, fetch=self._fetch)
                pending.append((request, scored, found))
            at += len(scored)
            if row.samples:
                sampled.append(at)
                at += 1
        return sampled, pending

    def _output(self, request: Request, token: int, logprob: TokenLogprob | None) -> TokenOutput:
        produced = token >= 0 and request.max_tokens > 0
        return TokenOutput(
            request.request_id,
            (token,) if produced else (),
            logprobs=(logprob,) if produced and logprob is not None else (),
            finish=request.finish,
            cached_tokens=request.cached_tokens or 0,
            prompt_logprobs=self._prompt_logprobs_of(request),
            num_retractions=request.num_retractions,
            queue_s=request.queue_s,
        )

    def _prompt_logprobs_of(self, request: Request) -> tuple[TokenLogprob, ...]:
        params = request.params
        if params.prompt_logprobs is None or request.num_generated > 1 or request.request_id in self._logits_sinks:
            return ()
        by_position = self._prompt_logprobs.pop(request.request_id, {})
        start = params.prompt_logprobs_start
        first = (TokenLogprob(request.tokens[0], None),) if start == 0 else ()
        return first + tuple(by_position[position] for position in range(max(start, 1), request.prompt_length))

    def _forget(self, request_id: str) -> None:
        self.sampler.remove(request_id)
        self._prompt_logprobs.pop(request_id, None)
        self._logits_sinks.pop(request_id, None)

    def _note_rate(self, tokens: int) -> None:
        now = time.monotonic()
        self._recent.append((now, tokens))
        while self._recent[0][0] < now - _RATE_WINDOW_S:
            self._recent.popleft()

    def _rate(self) -> float:
        """Tokens generated per second over the last seconds."""
        now = time.monotonic()
        recent = [(at, tokens) for at, tokens in self._recent if at > now - _RATE_WINDOW_S]
        return sum(tokens for _, tokens in recent) / max(now - recent[0][0], _RATE_LEAST_S) if recent else 0.0
