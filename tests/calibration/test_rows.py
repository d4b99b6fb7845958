"""Rows that make up for one another: what each aims at against float64 by elimination, what errors cost, and folds of what counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.calibration import quantize_run, walk
from octavo.calibration import rows as rows_module
from octavo.calibration.awq import Scaling
from octavo.calibration.folds import find_folds
from octavo.calibration.gptq import Order, gptq, gptq_for
from octavo.calibration.grid import Grid
from octavo.calibration.importance import Importance, find_importance
from octavo.calibration.moments import Moments
from octavo.calibration.recipe import Recipe
from octavo.calibration.rows import round_rows
from octavo.calibration.sites import Site, find_sites
from octavo.calibration.solve import Solved, Steps, apply_scales, rescaled, solve_group
from octavo.kernels.grouped_linear import GroupedWeight, dequantize

from .architectures import VOCAB, make
from .test_float_model import opened
from .test_quantize import FAST, with_tokenizer

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

    found = round_rows(weight, [given], 400, rounded)
    order = torch.argsort(given.diagonal(), descending=True)
    exact = given.double() + (rows_module._DAMP + 70 / 400) * given.double().diagonal().mean() * torch.eye(70).double()
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
    together = round_rows(weight, gradients, 2 * size, gptq_for(hessian, GRID))
    assert cost(weight, together, hessian, whole) < 0.7 * cost(weight, gptq(weight, hessian, GRID), hessian, whole)


def test_parts_of_any_size_are_rounded_as_each_would_be_alone() -> None:
    draw = torch.Generator().manual_seed(1)
    weight, hessian, sizes = torch.randn(210, 64, generator=draw), moments(64, 2), (150, 10, 50)
    gradients = [moments(size, size) for size in sizes]
    solve = gptq_for(hessian, GRID)
    calls: list[int] = []

    def rounded(rows: Tensor) -> GroupedWeight:
        calls.append(len(rows))
        return solve(rows)

    found = dequantize(round_rows(weight, gradients, 300, rounded))
    assert calls == [19 + 10 + 16, 19 + 16, 19 + 16, 19 + 2, 19, 19, 19, 17]
    for rows, given in zip(weight.split(sizes), gradients, strict=True):
        alone = dequantize(round_rows(rows, [given], 300, solve))
        assert torch.equal(found[: len(rows)], alone)
        found = found[len(rows) :]


def test_what_few_tokens_tell_costs_little_where_it_is_wrong() -> None:
    """Outputs that do not go together at all, seen over fewer tokens than there are outputs."""
    draw = torch.Generator().manual_seed(3)
    weight, hessian = torch.randn(256, 64, generator=draw), moments(64, 2)
    seen = torch.randn(128, 256, generator=draw)
    together = round_rows(weight, [seen.t() @ seen / 128], 128, gptq_for(hessian, GRID))
    assert cost(weight, together, hessian, torch.eye(256)) < 1.15 * cost(weight, gptq(weight, hessian, GRID), hessian, torch.eye(256))


@pytest.mark.parametrize("orders", [("groups",), ("groups", "columns")])
def test_a_solver_that_is_given_them_takes_them(orders: tuple[Order, ...]) -> None:
    draw = torch.Generator().manual_seed(5)
    x, weight, gradients = torch.randn(4000, 64, generator=draw), torch.randn(96, 64, generator=draw), moments(96, 6)
    seen = Moments(64)
    seen.add(x)
    steps = Steps(orders=orders)
    (alone,), (together,) = (solve_group([weight], seen, GRID, steps, given) for given in (None, [gradients]))
    assert cost(weight, together.weight, seen.hessian, gradients) < 0.7 * cost(weight, alone.weight, seen.hessian, gradients)
    assert together.how.startswith("gptq, ")


def test_the_walk_hands_a_solver_what_counts_of_its_outputs_as_they_are_rescaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_tokenizer("llama", tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i * i % 977} are numbers.\n" for i in range(600)))
    found: list[Importance] = []
    scaled: list[Mapping[str, Scaling]] = []
    given: list[tuple[Tensor, Sequence[Tensor] | None]] = []

    def finding(*args: Any, **options: Any) -> list[Importance]:
        found.extend(find_importance(*args, **options))
        return found

    def scaling(*args: Any) -> Mapping[str, Scaling]:
        scaled.append(apply_scales(*args))
        return scaled[-1]

    def solving(weights: Sequence[Tensor], seen: Any, grid: Grid, steps: Steps, gradients: Sequence[Tensor] | None) -> list[Solved]:
        given.append((weights[0].clone(), gradients))
        return solve_group(weights, seen, grid, steps, gradients)

    monkeypatch.setattr(quantize_run, "find_importance", finding)
    monkeypatch.setattr(walk, "apply_scales", scaling)
    monkeypatch.setattr(walk, "solve_group", solving)
    quantize_run.quantize(str(model), tmp_path / "out", **FAST, method="auto", calibration=str(text))
    names = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert len(given) == 2 * len(names)
    for number, (weight, gradients) in enumerate(given):
        block, name = divmod(number, len(names))
        parameter = f"{names[name]}.weight"
        expected = found[block].outputs[Site(parameter)][0].float()
        chosen = scaled[block].get(parameter)
        if chosen is not None and chosen.relative_error < 1:
            expected = expected * chosen.factors[:, None] * chosen.factors
        assert gradients is not None
        assert len(weight) == len(expected)
        torch.testing.assert_close(gradients[0], expected)
    assert any(parameter in scaled[0] for parameter in ("self_attn.v_proj.weight", "mlp.up_proj.weight"))
    given.clear()
    quantize_run.quantize(str(model), tmp_path / "gptq", **FAST, method="gptq", calibration=str(text))
    assert all(gradients is None for _, gradients in given)


def test_the_disk_is_counted_for_what_is_weighed_and_not_quantized(tmp_path: Path) -> None:
    model, recipe = with_tokenizer("llama", tmp_path), Recipe(method="auto", samples=8, seqlen=32, calibration="self")
    whole, part = (quantize_run.plan(str(model), one) for one in (recipe, replace(recipe, ignore=("mlp",))))
    left = [one.work_bytes - 2 * int(1.1 * sum(n * k for n, k in one.linears.values())) for one in (whole, part)]
    assert left[0] == left[1] == 2 * sum(n * n for n, _ in whole.linears.values())


def test_rows_that_do_not_go_together_are_rounded_as_by_themselves() -> None:
    draw = torch.Generator().manual_seed(4)
    weight, hessian = torch.randn(50, 64, generator=draw), moments(64, 5)
    alone = gptq(weight, hessian, GRID)
    for diagonal in (torch.rand(50, generator=draw), torch.zeros(50)):
        found = round_rows(weight, [diagonal.diag()], 400, gptq_for(hessian, GRID))
        assert torch.equal(dequantize(found), dequantize(alone))


def test_rows_without_a_factor_are_rounded_as_by_themselves() -> None:
    weight, hessian = torch.randn(20, 64, generator=torch.Generator().manual_seed(6)), moments(64, 7)
    indefinite = torch.full((20, 20), 1e7).fill_diagonal_(1.0)  # as no moments are, but by rounding
    found = round_rows(weight, [indefinite], 400, gptq_for(hessian, GRID))
    assert torch.equal(dequantize(found), dequantize(gptq(weight, hessian, GRID)))


def test_a_fold_that_divides_outputs_multiplies_what_counts_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def load_changed() -> None:
        load()
        for name, value in changed.items():
            block.get_parameter(name).data.copy_(value)

    monkeypatch.setattr(model, "load_all", load_changed)
    after = find_importance(model, tokens, seed=1)[0].on(torch.device("cpu")).outputs
    for site, parts in after.items():
        expected = torch.block_diag(*found[site])
        got = torch.block_diag(*parts) * expected.diagonal().mean()
        if site.parameter not in scalings:
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        assert float((got - expected).norm() / expected.norm()) < 0.2  # a token counts by the size of its gradient, which changes too
    untouched = rescaled(before, folds, {name: Scaling(scaling.factors, 1.0) for name, scaling in scalings.items()})
    assert all(untouched[site] is before[site] for site in before)
