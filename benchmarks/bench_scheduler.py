"""What the scheduler and the radix cache cost in Python: a decoding step, a match, a queue of long prompts. A plain script; checks nothing.

python benchmarks/bench_scheduler.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from octavo.runtime.page_allocator import PageAllocator
from octavo.runtime.radix_cache import RadixCache
from octavo.runtime.request import Request
from octavo.runtime.sampling_params import SamplingParams
from octavo.runtime.scheduler import SchedulePolicy, Scheduler, SchedulerLimits

REPEATS = 200


def best_us(function: Callable[[], object], repeats: int = REPEATS) -> tuple[float, float]:
    """Fastest and median call, in microseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e6)
    times.sort()
    return times[0], times[len(times) // 2]


def show(name: str, times: tuple[float, float]) -> None:
    print(f"{name:<72}{times[0]:9.0f} us best{times[1]:9.0f} us median")


def make(*, running: int = 256, policy: SchedulePolicy = "fcfs", chunk: int = 256) -> Scheduler:
    allocator = PageAllocator(100_000)
    return Scheduler(allocator, RadixCache(16, allocator.free), SchedulerLimits(running, None, chunk, 32, policy))


def add(scheduler: Scheduler, name: str, prompt: list[int]) -> None:
    params = SamplingParams(max_tokens=100_000)
    scheduler.add(Request(name, len(prompt), prompt, params, 100_000, frozenset()))


def step(scheduler: Scheduler) -> None:
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.launch(batch)
    scheduler.commit(batch, [1] * sum(row.samples for row in batch.rows))


def decoding(rows: int, *, waiting: int = 0) -> Scheduler:
    """A scheduler in which `rows` requests decode, and others wait for a place."""
    scheduler = make(running=rows, chunk=100_000)
    for number in range(rows + waiting):
        add(scheduler, str(number), [number * 1000 + at for at in range(100)])
    step(scheduler)
    return scheduler


def queue_of_one_prefix(policy: SchedulePolicy) -> Scheduler:
    """64 prompts of 4,000 tokens wait for the first of them to compute what they share."""
    scheduler = make(policy=policy, chunk=64)
    for number in range(64):
        add(scheduler, str(number), [*range(4000), number])
    for _ in range(20):
        step(scheduler)
    return scheduler


def match_next(cache: RadixCache, prompts: Iterator[list[int]]) -> None:
    cache.match("", next(prompts))


def show_matches(page_size: int) -> None:
    prompt = list(range(4000))
    for chunk, how in ((4000, "as one edge"), (32, "in edges of 32")):
        cache = RadixCache(page_size, lambda pages: None)
        for end in range(chunk, 4001, chunk):
            cache.insert("", prompt[:end], list(range(4000 // page_size)))
        show(f"match of 4,000 tokens, page size {page_size}, {how}", best_us(partial(cache.match, "", prompt)))
        # From the end, so that each one cuts the long edge anew.
        cuts = iter([[*prompt[:cut], -1] for cut in range(3900, 0, -8 * page_size)])
        times = best_us(partial(match_next, cache, cuts), repeats=3500 // (8 * page_size))
        show(f"match that ends inside, page size {page_size}, {how}", times)


def main() -> None:
    for rows in (1, 64, 256):
        scheduler = decoding(rows)
        show(f"schedule and commit, {rows} requests decode", best_us(partial(step, scheduler)))
    scheduler = decoding(64, waiting=1000)
    show("schedule and commit, 64 requests decode, 1,000 wait for a place", best_us(partial(step, scheduler)))
    for policy in ("fcfs", "lpm"):
        queue = queue_of_one_prefix(policy)
        show(f"schedule and commit, 63 prompts wait for a prefix, {policy}", best_us(partial(step, queue), repeats=40))
    for page_size in (1, 16):
        show_matches(page_size)


if __name__ == "__main__":
    main()
