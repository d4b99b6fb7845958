"""Rows: a weight rounded a few rows at a time, each making up for what those before it lost, where the answer takes them together.

GPTQ lets columns make up for one another, and takes every row by itself. The model's answer does not: with G, the second moments of the
loss' gradient by a linear's output, what a weight's error E costs is about the trace of G E H E^T. Adaptive rounding on both sides: Tseng
et al., 2025, YAQA, arXiv 2505.22988. Knows neither how rows are rounded nor where G comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.grouped_linear import GroupedWeight, dequantize
from .gptq import NotPositiveDefiniteError, inverse_factor

_PARTS = 8  # rows of one part do not make up for one another; 16 parts gain 1 % more of what E costs, in twice the time
_FEWEST = 16  # rows of a part
_DAMP = 0.1  # G comes from few texts, one token drawn at each place


def round_rows(weight: Tensor, gradients: Sequence[Tensor], rounded: Callable[[Tensor], GroupedWeight]) -> GroupedWeight:
    """What becomes of `weight` float32 [N, K] where `rounded` turns rows [R, K] into the nearest that it finds for their inputs.

    `gradients`: G of one part of the rows after the other, [N_i, N_i], which add up to N; between parts nothing is made up for. The order
    within a part is by how much rows count. Rows of a part without a Cholesky factor are rounded by themselves.
    """
    found, at = [], 0
    for moments in gradients:
        found.append(_round_part(weight[at : at + len(moments)], moments, rounded))
        at += len(moments)
    return _joined(found)


def _round_part(weight: Tensor, moments: Tensor, rounded: Callable[[Tensor], GroupedWeight]) -> GroupedWeight:
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    try:
        factor = inverse_factor(moments[order][:, order], _DAMP)
    except NotPositiveDefiniteError:
        return rounded(weight)
    left, size = weight[order], max(_FEWEST, -(-len(weight) // _PARTS))
    found = []
    for start in range(0, len(left), size):
        rows = slice(start, start + size)
        target = left[rows].contiguous()
        found.append(rounded(target))
        error = torch.linalg.solve_triangular(factor[rows, rows].t(), target - dequantize(found[-1]), upper=False)
        left[start + size :].addmm_(factor[rows, start + size :].t(), error, alpha=-1)
    return _joined(found).take(torch.argsort(order))


def _joined(parts: Sequence[GroupedWeight]) -> GroupedWeight:
    """Rows below rows."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zeros=torch.cat(zeros) if zeros else None,
    )
