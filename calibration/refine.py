"""Refining quantized weights under the second moments of their inputs: codes one column at a time, scales in closed form. Knows no method.

All lower sum over rows of (w - q) H (w - q)^T and never raise it. Coordinate descent on codes after GPTQ: Behdin et al., 2023, QuantEase,
arXiv 2309.01885. Scales by least squares over all groups of a row at once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.grouped_linear import GroupedWeight
from .grid import Grid, Ranges, encode, grouped, writable

_BLOCK = 64  # columns whose gradients are kept up to date one by one; those of the others come with one product
_RIDGE = 1e-4  # of the mean diagonal, on what a row's scales are solved from
_ROWS = 512  # solved at once, where their matrices have no more entries than these:
_MOST_ENTRIES = 1 << 24


def refine(weight: Tensor, hessian: Tensor, quantized: GroupedWeight, *, rounds: int) -> GroupedWeight:
    """`rounds` of codes and scales in turn, for `weight` float32 [N, K] and hessian = mean of x x^T [K, K]."""
    for _ in range(rounds):
        quantized = refine_codes(weight, hessian, refine_scales(weight, hessian, quantized), sweeps=2)
    return refine_scales(weight, hessian, quantized) if rounds else quantized


def refine_nearest(weight: Tensor, hessian: Tensor, quantized: GroupedWeight, *, rounds: int) -> GroupedWeight:
    """Scales, and then `rounds` of the nearest codes under them and scales again: where codes are to stay the nearest, ranges are all that
    can make up for what inputs do together. Of each row the best is kept."""
    codes, scales = quantized.codes.clone(), quantized.scale.clone()
    for at in range(0, len(weight), _ROWS):
        rows = slice(at, at + _ROWS)
        best, least = _with_scales(weight[rows], hessian, quantized.take(torch.arange(at, min(at + _ROWS, len(weight)))))
        for _ in range(rounds):
            found, loss = _with_scales(weight[rows], hessian, _encoded(weight[rows], best))
            better = (loss < least)[:, None]
            best = replace(best, codes=torch.where(better, found.codes, best.codes), scale=torch.where(better, found.scale, best.scale))
            least = torch.minimum(loss, least)
        codes[rows], scales[rows] = best.codes, best.scale
    return replace(quantized, codes=codes, scale=scales)


def _encoded(weight: Tensor, quantized: GroupedWeight) -> GroupedWeight:
    """`weight` [N, K] by the nearest codes under the ranges of `quantized`."""
    g = quantized.group_size
    grid = Grid(quantized.bits, g, quantized.zeros is None, quantized.scale.dtype)
    ranges = Ranges(quantized.scale.float(), _zeros(quantized))
    return replace(quantized, codes=encode(grouped(weight, g), ranges, grid).flatten(1).to(torch.uint8))


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
    original = weight.t().contiguous()  # [K, N]: a column of the weight is a row here
    error = original - (codes - zero) * scale
    steps = (scale * hessian.diagonal().clamp(min=1e-12)[:, None]).reciprocal_()  # from a pull to codes
    for _ in range(sweeps):
        for start in range(0, len(codes), _BLOCK):
            part = slice(start, start + _BLOCK)
            pull = hessian[part] @ error
            inside = hessian[part, part]
            for i in range(len(pull)):
                k = start + i
                code = torch.addcmul(codes[k], pull[i], steps[k]).round_().clamp_(0, top)
                change = (code - codes[k]).mul_(scale[k])
                codes[k] = code
                pull[i + 1 :].addr_(inside[i + 1 :, i], change, alpha=-1)
            error[part] = original[part] - (codes[part] - zero[part]) * scale[part]
    return replace(quantized, codes=codes.t().to(torch.uint8).contiguous())


def refine_scales(weight: Tensor, hessian: Tensor, quantized: GroupedWeight) -> GroupedWeight:
    """The scales of each row that fit its codes best, as they are written; rows that would lose by their rounding keep what they have."""
    return _with_scales(weight, hessian, quantized)[0]


def _with_scales(weight: Tensor, hessian: Tensor, quantized: GroupedWeight) -> tuple[GroupedWeight, Tensor]:
    """What `refine_scales` gives, and what each row then loses, float64 [N], less w H w^T, which hangs on no code and no scale."""
    (n, k), g = weight.shape, quantized.group_size
    grid = Grid(quantized.bits, g, quantized.zeros is None, quantized.scale.dtype)
    levels = (quantized.codes.view(n, -1, g).float() - _zeros(quantized)[..., None]).flatten(1)
    parts, losses = [], []
    at_once = max(1, min(_ROWS, _MOST_ENTRIES // (k // g) ** 2))
    for at in range(0, n, at_once):
        rows = slice(at, at + at_once)
        normal, wanted = _normal_equations(weight[rows], hessian, levels[rows], g)
        ridged = normal.clone()
        diagonal = ridged.diagonal(dim1=1, dim2=2)
        diagonal += _RIDGE * diagonal.mean(1, keepdim=True) + 1e-20
        solved = torch.nan_to_num(torch.linalg.solve(ridged, wanted)).float()
        found, old = writable(solved, grid).to(quantized.scale.dtype), quantized.scale[rows]
        loss, kept = _loss(normal, wanted, found), _loss(normal, wanted, old)
        better = loss < kept
        parts.append(torch.where(better[:, None], found, old))
        losses.append(torch.where(better, loss, kept))
    return replace(quantized, scale=torch.cat(parts)), torch.cat(losses)


def _normal_equations(weight: Tensor, hessian: Tensor, levels: Tensor, g: int) -> tuple[Tensor, Tensor]:
    """A [N, G, G] and b [N, G], float64, of the scales s that minimise (w - s . levels) H (w - s . levels)^T, row by row: A s = b."""
    n, k = weight.shape
    groups = k // g
    by_group = levels.view(n, groups, g)
    normal = torch.empty(n, groups, groups)
    wanted = torch.empty(n, groups)
    for group in range(groups):
        pulled = by_group[:, group] @ hessian[group * g : (group + 1) * g]  # [N, K]
        normal[:, group] = (pulled.view(n, groups, g) * by_group).sum(-1)
        wanted[:, group] = (pulled * weight).sum(-1)
    return normal.double(), wanted.double()


def _loss(normal: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
    """What scales [N, G] lose in each row, less w H w^T."""
    s = scale.double()
    return torch.einsum("ng,ngh,nh->n", s, normal, s) - 2 * (s * wanted).sum(1)
