"""How much of the host's time per step hides behind a device whose results come late: a real clock, a tiny model, a device that sleeps.

    python -m octavo.benchmarks.bench_overlap

The model is computed at once, on the CPU, and its tokens are held back: a step takes `--late-ms` from its launch or from the end of the
step before, whichever is later. What the host does besides, the tiny model included, is what overlap has to hide.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from ..quant.checkpoint.resolve import resolve_model
from ..runtime.config import EngineConfig
from ..runtime.core import EngineCore
from ..runtime.model_runner import ModelRunner
from ..runtime.sampling_params import SamplingParams


class LateDevice:
    """Gives tensors `late_s` after the step before, or after they were asked for."""

    def __init__(self, late_s: float) -> None:
        self._late_s, self._free_at = late_s, 0.0

    def fetch(self, tensors: Sequence[torch.Tensor]) -> LateDevice.Late:
        self._free_at = max(self._free_at, time.perf_counter()) + self._late_s
        return self.Late(self._free_at, list(tensors))

    class Late:
        def __init__(self, ready_at: float, tensors: list[torch.Tensor]) -> None:
            self._ready_at, self._tensors = ready_at, tensors

        def wait(self) -> list[torch.Tensor]:
            time.sleep(max(0.0, self._ready_at - time.perf_counter()))
            return self._tensors


def run(runner: ModelRunner, config: EngineConfig, *, late_s: float, overlap: bool, requests: int, steps: int) -> tuple[float, int]:
    """Seconds and steps that `requests` of `steps` tokens take."""
    core = EngineCore(config, runner, fetch=LateDevice(late_s).fetch, overlap=overlap)
    for number in range(requests):
        core.add(str(number), [number % 100 + 1] * 100, SamplingParams(max_tokens=steps, temperature=0.0))
    started = time.perf_counter()
    while core.has_work:
        core.step()
    return time.perf_counter() - started, core.num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--late-ms", type=float, default=50.0)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    shape = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaForCausalLM(shape).save_pretrained(folder)
        options = EngineConfig(device="cpu", max_total_tokens=512 * args.requests, max_running_requests=args.requests, num_threads=1)
        config = options.resolve(device="cpu")
        runner = ModelRunner(config, resolve_model(str(Path(folder))), show_progress=False)
    late_s = args.late_ms / 1e3
    run(runner, config, late_s=0.0, overlap=False, requests=args.requests, steps=4)
    hidden = []
    for _ in range(args.rounds):
        seconds, steps = run(runner, config, late_s=late_s, overlap=False, requests=args.requests, steps=args.steps)
        ahead, ahead_steps = run(runner, config, late_s=late_s, overlap=True, requests=args.requests, steps=args.steps)
        host = seconds - steps * late_s
        hidden.append(1 - (ahead - ahead_steps * late_s) / host)
        print(f"{args.requests} requests, {steps} steps; a step in turn {seconds / steps * 1e3:.2f} ms, of which the host", end=" ")
        print(f"{host / steps * 1e3:.2f}; with overlap {ahead / ahead_steps * 1e3:.2f}: {hidden[-1]:.1%} of the host's time is hidden")
    print(f"median {statistics.median(hidden):.1%}")


if __name__ == "__main__":
    main()
