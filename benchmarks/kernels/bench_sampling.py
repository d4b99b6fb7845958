"""Times of the sampling kernels and of the Sampler by rows and mode, beside torch's argmax. A plain script; checks nothing.

python benchmarks/kernels/bench_sampling.py [vocabulary]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from octavo.kernels import sampling
from octavo.runtime.sampler import Sampler, SampleRow
from octavo.runtime.sampling_params import SamplingParams

REPEATS = 15


def best_ms(function: Callable[[], object]) -> float:
    function()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def kernel_modes(logits: torch.Tensor) -> dict[str, Callable[[], object]]:
    rows = logits.shape[0]
    temperature, top_p, min_p = torch.full((rows,), 0.8), torch.full((rows,), 0.9), torch.full((rows,), 0.02)
    top_k, large_k = torch.full((rows,), 50, dtype=torch.int32), torch.full((rows,), 2000, dtype=torch.int32)
    uniform = torch.rand(rows, dtype=torch.float64)
    tokens = torch.zeros(rows, dtype=torch.int64)
    return {
        "torch argmax": lambda: logits.argmax(1),
        "greedy": lambda: sampling.greedy_tokens(logits),
        "temperature": lambda: sampling.sample_tokens(logits, temperature, uniform=uniform),
        "top_k 50, top_p": lambda: sampling.sample_tokens(logits, temperature, top_k=top_k, top_p=top_p, uniform=uniform),
        "top_k 2000, top_p": lambda: sampling.sample_tokens(logits, temperature, top_k=large_k, top_p=top_p, uniform=uniform),
        "top_p": lambda: sampling.sample_tokens(logits, temperature, top_p=top_p, uniform=uniform),
        "min_p": lambda: sampling.sample_tokens(logits, temperature, min_p=min_p, uniform=uniform),
        "top_logprobs 5": lambda: sampling.top_logprobs(logits, tokens, k=5),
    }


def sampler_ms(params: SamplingParams, rows: int, *, vocab: int) -> float:
    """One `Sampler.sample` over a small vocabulary: what Python costs a step, little more."""
    sampler = Sampler(random_seed=0)
    for row in range(rows):
        sampler.add(str(row), params, torch.randint(vocab, (500,)).tolist(), ())
    logits = torch.randn(rows, vocab)
    step = iter(range(10**9))

    def one_step() -> object:
        now = next(step)
        return sampler.sample(logits, [SampleRow(str(row), now) for row in range(rows)])

    return best_ms(one_step)


def main() -> None:
    vocab = int(sys.argv[1]) if len(sys.argv) > 1 else 49152
    print(f"{torch.get_num_threads()} threads, vocabulary {vocab}, best of {REPEATS}, milliseconds")
    for spread in (1.0, 3.0):
        for rows in (1, 8, 64):
            print(f"normal logits of deviation {spread:g}, {rows} rows")
            for name, function in kernel_modes(torch.randn(rows, vocab) * spread).items():
                print(f"  {name:20s} {best_ms(function):8.3f}")
    print("Sampler.sample, 64 rows, vocabulary 1000")
    for name, params in {
        "greedy": SamplingParams(temperature=0),
        "top_k, top_p": SamplingParams(top_k=50, top_p=0.9),
        "penalties": SamplingParams(top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.2),
        "logprobs 5": SamplingParams(logprobs=5),
    }.items():
        print(f"  {name:20s} {sampler_ms(params, 64, vocab=1000):8.3f}")


if __name__ == "__main__":
    main()
