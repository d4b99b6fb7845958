"""What a step costs before the ranks compute it: scheduling, laying it out, sending the plan, and reading and checking it elsewhere.

    python -m octavo.benchmarks.bench_plan --requests 64 --context 1000

No model: steps in which every request decodes. The other rank is a process of its own behind a real socket; its time ends with the arrays
that it would compute. Prints medians and the 99th percentile in microseconds. "all" is from the beginning of scheduling
to the arrays there: both processes read the machine's own clock.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time

import numpy as np
import zmq

from ..runtime.forward_batch import lay_out
from ..runtime.page_allocator import PageAllocator
from ..runtime.plan import Plan, make_plan, plan_encoder, read_plan, to_rank_decoder
from ..runtime.radix_cache import RadixCache
from ..runtime.request import Request
from ..runtime.sampling_params import SamplingParams
from ..runtime.scheduler import Scheduler, SchedulerLimits

PAGE = 16


def follow(address: str, back: str, steps: int) -> None:
    """The other rank: when each step's arrays were there, and how long reading took."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(address)
    outbox.connect(back)
    for number in range(steps):
        packed = inbox.recv()
        began = time.perf_counter()
        plan = to_rank_decoder.decode(packed)
        assert isinstance(plan, Plan)
        read_plan(plan, number, PAGE)
        now = time.perf_counter()
        outbox.send(np.array([now, now - began]).tobytes())
    context.destroy(linger=1000)


def scheduler_of(requests: int, context: int, steps: int) -> Scheduler:
    """`requests` that have computed their prompts."""
    pages = requests * (-(-(context + steps) // PAGE) + 1)
    allocator = PageAllocator(pages)
    limits = SchedulerLimits(requests, None, 1 << 20, 1 << 20, "fcfs")
    scheduler = Scheduler(allocator, RadixCache(PAGE, allocator.free), limits)
    for number in range(requests):
        prompt = [number + 1, *range(context - 1)]
        scheduler.add(Request(str(number), context, prompt, SamplingParams(max_tokens=2 * steps), 2 * steps, frozenset()))
    while any(request.num_computed < context for request in scheduler.requests):
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.launch(batch)
        scheduler.commit(batch, [7] * sum(row.samples for row in batch.rows))
    return scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--context", type=int, default=1000, help="tokens of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    scheduler = scheduler_of(given.requests, given.context, given.steps)
    took: dict[str, list[float]] = {name: [] for name in ("schedule", "lay out", "make and send", "read and check", "all")}
    with tempfile.TemporaryDirectory() as folder:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        outbox, inbox = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        outbox.bind(f"ipc://{folder}/plans")
        inbox.bind(f"ipc://{folder}/back")
        other = multiprocessing.get_context("spawn").Process(
            target=follow, args=(f"ipc://{folder}/plans", f"ipc://{folder}/back", given.steps)
        )
        other.start()
        size = 0
        for number in range(given.steps):
            marks = [time.perf_counter()]
            batch = scheduler.schedule()
            assert batch is not None
            assert len(batch.rows) == given.requests
            marks.append(time.perf_counter())
            arrays = lay_out(batch, PAGE)
            marks.append(time.perf_counter())
            packed = plan_encoder.encode(make_plan(number, arrays, 0, PAGE))
            outbox.send(packed)
            marks.append(time.perf_counter())
            size = len(packed)
            arrived, reading = np.frombuffer(inbox.recv())
            scheduler.launch(batch)
            scheduler.commit(batch, [7] * len(batch.rows))
            for name, seconds in zip(took, (*np.diff(marks), reading, arrived - marks[0]), strict=True):
                took[name].append(seconds)
        other.join()
        context.destroy(linger=0)
    print(f"{given.requests} requests of {given.context} tokens, {size:,} bytes a plan")
    for name, seconds in took.items():
        micros = np.array(seconds[given.steps // 10 :]) * 1e6
        print(f"  {name:<15}{np.median(micros):8.0f} us   99 %: {np.percentile(micros, 99):8.0f}")


if __name__ == "__main__":
    main()
