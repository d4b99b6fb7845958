"""Rows: a weight rounded a few rows at a time, each making up for what those before it lost, where the answer takes them together.

GPTQ lets columns make up for one another, and takes every row by itself. The model's answer does not: with G, the second moments of the
loss' gradient by a linear's output, what a weight's error E costs is about the trace of G E H E^T. Adaptive rounding on both sides: Tseng
et al., 2025, YAQA, arXiv 2505.22988. Knows neither how rows are rounded nor where G comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.grouped_linear import GroupedWeight, dequantize
from .gptq import NotPositiveDefiniteError, inverse_factor

_SLICES = 8  # whose rows do not make up for one another; 16 gain 1 % more of what E costs, in twice the time
_FEWEST = 16  # rows of a slice
_DAMP = 0.1  # at each place one token is drawn of all that may follow


def round_rows(weight: Tensor, gradients: Sequence[Tensor], num_tokens: int, rounded: Callable[[Tensor], GroupedWeight]) -> GroupedWeight:
    """What becomes of `weight` float32 [N, K] where `rounded` turns rows [R, K] into the nearest that it finds for their inputs.

    `gradients`: G of one part of the rows after the other, float32 [N_i, N_i], which add up to N, in any unit; between parts nothing is
    made up for. It was found from `num_tokens`: the fewer, the less is made of it. The order within a part is by how much rows count.
    Rows of a part without a Cholesky factor are rounded by themselves.
    """
    parts, at = [], 0
    for moments in gradients:
        parts.append(_Part(weight[at : at + len(moments)], moments, num_tokens))
        at += len(moments)
    found: list[GroupedWeight] = []
    while any(part.is_left for part in parts):  # a slice of each part at once: the fewer calls, the faster
        targets = [part.targets for part in parts]
        found.append(rounded(torch.cat(targets)))
        errors = torch.cat(targets) - dequantize(found[-1])
        for part, error in zip(parts, torch.split(errors, [len(target) for target in targets]), strict=True):
            part.make_up_for(error)
    return _joined(found).take(_places(parts))


class _Part:
    """Rows that make up for one another, and how far they are rounded."""

    def __init__(self, weight: Tensor, moments: Tensor, num_tokens: int) -> None:
        self.order = torch.argsort(moments.diagonal(), descending=True, stable=True)
        self._left, self._at = weight[self.order], 0
        self._factor: Tensor | None = None
        with suppress(NotPositiveDefiniteError):
            self._factor = inverse_factor(moments[self.order][:, self.order], _DAMP + len(moments) / num_tokens)
        self.size = len(weight) if self._factor is None else max(_FEWEST, -(-len(weight) // _SLICES))

    @property
    def is_left(self) -> bool:
        return self._at < len(self._left)

    @property
    def targets(self) -> Tensor:
        """What the next rows are to become, [R, K]; none where all are done."""
        return self._left[self._at : self._at + self.size]

    def make_up_for(self, error: Tensor) -> None:
        """The next rows became their targets less `error`."""
        rows = slice(self._at, self._at + len(error))
        self._at = rows.stop
        if self._factor is not None and self.is_left:
            spread = torch.linalg.solve_triangular(self._factor[rows, rows].t(), error, upper=False)
            self._left[rows.stop :].addmm_(self._factor[rows, rows.stop :].t(), spread, alpha=-1)


def _places(parts: Sequence[_Part]) -> Tensor:
    """Where the rows of the weight are among those that were rounded, slice by slice of all parts, int64 [N]."""
    done: list[Tensor] = []
    for number in range(max(-(-len(part.order) // part.size) for part in parts)):
        at = 0
        for part in parts:
            done.append(part.order[number * part.size : (number + 1) * part.size] + at)
            at += len(part.order)
    return torch.argsort(torch.cat(done))


def _joined(parts: Sequence[GroupedWeight]) -> GroupedWeight:
    """Rows below rows."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zeros=torch.cat(zeros) if zeros else None,
    )
