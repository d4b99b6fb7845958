"""Rows that make up for one another: what each aims at against float64 by elimination, what errors cost, and folds of what counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.calibration import rows as rows_module
from octavo.calibration.awq import Scaling
from octavo.calibration.folds import find_folds
from octavo.calibration.gptq import gptq, gptq_for
from octavo.calibration.grid import Grid
from octavo.calibration.importance import find_importance
from octavo.calibration.rows import round_rows
from octavo.calibration.sites import find_sites
from octavo.calibration.solve import rescaled
from octavo.kernels.grouped_linear import GroupedWeight, dequantize

from .architectures import VOCAB, make
from .test_float_model import opened

GRID = Grid(4, 16)


def moments(size: int, seed: int, rows: int = 400) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=draw) @ torch.randn(size, size, generator=draw) * torch.rand(size, generator=draw)
    return x.t() @ x / rows


def cost(weight: Tensor, found: GroupedWeight, hessian: Tensor, gradients: Tensor) -> float:
    error = weight.double() - dequantize(found, torch.float64)
    return float(((gradients.double() @ error) @ hessian.double() * error).sum())


@pytest.mark.parametrize("seed", range(3))
def test_each_aims_at_what_makes_up_best_for_those_before(seed: int) -> None:
    """Of the rows still free, what costs least in all, from the normal equations."""
    weight, given = torch.randn(70, 32, generator=torch.Generator().manual_seed(seed)), moments(70, seed)
    aims: list[Tensor] = []
    solve = gptq_for(moments(32, seed + 9), GRID)

    def rounded(rows: Tensor) -> GroupedWeight:
        aims.append(rows)
        return solve(rows)

    found = round_rows(weight, [given], rounded)
    order = torch.argsort(given.diagonal(), descending=True)
    exact = given.double() + rows_module._DAMP * given.double().diagonal().mean() * torch.eye(70).double()
    exact, error = exact[order][:, order], (weight.double() - dequantize(found, torch.float64))[order]
    at = 0
    for aim in aims:
        free = slice(at, None)
        best = -torch.linalg.solve(exact[free, free], exact[free, :at] @ error[:at])  # errors of the free rows
        expected = weight.double()[order][free][: len(aim)] - best[: len(aim)]
        torch.testing.assert_close(aim.double(), expected, rtol=1e-3, atol=1e-3)
        at += len(aim)
    assert at == 70
    assert len(aims) == 5  # the last has what is left


@pytest.mark.parametrize("parts", [1, 2])
def test_errors_cost_less_where_outputs_go_together(parts: int) -> None:
    draw = torch.Generator().manual_seed(1)
    weight, hessian, size = torch.randn(128, 64, generator=draw), moments(64, 2), 128 // parts
    gradients = [moments(size, 3 + part, rows=2 * size) for part in range(parts)]
    whole = torch.block_diag(*gradients)
    together = round_rows(weight, gradients, gptq_for(hessian, GRID))
    assert cost(weight, together, hessian, whole) < 0.7 * cost(weight, gptq(weight, hessian, GRID), hessian, whole)


def test_rows_that_do_not_go_together_are_rounded_as_by_themselves() -> None:
    draw = torch.Generator().manual_seed(4)
    weight, hessian = torch.randn(50, 64, generator=draw), moments(64, 5)
    alone = gptq(weight, hessian, GRID)
    for diagonal in (torch.rand(50, generator=draw), torch.zeros(50)):
        found = round_rows(weight, [diagonal.diag()], gptq_for(hessian, GRID))
        assert torch.equal(dequantize(found), dequantize(alone))


def test_rows_without_a_factor_are_rounded_as_by_themselves() -> None:
    weight, hessian = torch.randn(20, 64, generator=torch.Generator().manual_seed(6)), moments(64, 7)
    indefinite = torch.full((20, 20), 1e7).fill_diagonal_(1.0)  # as no moments are, but by rounding
    found = round_rows(weight, [indefinite], gptq_for(hessian, GRID))
    assert torch.equal(dequantize(found), dequantize(gptq(weight, hessian, GRID)))


def test_a_fold_that_divides_outputs_multiplies_what_counts_of_them(tmp_path: Path) -> None:
    make("llama", tmp_path)
    tokens = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(5))
    model = opened(tmp_path)
    before = find_importance(model, tokens, seed=1)[0].on(torch.device("cpu")).outputs
    block = model.load_block(0)
    hidden, calls = model.calls(tokens)

    def run() -> Tensor:
        return calls[0].run(block, hidden)

    folds = [fold for fold in find_folds(block, find_sites(block, run), run) if fold.kind == "linear"]
    assert {fold.feeder for fold in folds} == {"self_attn.v_proj.weight", "mlp.up_proj.weight"}
    draw = torch.Generator().manual_seed(2)
    scalings = {fold.feeder: Scaling(torch.rand(fold.num_factors, generator=draw) + 0.5, 0.9) for fold in folds}
    found = rescaled(before, folds, scalings)
    for fold in folds:
        fold.apply(block, scalings[fold.feeder].factors)
    changed = {name: value.data.clone() for name, value in block.named_parameters()}
    load = model.load_all
    model.load_all = lambda: (load(), [block.get_parameter(name).data.copy_(value) for name, value in changed.items()])  # type: ignore[method-assign]
    after = find_importance(model, tokens, seed=1)[0].on(torch.device("cpu")).outputs
    for site, parts in after.items():
        expected = torch.block_diag(*found[site])
        got = torch.block_diag(*parts) * expected.diagonal().mean()
        if site.parameter not in scalings:
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        assert float((got - expected).norm() / expected.norm()) < 0.2  # a token counts by the size of its gradient, which changes too
    untouched = rescaled(before, folds, {name: Scaling(scaling.factors, 1.0) for name, scaling in scalings.items()})
    assert all(untouched[site] is before[site] for site in before)
