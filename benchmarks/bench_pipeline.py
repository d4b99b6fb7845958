"""What stages gain: throughput with several batches of so many requests under way, against one, where every stage takes a given time.

    python -m octavo.benchmarks.bench_pipeline --stages 2

A tiny model of random weights on the CPU, whose stages sleep after they have computed a step, as if a device took that long.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..runtime import hosts
from ..runtime.config import EngineConfig
from ..runtime.core import EngineCore
from ..runtime.sampling_params import SamplingParams
from ..runtime.start import load_core, prepare_environment
from .bench_ranks import model_in

_STAGE_S = "OCTAVO_BENCH_STAGE_S"  # read by the ranks' processes, which are this program too


def slow_down() -> None:
    """Have the stages of this process take their time."""
    from ..runtime.model_runner import ModelRunner

    compute, seconds = ModelRunner._compute, float(os.environ[_STAGE_S])

    def slowly(*args: Any, **named: Any) -> Any:
        try:
            return compute(*args, **named)
        finally:
            time.sleep(seconds)

    ModelRunner._compute = slowly  # type: ignore[method-assign]


def tokens_per_second(core: EngineCore, requests: int, tokens: int) -> float:
    """Of decoding: from the first token of the last request on."""
    for number in range(requests):
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        core.add(str(number), [17 * number + place for place in range(8)], params)
    while any(request.num_generated < 1 for request in core.scheduler.requests):
        core.step()
    began, before = time.perf_counter(), core.scheduler.counters.generated_tokens
    while core.has_work:
        core.step()
    return (core.scheduler.counters.generated_tokens - before) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--stage-ms", type=float, default=50.0)
    parser.add_argument("--requests", type=int, default=4, help="in each batch (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=40)
    given = parser.parse_args()
    prepare_environment()
    os.environ[_STAGE_S] = str(given.stage_ms / 1e3)
    hosts._PROGRAM = __spec__.name
    slow_down()
    with tempfile.TemporaryDirectory() as place:
        config = EngineConfig(
            model_path=model_in(Path(place), 128, 2 * given.stages), load_format="dummy", device="cpu", tp_size=given.tp,
            pp_size=given.stages, num_threads=1, max_total_tokens=8192, skip_kernel_check=True,
        )  # fmt: skip
        core = load_core(config, show_progress=False)
        try:
            rates = {}
            for batches in (1, given.stages, given.stages + 1):
                filled = EngineCore(core.config, core.runner, num_batches=batches)
                rates[batches] = tokens_per_second(filled, batches * given.requests, given.tokens)
        finally:
            core.close()
    for batches, rate in rates.items():
        print(f"  {batches} under way: {rate:7.1f} tokens/s, {rate / rates[1]:.2f} times that of one")


if __name__ == "__main__":
    if _STAGE_S in os.environ:
        from ..runtime import rank_worker

        slow_down()
        rank_worker.end_with(rank_worker.main(*sys.argv[1:]))
    main()
