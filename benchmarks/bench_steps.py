"""Time of whole model steps by quantization, in turn within one run, so that ratios hold on a machine whose speed drifts.

    python benchmarks/bench_steps.py DENSE_MODEL [--formats bf16,int8,int4,fp8] [--model NAME=PATH ...] [--rounds 12]

A format is one that `--quantization` makes of the dense model, or a checkpoint of its own (`--model gguf=FILE`, `--model awq=DIR`).
Prints the best time of each, its ratio to the first's, bytes of weights, and the kernels in use.
"""

from __future__ import annotations

import argparse
import time
from array import array
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from octavo.runtime.start import prepare_environment

if TYPE_CHECKING:
    from octavo.runtime.batch import Batch
    from octavo.runtime.model_runner import ModelRunner

PAGE = 16
# Sequences, tokens already cached of each, new tokens of each.
SHAPES = ((1, 128, 1), (4, 128, 1), (16, 128, 1), (64, 128, 1), (1, 0, 512))


def make_batch(sequences: int, cached: int, new: int) -> Batch:
    """A step of `sequences` rows over pages of their own; what lies in the cache does not matter for time."""
    from octavo.runtime.batch import Batch, BatchRow

    pages_each = -(-(cached + new) // PAGE)
    rows = []
    for index in range(sequences):
        pages = array("i", range(index * pages_each, (index + 1) * pages_each))
        tokens = [(7 * index + position) % 10_000 for position in range(cached + new)]
        request: Any = SimpleNamespace(tokens=tokens, pages=pages, scored_positions=lambda start, count: [])
        rows.append(BatchRow(request, cached, new, True))
    return Batch(tuple(rows))


def load(model: str, quantization: str) -> ModelRunner:
    """A runner in bfloat16."""
    from octavo.quant.checkpoint.resolve import resolve_model
    from octavo.runtime.config import EngineConfig
    from octavo.runtime.model_runner import ModelRunner

    options: dict[str, Any] = {"max_total_tokens": 16_384, "max_running_requests": 64, "chunked_prefill_size": 512}
    config = EngineConfig(model_path=model, quantization=quantization, dtype="bfloat16", device="cpu", **options).resolve(device="cpu")
    return ModelRunner(config, resolve_model(model), show_progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("--formats", default="bf16,int8,int4,fp8")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    prepare_environment()
    runners: dict[str, ModelRunner] = {}
    for name in given.formats.split(","):
        runners[name] = load(given.dense, "auto" if name == "bf16" else name)
    for pair in given.model:
        name, _, path = pair.partition("=")
        runners[name] = load(path, "auto")
    for name, runner in runners.items():
        print(f"{name:<12} {runner.linear_report.summary()}")
    print(f"\n{'sequences x new':<18}" + "".join(f"{name:>20}" for name in runners))
    for sequences, cached, new in SHAPES:
        batch = make_batch(sequences, cached, new)
        times: dict[str, list[float]] = {name: [] for name in runners}
        for index in range(given.rounds + 1):
            for name, runner in runners.items():
                start = time.perf_counter()
                runner.forward(batch)
                if index:
                    times[name].append(time.perf_counter() - start)
        best = [min(values) for values in times.values()]
        cells = "".join(f"{value * 1e3:>12.2f} ({best[0] / value:.2f}x)" for value in best)
        print(f"{f'{sequences} x {new}':<18}{cells}", flush=True)


if __name__ == "__main__":
    main()
