"""Refining quantized weights under the second moments of their inputs: codes one column at a time, scales in closed form. Knows no method.

Both lower sum over rows of (w - q) H (w - q)^T and never raise it. Coordinate descent on codes after GPTQ: Behdin et al., 2023, QuantEase,
arXiv 2309.01885. Scales by least squares over all groups of a row at once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.grouped_linear import GroupedWeight, dequantize
from .grid import Grid, writable

_BLOCK = 64  # columns whose gradients are kept up to date one by one; those of the others come with one product
_RIDGE = 1e-4  # of the mean diagonal, on what a row's scales are solved from
_ROWS = 512  # solved at once


def refine(weight: Tensor, hessian: Tensor, quantized: GroupedWeight, *, rounds: int) -> GroupedWeight:
    """`rounds` of codes and scales in turn, for `weight` float32 [N, K] and hessian = mean of x x^T [K, K]."""
    for _ in range(rounds):
        quantized = refine_codes(weight, hessian, refine_scales(weight, hessian, quantized), sweeps=2)
    return refine_scales(weight, hessian, quantized) if rounds else quantized


def _zeros(quantized: GroupedWeight) -> Tensor:
    """Zero points float32 [N, G]."""
    if quantized.zeros is not None:
        return quantized.zeros.float()
    return torch.full(quantized.scale.shape, float(quantized.zero))


def refine_codes(weight: Tensor, hessian: Tensor, quantized: GroupedWeight, *, sweeps: int) -> GroupedWeight:
    """Each code in turn becomes the best there is while all others stay; `sweeps` times over all columns."""
    g, top = quantized.group_size, 2**quantized.bits - 1
    codes = quantized.codes.t().float()
    scale = quantized.scale.float().t().repeat_interleave(g, dim=0)
    zero = _zeros(quantized).t().repeat_interleave(g, dim=0)
    error = weight.t() - (codes - zero) * scale  # [K, N]: a column of the weight is a row here, and contiguous
    curvature = hessian.diagonal().clamp(min=1e-12)
    for _ in range(sweeps):
        for start in range(0, len(codes), _BLOCK):
            part = slice(start, start + _BLOCK)
            pull = hessian[part] @ error
            inside = hessian[part, part]
            for i in range(len(pull)):
                k = start + i
                wanted = (codes[k] - zero[k]) * scale[k] + pull[i] / curvature[k]
                code = torch.round(wanted / scale[k] + zero[k]).clamp_(0, top)
                change = (code - codes[k]) * scale[k]
                codes[k] = code
                error[k] -= change
                pull.addr_(inside[:, i], change, alpha=-1)
    return replace(quantized, codes=codes.t().to(torch.uint8).contiguous())


def refine_scales(weight: Tensor, hessian: Tensor, quantized: GroupedWeight) -> GroupedWeight:
    """The scales of each row that fit its codes best, as they are written; rows that would lose by their rounding keep what they have."""
    n, g = len(weight), quantized.group_size
    grid = Grid(quantized.bits, g, quantized.zeros is None, quantized.scale.dtype)
    levels = (quantized.codes.view(n, -1, g).float() - _zeros(quantized)[..., None]).flatten(1)
    parts = [_solve(weight[at : at + _ROWS], hessian, levels[at : at + _ROWS], g) for at in range(0, n, _ROWS)]
    found = replace(quantized, scale=writable(torch.cat(parts), grid).to(quantized.scale.dtype))
    better = _row_errors(weight, hessian, found) < _row_errors(weight, hessian, quantized)
    return replace(found, scale=torch.where(better[:, None], found.scale, quantized.scale))


def _solve(weight: Tensor, hessian: Tensor, levels: Tensor, g: int) -> Tensor:
    """Scales [N, G] that minimise (w - s . levels) H (w - s . levels)^T, row by row."""
    n, k = weight.shape
    groups = k // g
    by_group = levels.view(n, groups, g)
    normal = torch.empty(n, groups, groups)
    wanted = torch.empty(n, groups)
    for group in range(groups):
        pulled = by_group[:, group] @ hessian[group * g : (group + 1) * g]  # [N, K]
        normal[:, group] = (pulled.view(n, groups, g) * by_group).sum(-1)
        wanted[:, group] = (pulled * weight).sum(-1)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal.mean(1, keepdim=True) + 1e-20
    solved: Tensor = torch.linalg.solve(normal.double(), wanted.double()).float()
    return torch.nan_to_num(solved)


def _row_errors(weight: Tensor, hessian: Tensor, quantized: GroupedWeight) -> Tensor:
    difference = dequantize(quantized) - weight
    return (difference @ hessian).mul_(difference).sum(1)
