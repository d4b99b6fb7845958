"""From a block's weights and the moments of their inputs to quantized weights: which method does what. Knows no model and no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..kernels.grouped_linear import GroupedWeight, dequantize
from .awq import Scaling, fit_scales, output_error, search_scales
from .eight_bit import Granularity, fp8_weight, int8_weight, search_smoothing
from .folds import Fold
from .gptq import DOUBLE_UP_TO, NotPositiveDefiniteError, Order, damped, gptq, gptq_for, inverse_factor
from .grid import Grid, round_to_nearest
from .moments import Collector, Moments
from .refine import refine, refine_nearest
from .rows import round_rows
from .sites import Site

_FIT_DAMP = 0.01
_AIM_DAMP = 0.01
_NEAREST_ROUNDS = 2
FEW_TOKENS = 64  # an expert that saw fewer rounds by itself: the moments of so few tokens would mislead


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What is done to a block.

    `scale`: through the folds, by AWQ's search, or by SmoothQuant's for int8. `orders`, `damps`: of GPTQ, all
    tried; none: nearest. `refine_rounds`: over what GPTQ found.
    `toward_float`: the share, 0 to 1, of what the blocks and sites before lost that a site makes up for, see `aimed`.
    `kind`: of codes; `granularity`: of fp8's scales.
    """

    kind: Literal["grouped", "fp8", "int8"] = "grouped"
    granularity: Granularity = "channel"
    static_inputs: bool = False
    kv_scales: bool = False
    scale: bool = False
    orders: tuple[Order, ...] = ()
    damps: tuple[float, ...] = (0.01,)
    refine_rounds: int = 1
    toward_float: float = 0.0


@dataclass(frozen=True, eq=False)
class Solved:
    """A site's quantized weight, and its mean squared output error relative to the mean squared output, against what was aimed at."""

    weight: GroupedWeight
    relative_error: float
    how: str  # what was chosen, for the report
    num_tokens: int  # that it was chosen by


def apply_scales(
    block: nn.Module, folds: Sequence[Fold], moments: Collector, grids: Mapping[Site, Grid], stored: Mapping[str, torch.dtype], steps: Steps
) -> dict[str, Scaling]:
    """Rescale a block through its folds as the search finds best, moments included; gives what was chosen by feeder.

    Folds without a reader among `grids`, the sites that are quantized, are left alone. `stored`: the dtypes that parameters are written in.
    """
    chosen: dict[str, Scaling] = {}
    for fold in folds:
        readers = [site for site in fold.readers if site in grids]
        if not readers:
            continue
        k = len(fold.source)
        known = max((moments.of(site, k) for site in fold.readers), key=lambda one: one.count)  # of experts each sees but a few tokens
        weights = [site.weight(block) for site in readers]
        scaling = _search(weights, known, fold, grids[readers[0]], steps)
        chosen[fold.feeder] = scaling
        if scaling.relative_error < 1:
            factors = fold.apply(block, scaling.factors, stored=stored.get(fold.feeder))
            for one in {id(found): found for found in (moments.of(site, k) for site in fold.readers)}.values():
                one.rescaled(factors[fold.source])
    return chosen


def rescaled(
    gradients: Mapping[Site, Sequence[Tensor]], folds: Sequence[Fold], scalings: Mapping[str, Scaling]
) -> Mapping[Site, Sequence[Tensor]]:
    """`gradients` as `round_rows` takes them, of linears whose outputs are now divided by what `apply_scales` chose."""
    found = dict(gradients)
    for fold in folds:
        scaling = scalings.get(fold.feeder)
        if fold.kind == "linear" and scaling is not None and scaling.relative_error < 1:
            for site in [site for site in found if site.parameter == fold.feeder]:
                factors = torch.ones(sum(len(part) for part in found[site]))
                factors[fold.start : fold.stop] = scaling.factors
                by_part = torch.split(factors, [len(part) for part in found[site]])
                found[site] = [part * by[:, None] * by for part, by in zip(found[site], by_part, strict=True)]
    return found


def _search(weights: Sequence[Tensor], known: Moments, fold: Fold, grid: Grid, steps: Steps) -> Scaling:
    if steps.kind == "int8":
        return search_smoothing(weights, known.rows, known.largest, fold.source, fold.num_factors, grid.scale_dtype)
    if steps.orders:
        return _fitted(weights, known, fold, grid)
    return search_scales(weights, known.hessian, known.magnitude, fold.source, fold.num_factors, grid)


def _fitted(weights: Sequence[Tensor], known: Moments, fold: Fold, grid: Grid) -> Scaling:
    """Where GPTQ follows, what counts of an input is what the others do not explain."""
    hessian = known.hessian
    try:
        factor = inverse_factor(hessian, _FIT_DAMP)
    except NotPositiveDefiniteError:
        return Scaling(torch.ones(fold.num_factors), 1.0)
    unexplained = factor.square().sum(0).reciprocal()  # 1 / diagonal of the inverse
    return fit_scales(weights, unexplained, fold.source, fold.num_factors, grid)


