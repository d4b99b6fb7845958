"""AWQ: scales inputs so that rounding hurts least where they are large (Lin et al., 2023, arXiv 2306.00978). Knows no format and no model.

What differs from AutoAWQ: the error of a linear is measured exactly, over all calibration tokens, from the second moments of its inputs;
the identity is one of the candidates, so that scaling never loses; both forms of scales are tried at every exponent; heads that share
keys share their scales; and ranges are searched with weights, each end by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.grouped_linear import dequantize
from .grid import Grid, round_to_nearest

_EXPONENTS = tuple(i / 20 for i in range(1, 21))
_LEAST, _MOST = 1e-4, 1e4


@dataclass(frozen=True, eq=False)
class Scaling:
    """Factors float32 [R] for the feeder's outputs, and the error of the readers with them, relative to the error without."""

    factors: Tensor
    relative_error: float


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Mean over tokens of ||(W - Q) x||^2, for weights [N, K] and hessian = mean of x x^T [K, K]."""
    difference = quantized - weight
    return float((difference @ hessian).mul_(difference).sum(dtype=torch.float64))


def search_scales(
    weights: Sequence[Tensor], hessian: Tensor, magnitude: Tensor, source: Tensor, num_factors: int, grid: Grid, *, searched: bool = True
) -> Scaling:
    """The scaling of an input that leaves the least error in the linears that read it, `weights` float32 [N_i, K].

    `hessian` [K, K] and `magnitude` = mean |x| [K] are of the input as it is. Channel k takes factor `source[k]` of `num_factors`: where
    channels share a factor, its statistics are their mean. `searched`: judge with searched ranges, as they will be used.
    """
    x = _by_factor(magnitude, source, num_factors, mean=True)
    w = _by_factor(_relative_size(weights, grid.group_size), source, num_factors, mean=True)
    diagonal = hessian.diagonal()

    def error(factors: Tensor) -> float:
        spread = factors[source]
        importance = diagonal / spread.square() if searched else None
        total = 0.0
        for weight in weights:
            quantized = dequantize(round_to_nearest(weight * spread, grid, importance)) / spread
            total += output_error(weight, quantized, hessian)
        return total

    identity = torch.ones(num_factors)
    start = error(identity)
    best, factors = start, identity
    for candidate in _candidates(x, w):
        loss = error(candidate)
        if loss < best:
            best, factors = loss, candidate
    return Scaling(factors, best / start if start else 1.0)


def _candidates(x: Tensor, w: Tensor) -> list[Tensor]:
    """Scales x**r, and x**r / w**(1 - r), normalised so that the largest and the smallest are as far from 1."""
    forms: tuple[Callable[[float], Tensor], ...] = (x.pow, lambda r: x.pow(r) / (w.pow(1 - r) + _LEAST))
    found = []
    for form in forms:
        for exponent in _EXPONENTS[1::2]:
            scales = form(exponent).clamp(min=_LEAST)
            scales = scales / (scales.max() * scales.min()).sqrt()
            if bool(torch.isfinite(scales).all()) and float(scales.max()) < _MOST:
                found.append(scales)
    return found


def _relative_size(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """Mean over the rows of |w| relative to the largest of its group, [K]."""
    rows = torch.cat([weight.abs() for weight in weights])
    groups = rows.reshape(len(rows), -1, group_size)
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).mean(0).flatten()


def _by_factor(channels: Tensor, source: Tensor, count: int, *, mean: bool) -> Tensor:
    summed = torch.zeros(count).index_add_(0, source, channels)
    return summed / torch.zeros(count).index_add_(0, source, torch.ones_like(channels)).clamp(min=1) if mean else summed
