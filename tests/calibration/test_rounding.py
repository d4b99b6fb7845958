"""Grids, GPTQ and AWQ against plain float64 implementations, on fresh random matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.calibration import refine as refine_file
from octavo.calibration.awq import fit_scales, output_error, search_scales
from octavo.calibration.gptq import ORDERS, NotPositiveDefiniteError, damped, gptq, inverse_factor, order_of
from octavo.calibration.grid import Grid, decode, encode, grouped, min_max, round_to_nearest, search
from octavo.calibration.refine import refine, refine_codes, refine_nearest, refine_scales
from octavo.kernels.grouped_linear import GroupedWeight, dequantize

GRIDS = [
    Grid(4, 32),
    Grid(4, 16, symmetric=True),
    Grid(8, 32, symmetric=True, scale_dtype=torch.bfloat16),
    Grid(4, 32, lowest_zero=1),
    Grid(2, 16),
]


def matrix(n: int, k: int, seed: int) -> torch.Tensor:
    """Heavy tails, rows and columns of many sizes."""
    draw = torch.Generator().manual_seed(seed)
    values = (
        torch.randn(n, k, generator=draw) * torch.exp(torch.randn(n, 1, generator=draw)) * torch.exp(0.5 * torch.randn(k, generator=draw))
    )
    return values * (1 + 5 * (torch.rand(n, k, generator=draw) > 0.99))


def inputs(rows: int, k: int, seed: int) -> torch.Tensor:
    """Correlated channels, a few of them large."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, k, generator=draw) @ torch.randn(k, k, generator=draw) / k**0.5
    return mixed * torch.exp(torch.randn(k, generator=draw))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15)
def test_searched_ranges_are_never_worse_and_can_be_written(grid: Grid, seed: int) -> None:
    groups = grouped(matrix(7, 96, seed), grid.group_size)
    importance = torch.rand(1, *groups.shape[1:], generator=torch.Generator().manual_seed(seed)) + 1e-3

    def loss(ranges: object) -> torch.Tensor:
        return (decode(encode(groups, ranges, grid), ranges) - groups).square().mul(importance).sum(-1)  # type: ignore[arg-type]

    found = search(groups, importance, grid)
    assert bool((loss(found) <= loss(min_max(groups, grid)) * (1 + 1e-6)).all())
    assert torch.equal(found.scale, found.scale.to(grid.scale_dtype).float())
    assert bool((found.scale != 0).all())
    assert torch.equal(found.zero, found.zero.round())
    assert bool((found.zero >= (grid.middle if grid.symmetric else grid.lowest_zero)).all() and (found.zero <= grid.top).all())


@pytest.mark.parametrize("value", [0.0, 3e-9, 1e30, -2.0])
def test_groups_of_one_value(value: float) -> None:
    grid = Grid(4, 16)
    weight = torch.full((2, 32), value)
    found = dequantize(round_to_nearest(weight, grid, torch.ones(32)))
    assert bool(torch.isfinite(found).all())
    if abs(value) < 60000:
        torch.testing.assert_close(found, weight, atol=1e-7, rtol=1e-3)


def test_symmetric_scales_take_either_sign() -> None:
    """Eight codes lie below zero and seven above: the larger side is given the eight."""
    weight = torch.tensor([[8.0, -7.0, 3.0, 1.0], [-8.0, 7.0, 3.0, 1.0]])
    found = round_to_nearest(weight, Grid(4, 4, symmetric=True))
    assert found.scale.flatten().tolist() == [-1.0, 1.0]
    assert torch.equal(dequantize(found), weight)


def paper_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int, order: torch.Tensor
) -> torch.Tensor:
    """Codes by the paper's equations, one column at a time in float64, the inverse updated by elimination: no Cholesky, no blocks."""
    w = weight.double()[:, order].clone()
    inverse = torch.linalg.inv(hessian.double()[order][:, order])
    codes = torch.empty_like(w)
    for i in range(w.shape[1]):
        s, z = scale[:, order[i]].double(), zero[:, order[i]].double()
        codes[:, i] = (w[:, i] / s + z).round().clamp(0, top)
        error = (w[:, i] - (codes[:, i] - z) * s) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        inverse -= inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
    natural = torch.empty_like(codes)
    natural[:, order] = codes
    return natural


@pytest.mark.parametrize("seed", range(4))
def test_gptq_is_the_papers(seed: int) -> None:
    grid = Grid(4, 16)
    weight, x = matrix(24, 64, seed), inputs(400, 64, seed)
    hessian = x.t() @ x / len(x)
    found = gptq(weight, hessian, grid, order="columns", damp=0.01)
    assert found.zeros is not None
    spread = [tensor.float().repeat_interleave(16, dim=1) for tensor in (found.scale, found.zeros)]
    expected = paper_gptq(weight, damped(hessian, 0.01), *spread, grid.top, order_of(hessian, 16, "columns"))
    assert float((found.codes != expected).float().mean()) < 0.002  # a tie in float32 may fall the other way


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_beats_rounding_to_nearest(order: str, grid: Grid) -> None:
    weight, x = matrix(24, 64, 5), inputs(400, 64, 5)
    hessian = x.t() @ x / len(x)
    nearest = round_to_nearest(weight, grid, hessian.diagonal())
    found = gptq(weight, hessian, grid, order=order)  # type: ignore[arg-type]
    assert output_error(weight, dequantize(found), hessian) < 0.8 * output_error(weight, dequantize(nearest), hessian)


def test_a_singular_hessian_is_damped() -> None:
    x = inputs(5, 64, 1)  # five tokens
    found = gptq(matrix(8, 64, 1), x.t() @ x / 5, Grid(4, 16), damp=0.0)
    assert bool(torch.isfinite(dequantize(found)).all())