def solve_group(
    weights: Sequence[Tensor], moments: Moments, grid: Grid, steps: Steps, gradients: Sequence[Tensor] | None = None
) -> list[Solved]:
    """Quantize linears float32 [N_i, K] that share an input. Raises ValueError for weights or inputs that are not finite.

    `gradients`: second moments of the loss' gradient by what they give, as `round_rows` takes them, all rows one below the other.
    """
    stacked = torch.cat(list(weights))
    if not bool(torch.isfinite(stacked).all()):
        raise ValueError("the weights hold NaN or infinite values: the checkpoint is damaged, download it again")
    hessian = moments.hessian
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the inputs hold NaN or infinite values: the float model itself overflows on the calibration text")
    if steps.kind != "grouped":
        return [_eight_bit(weight, hessian, moments.count, grid, steps) for weight in weights]
    if steps.orders and moments.count >= FEW_TOKENS:
        stacked = aimed(stacked, moments, steps.toward_float)
        best, how = _best_gptq(stacked, hessian, moments.count, grid, steps, gradients)
    else:
        best = round_to_nearest(stacked, grid, hessian.diagonal())
        if moments.count >= FEW_TOKENS:
            best = refine_nearest(stacked, damped(hessian, _FIT_DAMP), best, rounds=_NEAREST_ROUNDS)
        how = f"nearest: saw {moments.count} tokens" if steps.orders else "nearest"
    values = dequantize(best)
    solved, at = [], 0
    for weight in weights:
        rows = slice(at, at + len(weight))
        error = _relative_error(stacked[rows], values[rows], hessian)
        solved.append(Solved(best.take(torch.arange(at, rows.stop)), error, how, moments.count))
        at = rows.stop
    return solved


def aimed(weight: Tensor, moments: Moments, share: float) -> Tensor:
    """What `weight` W [N, K] is to become for x, the inputs that quantized blocks give, so that it gives what W gives for m, the float
    model's: W + share * (V - W), where V minimises the mean of ||W m - V x||^2, with a ridge at W. W where no m is known.

    The whole of V shrinks what is noise in x, block after block, and the answers with it (benchmarks/README.md). After GPTAQ (Li et al.,
    2025, arXiv 2504.02692), which corrects while it rounds.
    """
    crossed = moments.crossed
    if crossed is None or not share:
        return weight
    hessian = moments.hessian
    ridged = damped(hessian, _AIM_DAMP)
    exact = torch.float64 if len(hessian) <= DOUBLE_UP_TO else hessian.dtype
    wanted = weight @ crossed + weight * (ridged - hessian).diagonal()
    try:
        best = torch.cholesky_solve(wanted.t().to(exact), torch.linalg.cholesky(ridged.to(exact))).t()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return weight
    return torch.lerp(weight, best.to(weight.dtype), share)


def _relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    energy = float((weight @ hessian).mul_(weight).sum(dtype=torch.float64))
    return output_error(weight, quantized, hessian) / energy if energy > 0 else 0.0


def _eight_bit(weight: Tensor, hessian: Tensor, num_tokens: int, grid: Grid, steps: Steps) -> Solved:
    """Each linear by itself: scales of a tensor are its own."""
    if steps.kind == "fp8":
        found = fp8_weight(weight, steps.granularity, grid.scale_dtype)
    else:
        found = int8_weight(weight, grid.scale_dtype)
    return Solved(found, _relative_error(weight, dequantize(found), hessian), "nearest", num_tokens)


def _best_gptq(
    weight: Tensor, hessian: Tensor, num_tokens: int, grid: Grid, steps: Steps, gradients: Sequence[Tensor] | None
) -> tuple[GroupedWeight, str]:
    ready: list[tuple[Callable[[Tensor], GroupedWeight], str]] = []
    for order in steps.orders:
        for damp in steps.damps:
            how = f"gptq, {order}, damp {damp:g}"
            if gradients is None:  # called once: what it is made ready with need not stay
                ready.append((partial(gptq, hessian=hessian, grid=grid, order=order, damp=damp), how))
            else:
                with suppress(NotPositiveDefiniteError):
                    ready.append((gptq_for(hessian, grid, order=order, damp=damp), how))
    refined_under = damped(hessian, _FIT_DAMP)
    chosen: Counter[str] = Counter()

    def rounded(rows: Tensor) -> GroupedWeight:
        tried: list[tuple[GroupedWeight, str]] = []
        for solve, how in ready:
            with suppress(NotPositiveDefiniteError):
                found = solve(rows)
                tried += [(found, how)] if bool(found.scale.isfinite().all()) else []
        if not tried:
            chosen["nearest: no Cholesky factor"] += len(rows)
            return round_to_nearest(rows, grid, hessian.diagonal())
        best, how = tried[0] if len(tried) == 1 else min(tried, key=lambda one: output_error(rows, dequantize(one[0]), hessian))
        chosen[how] += len(rows)
        return refine(rows, refined_under, best, rounds=steps.refine_rounds)

    solved = rounded(weight) if gradients is None else round_rows(weight, gradients, num_tokens, rounded)
    return solved, chosen.most_common(1)[0][0]
