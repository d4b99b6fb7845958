"""Linears with quantized weights against dense bfloat16 panels, in turn within one run: microseconds a call and the ratio.

    python benchmarks/kernels/bench_quantized_linear.py [--rounds 7]

Few rows pass through 64 MB of copies of the weights, so that none is in cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from octavo.kernels.cpu import grouped_linear, int8_linear, packed_linear, wide_linear
from octavo.kernels.grouped_linear import GroupedWeight
from octavo.kernels.quantize_activations import quantize_dequantize

SHAPES = ((3072, 576), (576, 1536), (960, 576))  # N, K of a 135M Llama
ROWS = (1, 4, 16, 64, 512)
CACHE_BYTES = 64_000_000

Multiply = Callable[[torch.Tensor, Any, torch.Tensor], torch.Tensor]


def int4(n: int, k: int) -> GroupedWeight:
    """Random AWQ-like weights: 4 bits in groups of 64 with zero points."""
    scale, zeros = torch.rand(n, k // 64).to(torch.float16), torch.randint(0, 16, (n, k // 64)).to(torch.uint8)
    return GroupedWeight(torch.randint(0, 16, (n, k)).to(torch.uint8), 4, 64, scale, zeros=zeros)


def kernels(n: int, k: int, copies: int) -> dict[str, tuple[Multiply, list[Any]]]:
    """The same shape in every kernel: how it multiplies x with a weight, and `copies` weights."""
    dense = packed_linear.pack(torch.randn(n, k).bfloat16())
    eight = int8_linear.pack(torch.randint(-127, 128, (n, k)).to(torch.int8), torch.rand(n), wide=True)
    wide, grouped = wide_linear.pack(int4(n, k)), grouped_linear.pack(int4(n, k))
    codes = torch.randn(n, k).to(torch.float8_e4m3fn)
    fp8 = grouped_linear.pack(GroupedWeight(codes, 8, k, torch.rand(n, 1)))

    def again(weight: Any) -> list[Any]:
        return [replace(weight, data=weight.data.clone()) for _ in range(copies)]

    return {
        "bf16": (lambda x, w, out: packed_linear.linear(x, w, n, None, out), [dense.clone() for _ in range(copies)]),
        "int8": (lambda x, w, out: int8_linear.linear(x, w, None, out), again(eight)),
        "int4 wide": (lambda x, w, out: wide_linear.linear(x, w, None, out), again(wide)),
        "int4 grouped": (lambda x, w, out: grouped_linear.linear(x, w, None, out), again(grouped)),
        "fp8": (lambda x, w, out: grouped_linear.linear(quantize_dequantize(x, "fp8_e4m3"), w, None, out), again(fp8)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    for n, k in SHAPES:
        found = kernels(n, k, max(1, CACHE_BYTES // (2 * n * k)))
        for rows in ROWS:
            x, out = torch.randn(rows, k), torch.empty(rows, n)
            best = dict.fromkeys(found, float("inf"))
            for _ in range(rounds):
                for name, (multiply, weights) in found.items():
                    used = weights if rows <= 16 else weights[:4]
                    start = time.perf_counter()
                    for weight in used:
                        multiply(x, weight, out)
                    best[name] = min(best[name], (time.perf_counter() - start) / len(used))
            cells = "".join(f"{name:>14} {value * 1e6:8.0f} ({best['bf16'] / value:.2f}x)" for name, value in best.items())
            print(f"{n} x {k}, {rows:>3} rows {cells}", flush=True)


if __name__ == "__main__":
    main()
