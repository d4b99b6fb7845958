"""GPTQ: rounds a weight column by column and lets the columns after it make up for the error (Frantar et al., 2022, arXiv 2210.17323).

What differs from the paper and its tools: the ranges of a group are searched when its turn comes, from weights that hold every
correction so far; groups are taken in the order of their importance and columns so within a group, which stays a plain layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..kernels.grouped_linear import GroupedWeight
from .grid import Grid, Ranges, grouped, search, to_grouped_weight

Order = Literal["natural", "groups", "columns"]  # groups: groups and columns within them by importance; columns: all columns so
ORDERS: tuple[Order, ...] = ("natural", "groups", "columns")


DOUBLE_UP_TO = 4096  # inputs: beyond, float64 takes gigabytes, and float32 with more damping where it must


class NotPositiveDefiniteError(ValueError):
    """A Hessian that no damping makes invertible."""


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H with `damp` times its mean diagonal added to it; inputs that were never seen get 1 on the diagonal. float64 is kept."""
    h = hessian.clone()
    diagonal = h.diagonal()
    diagonal[diagonal <= 0] = 1.0
    diagonal += damp * diagonal.mean()
    return h


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor U of the inverse of H, `inv(H) = U.T @ U`; damping is raised tenfold until there is one.

    Raises NotPositiveDefiniteError where that does not help.
    """
    exact = torch.float64 if len(hessian) <= DOUBLE_UP_TO else hessian.dtype
    for _ in range(6):
        try:
            lower = torch.linalg.cholesky(damped(hessian, damp).to(exact))
            factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
            return factor.to(hessian.dtype)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            damp = max(damp, 1e-4) * 10
    raise NotPositiveDefiniteError(f"the inputs' second moments [{len(hessian)}] have no Cholesky factor, even damped")


def order_of(hessian: Tensor, group_size: int, order: Order) -> Tensor:
    """The columns in the order in which they are rounded, int64 [K]."""
    k = len(hessian)
    if order == "natural":
        return torch.arange(k)
    weight = hessian.diagonal()
    if order == "columns":
        return torch.argsort(weight, descending=True, stable=True)
    by_group = weight.reshape(-1, group_size)
    columns = torch.argsort(by_group, dim=1, descending=True, stable=True) + torch.arange(0, k, group_size)[:, None]
    return columns[torch.argsort(by_group.sum(1), descending=True, stable=True)].flatten()


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, *, order: Order = "groups", damp: float = 0.01) -> GroupedWeight:
    """Codes and ranges of `weight` float32 [N, K] for inputs x with `hessian` = mean of x x^T, float32 [K, K].

    Minimises sum over rows of (w - q) H (w - q)^T greedily. With order "columns", ranges are searched from the weight as it is, since
    columns of one group are then far apart; else when a group's turn comes. Raises ValueError for a K that groups do not divide,
    NotPositiveDefiniteError.
    """
    return gptq_for(hessian, grid, order=order, damp=damp)(weight)


def gptq_for(hessian: Tensor, grid: Grid, *, order: Order = "groups", damp: float = 0.01) -> Callable[[Tensor], GroupedWeight]:
    """`gptq` of any rows, float32 [N, K], for inputs with this hessian [K, K]: what hangs on the inputs alone is computed once. Raises
    NotPositiveDefiniteError; what it gives raises ValueError for a K that groups do not divide."""
    columns = order_of(hessian, grid.group_size, order)
    factor = inverse_factor(hessian[columns][:, columns], damp)

    def solve(weight: Tensor) -> GroupedWeight:
        given = None
        if order == "columns":
            given = search(grouped(weight, grid.group_size), hessian.diagonal().reshape(1, -1, grid.group_size), grid)
        return _solve(weight, columns, factor, grid, given)

    return solve


def _solve(weight: Tensor, columns: Tensor, factor: Tensor, grid: Grid, given: Ranges | None) -> GroupedWeight:
    (n, k), g = weight.shape, grid.group_size
    left = weight.t()[columns].contiguous()  # [K, N]: a column of the weight is a row here, and contiguous
    codes = torch.empty(k, n)
    scale, zero = torch.empty(n, k // g), torch.empty(n, k // g)
    errors = torch.empty(g, n)
    for start in range(0, k, g):
        stop = start + g
        block, triangle = left[start:stop], factor[start:stop, start:stop]
        if given is None:
            group = int(columns[start]) // g
            importance = triangle.diagonal().square().reciprocal()
            found = search(block.t().unsqueeze(1).contiguous(), importance.reshape(1, 1, g), grid)
            scale[:, group], zero[:, group] = found.scale[:, 0], found.zero[:, 0]
            own = [(scale[:, group].clone(), zero[:, group].clone())] * g
        else:
            own = [(given.scale[:, column // g], given.zero[:, column // g]) for column in columns[start:stop].tolist()]
        for i, (s, z) in enumerate(own):
            row = block[i]
            code = torch.round(row / s + z).clamp_(0, grid.top)
            codes[start + i] = code
            error = (row - (code - z) * s) / triangle[i, i]
            errors[i] = error
            if i + 1 < g:
                block[i + 1 :].addr_(triangle[i, i + 1 :], error, alpha=-1)
        if stop < k:
            left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    natural = torch.empty_like(codes)
    natural[columns] = codes
    ranges = given or Ranges(scale, zero)
    return to_grouped_weight(natural.t().reshape(n, -1, g), ranges, grid)
