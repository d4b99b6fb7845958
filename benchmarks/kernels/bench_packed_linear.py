"""Times packed CPU linears against torch's, by rows and shape. Prints microseconds a call and GFLOP/s; knows no model."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from octavo.kernels.cpu import packed_linear

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576))
ROWS = (1, 4, 16, 64, 512)
ROTATED_BYTES = 64_000_000  # weights of this size take turns, so that none is still in cache
REPEATS = 15


def best_us(call: Callable[[], object]) -> float:
    """Microseconds of the fastest of REPEATS calls."""
    call()
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best * 1e6


def _packed(weights: Iterator[torch.Tensor], x: torch.Tensor, n: int, out: torch.Tensor) -> torch.Tensor:
    return packed_linear.linear(x, next(weights), n, None, out)


def _dense(weights: Iterator[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, next(weights))


def main() -> None:
    print(f"{torch.get_num_threads()} threads; microseconds a call")
    print(f"{'N x K':>14} {'rows':>5} {'torch f32':>10} {'torch bf16':>11} {'packed f32':>11} {'packed bf16':>12} {'GFLOP/s':>8}")
    for (n, k), m in itertools.product(SHAPES, ROWS):
        count = max(1, min(24, ROTATED_BYTES // (n * k * 2)))
        dense = [torch.randn(n, k) for _ in range(count)]
        x, out = torch.randn(m, k), torch.empty(m, n)
        columns = []
        for dtype, packs in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)):
            cast = [weight.to(dtype) for weight in dense]
            weights = itertools.cycle([packed_linear.pack(weight) for weight in cast] if packs else cast)
            given = x if packs else x.to(dtype)
            if packs:
                call = partial(_packed, weights, given, n, out)
            else:
                call = partial(_dense, weights, given)
            columns.append(best_us(call))
        print(f"{n:>7} x {k:<4} {m:>5} " + "".join(f"{value:11.0f} " for value in columns) + f"{2 * m * n * k / columns[-1] / 1e3:8.0f}")


if __name__ == "__main__":
    main()
