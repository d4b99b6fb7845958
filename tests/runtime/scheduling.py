"""Short words for the scheduler's tests: make one, add a request, run a step, see who ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo.runtime.batch import Batch
from octavo.runtime.page_allocator import PageAllocator
from octavo.runtime.radix_cache import RadixCache
from octavo.runtime.request import Request
from octavo.runtime.sampling_params import SamplingParams
from octavo.runtime.scheduler import SchedulePolicy, Scheduler, SchedulerLimits

STOP = 99


def make(
    num_pages: int = 100,
    *,
    page_size: int = 4,
    chunk: int = 64,
    mixed: int = 8,
    running: int = 100,
    queued: int | None = None,
    policy: SchedulePolicy = "fcfs",
    **cache: Any,
) -> Scheduler:
    allocator = PageAllocator(num_pages)
    limits = SchedulerLimits(running, queued, chunk, mixed, policy)
    return Scheduler(allocator, RadixCache(page_size, allocator.free, **cache), limits)


def add(scheduler: Scheduler, name: str, prompt: Sequence[int], max_tokens: int = 50, *, priority: int = 0, **params: Any) -> Request:
    wishes = SamplingParams(max_tokens=max_tokens, **params)
    request = Request(name, len(prompt), list(prompt), wishes, max_tokens, frozenset({STOP}), priority=priority)
    scheduler.add(request)
    return request


def step(scheduler: Scheduler, token: int = 7) -> dict[str, tuple[int, int]]:
    """Run one step in which every row samples `token`; gives (start, count) by request id."""
    batch = scheduler.schedule()
    if batch is None:
        return {}
    scheduler.check_integrity()
    scheduler.launch(batch)
    scheduler.commit(batch, [token] * sum(row.samples for row in batch.rows))
    scheduler.check_integrity()
    return spans(batch)


def spans(batch: Batch) -> dict[str, tuple[int, int]]:
    return {row.request.request_id: (row.start, row.count) for row in batch.rows}


def own(number: int, length: int) -> list[int]:
    """A prompt that shares nothing with those of other numbers."""
    return [1000 * number + at for at in range(length)]
