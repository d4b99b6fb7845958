"""Weights and inputs of eight bits: fp8 and int8, and SmoothQuant's scaling before it. Knows no format and no model.

SmoothQuant (Xiao et al., 2022, arXiv 2211.10438) moves what is hard to round from the inputs to the weights. Here its exponent is chosen
for each input by the error of the outputs, on rows that were kept, and leaving everything as it is is one of the choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..kernels.grouped_linear import GroupedWeight, dequantize
from .awq import Scaling
from .grid import Grid, writable
from .moments import Moments

FP8_MAX, INT8_MAX = 448.0, 127.0
BLOCK = 128  # rows and columns that one of fp8's scales covers
Granularity = Literal["channel", "tensor", "block"]
_EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def fp8_weight(weight: Tensor, granularity: Granularity, scale_dtype: torch.dtype) -> GroupedWeight:
    """float32 [N, K] to float8_e4m3fn under a scale max|w| / 448 of each row, of the whole, or of each block of 128 x 128.

    Scales are spread over rows, [N, 1] or [N, K / 128]. Raises ValueError where blocks do not divide the weight.
    """
    n, k = weight.shape
    size = BLOCK if granularity == "block" else k
    if granularity == "block":
        if n % BLOCK or k % BLOCK:
            raise ValueError(f"blocks of {BLOCK} x {BLOCK} do not divide a weight of {n} x {k}: give --weight-scales channel")
        largest = weight.abs().view(n // BLOCK, BLOCK, k // BLOCK, BLOCK).amax((1, 3)).repeat_interleave(BLOCK, dim=0)
    elif granularity == "tensor":
        largest = weight.abs().max().expand(n, 1)
    else:
        largest = weight.abs().amax(1, keepdim=True)
    scale = writable(largest / FP8_MAX, Grid(8, size, True, scale_dtype))
    codes = (weight / scale.repeat_interleave(size, dim=1)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return GroupedWeight(codes, 8, size, scale.to(scale_dtype))


def int8_weight(weight: Tensor, scale_dtype: torch.dtype) -> GroupedWeight:
    """float32 [N, K] to int8 under a scale max|w| / 127 of each row."""
    scale = writable(weight.abs().amax(1, keepdim=True) / INT8_MAX, Grid(8, weight.shape[1], True, scale_dtype))
    codes = (weight / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return GroupedWeight(codes, 8, weight.shape[1], scale.to(scale_dtype))


def rounded_rows(x: Tensor) -> Tensor:
    """float32 [R, K], each row rounded to int8 under a scale of its own, as inputs are while serving."""
    scale = (x.abs().amax(1, keepdim=True) / INT8_MAX).clamp(min=1e-12)
    return (x / scale).round() * scale


def input_scale(inputs: Moments) -> float:
    """A static scale for an input, max|x| / 448 over all that was seen."""
    return max(float(inputs.largest.max()), 1e-6) / FP8_MAX


def search_smoothing(
    weights: Sequence[Tensor], rows: Tensor, largest: Tensor, source: Tensor, num_factors: int, scale_dtype: torch.dtype
) -> Scaling:
    """Factors [num_factors] for an input that linears float32 [N_i, K] read; channel k takes factor `source[k]`.

    `rows` [R, K] are some of the inputs, `largest` [K] = max |x| of all of them.
    """
    of_weights = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    x = torch.zeros(num_factors).scatter_reduce_(0, source, largest, "amax").clamp(min=1e-5)
    w = torch.zeros(num_factors).scatter_reduce_(0, source, of_weights, "amax").clamp(min=1e-5)
    exact = [rows @ weight.t() for weight in weights]

    def error(factors: Tensor) -> float:
        spread = factors[source]
        given = rounded_rows(rows / spread)
        return sum(
            float((given @ dequantize(int8_weight(weight * spread, scale_dtype)).t() - out).square().sum(dtype=torch.float64))
            for weight, out in zip(weights, exact, strict=True)
        )

    identity = torch.ones(num_factors)
    start = error(identity)
    best, chosen = start, identity
    for exponent in _EXPONENTS:
        factors = x.pow(exponent) / w.pow(1 - exponent)
        factors = (factors / factors.log().mean().exp()).clamp(1e-4, 1e4)
        loss = error(factors)
        if loss < best:
            best, chosen = loss, factors
    return Scaling(chosen, best / start if start else 1.0)
