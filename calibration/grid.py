"""Where quantized weights may lie: a scale and a zero point a group of inputs, and the search for them. Knows no format and no model.

    w[n, k] = scale[n, k // g] * (code[n, k] - zero[n, k // g])

Scales are rounded to the dtype they are written in before any code is found, so that what is judged is what will be read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.grouped_linear import GroupedWeight

_BLOCK = 1 << 18  # weights searched at once: small enough for caches, large enough for torch
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.68, 0.6)
_ROUNDS = 2  # of least squares after the shrinks


@dataclass(frozen=True)
class Grid:
    """The form of quantized weights. A symmetric one has the zero point 2**(bits - 1) everywhere, and scales of either sign."""

    bits: int
    group_size: int
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float16
    lowest_zero: int = 0  # 1 for GPTQ's first layout, which stores zero points less one

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits) - 1

    @property
    def middle(self) -> int:
        return int(2 ** (self.bits - 1))


@dataclass(frozen=True, eq=False)
class Ranges:
    """Scale and zero point of groups, float32 [...]: scales exact in the grid's dtype and never 0, zero points whole."""

    scale: Tensor
    zero: Tensor


def encode(groups: Tensor, ranges: Ranges, grid: Grid) -> Tensor:
    """The nearest codes, float32 [..., g], of `groups` [..., g] under ranges [...]."""
    return torch.round(groups / ranges.scale[..., None] + ranges.zero[..., None]).clamp_(0, grid.top)


def decode(codes: Tensor, ranges: Ranges) -> Tensor:
    """The weights [..., g] that codes stand for."""
    return (codes - ranges.zero[..., None]) * ranges.scale[..., None]


def min_max(groups: Tensor, grid: Grid) -> Ranges:
    """Ranges that hold every weight of `groups` [..., g], widened to hold 0; symmetric ones hold the larger side at the code 0."""
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    return _ranges(low, high, grid)


def _ranges(low: Tensor, high: Tensor, grid: Grid) -> Ranges:
    if grid.symmetric:
        larger = torch.where(-low >= high, -low, -high)  # the side that has one code more
        scale = writable(larger / grid.middle, grid)
        return Ranges(scale, torch.full_like(scale, grid.middle))
    scale = writable((high - low) / grid.top, grid)
    return Ranges(scale, torch.round(-low / scale).clamp_(grid.lowest_zero, grid.top))


def writable(scale: Tensor, grid: Grid) -> Tensor:
    """`scale` as it will be read back: rounded to the grid's dtype, kept from its ends, and 1 where it would be 0."""
    limits = torch.finfo(grid.scale_dtype)
    rounded = scale.clamp(-limits.max, limits.max).to(grid.scale_dtype).float()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def search(groups: Tensor, importance: Tensor, grid: Grid) -> Ranges:
    """The ranges with the least sum of `importance * (w - quantized w)**2` among those tried, for `groups` float32 [N, G, g].

    `importance` [N or 1, G, g], such as the mean square of each input. Tried: ranges shrunk together; then, with the codes found, the
    scale by least squares for zero points to both sides. Never worse than `min_max` under the same measure.
    """
    rows = max(1, _BLOCK // (groups.shape[1] * groups.shape[2]))
    parts = []
    for at in range(0, groups.shape[0], rows):
        weights = importance if importance.shape[0] == 1 else importance[at : at + rows]
        parts.append(_search(groups[at : at + rows], weights, grid))
    return Ranges(torch.cat([part.scale for part in parts]), torch.cat([part.zero for part in parts]))


def _search(groups: Tensor, importance: Tensor, grid: Grid) -> Ranges:
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    best = _Best(groups, importance, grid)
    for shrink in _SHRINKS:
        best.offer(_ranges(low * shrink, high * shrink, grid))
    if grid.symmetric:
        for _ in range(_ROUNDS):
            best.offer(best.fitted(0))
        return best.ranges
    for shrink in _SHRINKS[2:6:2]:
        best.offer(_ranges(low * shrink, high, grid))
        best.offer(_ranges(low, high * shrink, grid))
    for _ in range(_ROUNDS):
        for step in (0, 1, -1):
            best.offer(best.fitted(step))
    return best.ranges


class _Best:
    """The best ranges so far, group by group."""

    def __init__(self, groups: Tensor, importance: Tensor, grid: Grid) -> None:
        self._groups, self._importance, self._grid = groups, importance, grid
        self._loss = torch.full(groups.shape[:-1], torch.inf)
        self.ranges = Ranges(torch.ones_like(self._loss), torch.zeros_like(self._loss))

    def offer(self, ranges: Ranges) -> None:
        error = decode(encode(self._groups, ranges, self._grid), ranges).sub_(self._groups)
        loss = error.square_().mul_(self._importance).sum(-1)
        better = loss < self._loss
        self._loss = torch.where(better, loss, self._loss)
        self.ranges = Ranges(torch.where(better, ranges.scale, self.ranges.scale), torch.where(better, ranges.zero, self.ranges.zero))

    def fitted(self, step: int) -> Ranges:
        """The best codes, their zero points moved by `step`, under the scale that fits them best."""
        zero = self.ranges.zero
        if step:
            zero = (zero + step).clamp_(self._grid.lowest_zero, self._grid.top)
        levels = encode(self._groups, self.ranges, self._grid).sub_(self.ranges.zero[..., None])
        if step:  # what the moved zero point can still reach
            levels = torch.minimum(torch.maximum(levels, -zero[..., None]), self._grid.top - zero[..., None])
        weighted = levels * self._importance
        scale = (weighted * self._groups).sum(-1) / (weighted * levels).sum(-1).clamp_(min=torch.finfo(torch.float32).tiny)
        return Ranges(writable(scale, self._grid), zero)


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """[N, K] as [N, G, g]. Raises ValueError where g does not divide K."""
    if weight.shape[1] % group_size:
        raise ValueError(f"{weight.shape[1]} inputs are not a whole number of groups of {group_size}")
    return weight.reshape(weight.shape[0], -1, group_size)


def to_grouped_weight(codes: Tensor, ranges: Ranges, grid: Grid) -> GroupedWeight:
    """The canonical form of codes float32 [N, G, g] under ranges [N, G]."""
    zeros = None if grid.symmetric else ranges.zero.to(torch.uint8)
    return GroupedWeight(
        codes.flatten(1).to(torch.uint8),
        grid.bits,
        grid.group_size,
        ranges.scale.to(grid.scale_dtype),
        zero=grid.middle if grid.symmetric else 0,
        zeros=zeros,
    )


def round_to_nearest(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> GroupedWeight:
    """Weights float32 [N, K], each rounded by itself. With `importance` [K] its ranges are searched, without they hold every weight."""
    groups = grouped(weight, grid.group_size)
    ranges = min_max(groups, grid) if importance is None else search(groups, importance.reshape(1, -1, grid.group_size), grid)
    return to_grouped_weight(encode(groups, ranges, grid), ranges, grid)
