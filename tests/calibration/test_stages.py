"""The order in which a block's sites are solved, what is seen of each, and what it makes up for: against float64 from plain products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octavo.calibration import budget
from octavo.calibration.moments import Collector, Moments
from octavo.calibration.plan import probe_inputs
from octavo.calibration.quantize_run import quantize
from octavo.calibration.sites import Site
from octavo.calibration.solve import aimed
from octavo.calibration.stages import see_stage, stages_of
from octavo.calibration.walk import structure_of

from .architectures import make
from .test_float_model import opened
from .test_quantize import FAST, with_tokenizer

_ATTENTION, _MLP = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}], [{"gate_proj", "up_proj"}, {"down_proj"}]
STAGES: dict[str, list[set[str]]] = {
    "llama": [*_ATTENTION, *_MLP],
    "gpt2": [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}],
    "phi": [{"q_proj", "k_proj", "v_proj"}, {"dense"}, {"fc1"}, {"fc2"}],
    "mixtral": [*_ATTENTION, {"gate_up_proj"}, {"down_proj"}],
}


@pytest.mark.parametrize("name", STAGES)
def test_what_hangs_on_another_comes_after_it(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    model = opened(tmp_path)
    inputs = probe_inputs(model)
    block = model.load_block(0)
    sites = structure_of(model, inputs, 0, block, with_folds=False)
    wanted = [site for site in sites.sites if site not in sites.routers]
    collector = Collector(wanted)
    hidden = torch.randn(*inputs.shape, *model.hidden_shape)
    with collector.collecting(block), torch.no_grad():
        inputs.call(0).run(block, hidden)
    stages = stages_of(collector.by_input(wanted), block)
    names = [{site.parameter.removesuffix(".weight").rpartition(".")[2] for site in stage} for stage in stages]
    assert names == STAGES[name]
    assert sorted(site for stage in stages for site in stage) == sorted(wanted)
    if name == "mixtral":
        assert [len(stage) for stage in stages[2:]] == [4, 4]


class Experts(nn.Module):
    """Two that are modules of their own, each of two linears, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(2))
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        half = len(x) // 2
        parts: Any = zip(self.experts, (x[:half].clone(), x[half:].clone()), strict=True)
        y = torch.cat([one["down"](one["up"](rows).relu()) for one, rows in parts])
        out: Tensor = self.out(y)
        return out


def test_experts_are_solved_together() -> None:
    block = Experts().requires_grad_(False)
    names = ["experts.0.up", "experts.0.down", "experts.1.up", "experts.1.down", "out"]
    sites = [Site(f"{name}.weight") for name in names]
    collector = Collector(sites)
    with collector.collecting(block):
        block(torch.randn(6, 8))
    assert stages_of(collector.by_input(sites), block) == [[sites[0], sites[2]], [sites[1], sites[3]], [sites[4]]]
    assert not collector.sees_each_token(sites[0], 1, 6)
    assert collector.sees_each_token(sites[4], 1, 6)


class Chain(nn.Module):
    """Three linears, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 4)
        self.reached = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).tanh()).tanh()
        self.reached += 1
        out: Tensor = self.c(y)
        return out


@pytest.mark.parametrize("weighed", [False, True])
def test_inputs_are_seen_as_they_will_be_and_as_they_are_meant(weighed: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    block = Chain().requires_grad_(False)
    a, b = Site("a.weight"), Site("b.weight")
    x, off = torch.randn(5, 7, 8, generator=draw), torch.randn(5, 7, 8, generator=draw)
    sizes = torch.rand(5, 7, generator=draw)
    plain = {a: block.a.weight.clone()}
    solved = {a: block.a.weight + 0.1 * torch.randn(6, 8, generator=draw)}
    runs = [(lambda part=part: block(x[part]), lambda part=part: block((x + 0.2 * off)[part])) for part in (slice(0, 2), slice(2, 5))]
    moments = see_stage(block, [b], plain, solved, {b: sizes} if weighed else {}, runs).of(b, 6)
    assert block.reached == 0  # nothing after b was computed

    bias = block.a.bias.double()
    meant = (x.double().flatten(0, 1) @ plain[a].double().t() + bias).tanh()
    given = ((x + 0.2 * off).double().flatten(0, 1) @ solved[a].double().t() + bias).tanh()
    counts = (sizes if weighed else torch.ones(5, 7)).double().flatten()[:, None]
    torch.testing.assert_close(moments.hessian, ((counts * given).t() @ given / 35).float(), rtol=1e-4, atol=1e-6)
    assert moments.crossed is not None
    torch.testing.assert_close(moments.crossed, ((counts * meant).t() @ given / 35).float(), rtol=1e-4, atol=1e-6)


def test_a_weight_aims_at_what_it_gave_before() -> None:
    draw = torch.Generator().manual_seed(4)
    meant = torch.randn(400, 12, generator=draw) @ torch.randn(12, 12, generator=draw)
    given = meant @ (torch.eye(12) + 0.1 * torch.randn(12, 12, generator=draw)) + 0.3 * torch.randn(400, 12, generator=draw)
    given[:, 5] = meant[:, 5] = 0  # never seen
    weight = torch.randn(3, 12, generator=draw)
    moments = Moments(12)
    moments.add(given[:150], None, meant[:150])
    moments.add(given[150:], None, meant[150:])

    ridge = (
        0.01
        * (given.double().square().sum(0) / 400).where(torch.arange(12) != 5, torch.tensor(1.0, dtype=torch.float64)).mean().sqrt() ** 2
    )
    rows = torch.cat([given.double() / 20, ridge.sqrt() * torch.eye(12)])
    wanted = torch.cat([meant.double() @ weight.double().t() / 20, ridge.sqrt() * weight.double().t()])
    best = torch.linalg.lstsq(rows, wanted).solution.t().float()
    torch.testing.assert_close(aimed(weight, moments, 1.0), best, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(aimed(weight, moments, 0.25), weight + 0.25 * (best - weight), rtol=1e-3, atol=1e-4)
    assert aimed(weight, moments, 0.0) is weight
    alone = Moments(12)
    alone.add(given)
    assert aimed(weight, alone, 1.0) is weight


def test_blocks_come_nearer_to_the_float_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_tokenizer("llama", tmp_path / "llama", num_hidden_layers=4)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i * i % 977} are numbers, {chr(97 + i % 26) * 2} is not.\n" for i in range(600)))
    options: dict[str, Any] = {**FAST, "samples": 16, "method": "auto", "calibration": str(text)}
    errors = {}
    for share in (0.0, 1.0):
        monkeypatch.setattr(budget, "_TOWARD_FLOAT", share)
        result = quantize(str(model), tmp_path / f"out-{share}", **options)
        errors[share] = list(result.block_errors.values())
    assert errors[1.0][-1] < 0.9 * errors[0.0][-1]