def test_a_hessian_that_is_none_is_said() -> None:
    with pytest.raises(NotPositiveDefiniteError, match="no Cholesky factor"):
        inverse_factor(torch.full((4, 4), torch.nan), 0.01)


def test_output_error_is_that_of_the_outputs() -> None:
    weight, other, x = matrix(8, 32, 1), matrix(8, 32, 2), inputs(100, 32, 1)
    exact = (x.double() @ (other - weight).double().t()).square().sum(1).mean()
    assert output_error(weight, other, x.t() @ x / 100) == pytest.approx(float(exact), rel=1e-4)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10)
def test_awq_is_never_worse_than_no_scaling(seed: int) -> None:
    weights, x = [matrix(12, 64, seed), matrix(8, 64, seed + 1)], inputs(200, 64, seed)
    hessian, grid = x.t() @ x / 200, Grid(4, 32)
    source = torch.arange(64) // 2  # two channels share a factor
    found = search_scales(weights, hessian, x.abs().mean(0), source, 32, grid)

    def error(factors: torch.Tensor) -> float:
        spread = factors[source]
        return sum(
            output_error(w, dequantize(round_to_nearest(w * spread, grid, hessian.diagonal() / spread.square())) / spread, hessian)
            for w in weights
        )

    assert found.relative_error <= 1
    assert error(found.factors) / error(torch.ones(32)) == pytest.approx(found.relative_error, rel=1e-3)


def test_awq_protects_a_channel_of_large_inputs() -> None:
    x = inputs(400, 64, 3)
    x[:, 5] *= 300
    hessian = x.t() @ x / len(x)
    found = search_scales([matrix(16, 64, 3)], hessian, x.abs().mean(0), torch.arange(64), 64, Grid(4, 32))
    assert found.relative_error < 0.9
    assert found.factors[5] > 2 * found.factors.median()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_refining_never_loses_and_mostly_wins(grid: Grid) -> None:
    weight, x = matrix(24, 64, 7), inputs(400, 64, 7)
    hessian = x.t() @ x / len(x)
    start = gptq(weight, hessian, grid)
    found = refine(weight, hessian, start, rounds=2)
    before, after = (output_error(weight, dequantize(q), hessian) for q in (start, found))
    assert after < 0.97 * before
    assert found.scale.dtype == grid.scale_dtype
    assert int(found.codes.max()) <= grid.top
    for step in (refine_codes(weight, hessian, start, sweeps=1), refine_scales(weight, hessian, start)):
        assert output_error(weight, dequantize(step), hessian) <= before * (1 + 1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ranges_of_nearest_codes_make_up_for_what_inputs_do_together(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = matrix(64, 64, 8), inputs(400, 64, 8)
    hessian = x.t() @ x / len(x)
    start = round_to_nearest(weight, grid, hessian.diagonal())

    def errors(quantized: GroupedWeight) -> torch.Tensor:  # row by row, on the inputs themselves
        return ((dequantize(quantized) - weight).double() @ x.t().double()).square().sum(1)

    once, found = (refine_nearest(weight, hessian, start, rounds=rounds) for rounds in (0, 3))
    assert bool((errors(once) <= errors(start) * (1 + 1e-4)).all())
    assert bool((errors(found) <= errors(once) * (1 + 1e-4)).all())
    assert float((errors(once) / errors(start)).log().mean()) < -0.01
    assert float((errors(found) / errors(once)).log().mean()) < -0.005
    assert found.scale.dtype == grid.scale_dtype
    assert int(found.codes.max()) <= grid.top
    monkeypatch.setattr(refine_file, "_ROWS", 7)
    again = refine_nearest(weight, hessian, start, rounds=3)
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(again.scale, found.scale)


def test_refined_codes_cannot_be_bettered_one_by_one() -> None:
    grid, weight, x = Grid(4, 8), matrix(3, 16, 9), inputs(200, 16, 9)
    hessian = x.t() @ x / len(x)
    found = refine_codes(weight, hessian, round_to_nearest(weight, grid), sweeps=30)
    least = output_error(weight, dequantize(found), hessian)
    for row in range(3):
        for column in range(16):
            for code in range(16):
                codes = found.codes.clone()
                codes[row, column] = code
                assert output_error(weight, dequantize(replace(found, codes=codes)), hessian) >= least * (1 - 1e-5)


def test_refined_scales_are_least_squares() -> None:
    """Against numpy's, in float64, on inputs themselves in place of their moments."""
    grid, weight, x = Grid(4, 16, scale_dtype=torch.float32), matrix(5, 64, 11), inputs(300, 64, 11)
    start = round_to_nearest(weight, grid)
    found = refine_scales(weight, x.t() @ x / 300, start)
    assert start.zeros is not None
    levels = (start.codes.view(5, 4, 16).float() - start.zeros.float()[..., None]).double()
    for row in range(5):
        design = torch.stack([x.view(300, 4, 16)[:, group].double() @ levels[row, group] for group in range(4)], dim=1)
        expected = torch.linalg.lstsq(design, x.double() @ weight[row].double()).solution
        torch.testing.assert_close(found.scale[row].double(), expected, rtol=3e-3, atol=0)


def test_fitted_scales_shrink_what_rounding_costs() -> None:
    weights, x = [matrix(40, 64, 13), matrix(24, 64, 14)], inputs(300, 64, 13)
    hessian, grid = x.t() @ x / 300, Grid(4, 32)
    found = fit_scales(weights, hessian.diagonal(), torch.arange(64), 64, grid)
    assert found.relative_error < 0.8

    def error(spread: torch.Tensor) -> float:
        return sum(output_error(w, dequantize(round_to_nearest(w * spread, grid)) / spread, hessian) for w in weights)

    assert error(found.factors) < 0.8 * error(torch.ones(64))
