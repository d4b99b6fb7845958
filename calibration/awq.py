"""AWQ: scales inputs so that rounding hurts least where they are large (Lin et al., 2023, arXiv 2306.00978). Knows no format and no model.

What differs from AutoAWQ: the error of a linear is measured exactly, over all calibration tokens, from the second moments of its inputs;
the identity is one of the candidates, so that scaling never loses; both forms of scales are tried at every exponent; heads that share
keys share their scales; and ranges are searched with weights, each end by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.grouped_linear import dequantize
from .grid import Grid, round_to_nearest

_EXPONENTS = tuple(i / 20 for i in range(1, 21))
_LEAST, _MOST = 1e-4, 1e4
_FIT_STEPS, _FIT_RATE, _FITTED_ROWS = 50, 0.06, 768


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
    for candidate in [*_candidates(x, w), fit_scales(weights, diagonal, source, num_factors, grid).factors]:
        loss = error(candidate)
        if loss < best:
            best, factors = loss, candidate
    return Scaling(factors, best / start if start else 1.0)


def fit_scales(weights: Sequence[Tensor], importance: Tensor, source: Tensor, num_factors: int, grid: Grid) -> Scaling:
    """Factors [num_factors] under which the ranges of groups, weighted with the importance of their inputs, are smallest.

    Minimises the sum over groups of range**2 * sum of importance / factor**2, which is rounding's expected error, by Adam on the
    logarithms. `importance` [K]: the mean square of each input, or what of it the others do not explain where GPTQ follows. The error
    that it gives is that expectation's.
    """
    stacked = torch.cat(list(weights))
    rows = stacked[:: max(1, len(stacked) // _FITTED_ROWS)].reshape(-1, len(source) // grid.group_size, grid.group_size)
    weight_of = importance.reshape(-1, grid.group_size)
    logarithms = torch.zeros(num_factors, requires_grad=True)
    optimizer = torch.optim.Adam([logarithms], lr=_FIT_RATE, betas=(0.9, 0.95))
    least, best, start = float("inf"), logarithms.detach().clone(), 0.0
    with torch.enable_grad():
        for step in range(_FIT_STEPS):
            optimizer.param_groups[0]["lr"] = _FIT_RATE * (1 - step / _FIT_STEPS)
            factors = logarithms.exp()[source].reshape(weight_of.shape)
            scaled = rows * factors
            ranges = 2 * scaled.abs().amax(-1) if grid.symmetric else scaled.amax(-1).clamp(min=0) - scaled.amin(-1).clamp(max=0)
            loss = (ranges.square().sum(0) * (weight_of / factors.square()).sum(-1)).sum().clamp(min=1e-30).log()
            value = float(loss.detach())
            start = value if step == 0 else start
            if value < least:
                least, best = value, logarithms.detach().clone()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return Scaling((best - best.mean()).exp().clamp(_LEAST, _MOST), math.exp(least - start))


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
