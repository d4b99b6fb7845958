"""The order in which a block's sites are solved, what is seen of each, and what it makes up for: against float64 from plain products."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octavo.calibration import budget, walk
from octavo.calibration.moments import Collector, Moments
from octavo.calibration.quantize_run import quantize
from octavo.calibration.sites import Site
from octavo.calibration.solve import aimed
from octavo.calibration.stages import see_stage

from .test_quantize import FAST, with_tokenizer

TEXT = "".join(f"{i} and {i * i % 977} are numbers, {chr(97 + i % 26) * 2} is not.\n" for i in range(600))
LLAMA = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
STAGES: dict[str, tuple[str, dict[str, Any], list[set[str]]]] = {
    "llama": ("llama", {}, LLAMA),
    "transposed": ("gpt2", {}, [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}]),
    "square": ("phi", {"intermediate_size": 64}, [{"q_proj", "k_proj", "v_proj"}, {"dense"}, {"fc1"}, {"fc2"}]),
    "experts": ("mixtral", {}, [*LLAMA[:2]]),
}


@pytest.mark.parametrize("name", STAGES)
def test_each_is_solved_behind_what_its_input_hangs_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And experts from what was seen of them at first: routing may send them other tokens."""
    model_type, changes, expected = STAGES[name]
    folder = tmp_path / "model"
    folder.mkdir()
    model = with_tokenizer(model_type, folder, **changes)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    stages: list[set[str]] = []

    def watched(block: Any, stage: Sequence[Site], plain: Any, solved: Any, *others: Any) -> Collector | None:
        of_block = stages[len(stages) - len(stages) % len(expected) :]
        assert {_leaf(site) for site in plain} == {_leaf(site) for site in solved} == {name for known in of_block for name in known}
        stages.append({_leaf(site) for site in stage})
        return see_stage(block, stage, plain, solved, *others)

    monkeypatch.setattr(walk, "see_stage", watched)
    quantize(str(model), tmp_path / "out", **FAST, method="auto", calibration=str(text))
    assert stages == expected * 2  # blocks
    stages.clear()
    quantize(str(model), tmp_path / "fast", **FAST, method="auto", effort="fast", calibration=str(text))
    assert not stages


def _leaf(site: Site) -> str:
    return site.parameter.removesuffix(".weight").rpartition(".")[2]


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
    seen = see_stage(block, [b], plain, solved, {b: sizes} if weighed else {}, runs)
    assert seen is not None
    moments = seen.of(b, 6)
    assert block.reached == 0  # nothing after b was computed

    bias = block.a.bias.double()
    meant = (x.double().flatten(0, 1) @ plain[a].double().t() + bias).tanh()
    given = ((x + 0.2 * off).double().flatten(0, 1) @ solved[a].double().t() + bias).tanh()
    counts = (sizes if weighed else torch.ones(5, 7)).double().flatten()[:, None]
    torch.testing.assert_close(moments.hessian, ((counts * given).t() @ given / 35).float(), rtol=1e-4, atol=1e-6)
    assert moments.crossed is not None
    torch.testing.assert_close(moments.crossed, ((counts * meant).t() @ given / 35).float(), rtol=1e-4, atol=1e-6)


class Routed(nn.Module):
    """A linear that sees the rows which begin with more than 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[x[:, 0] > 0]
        return self.a(rows) if len(rows) else x


@pytest.mark.parametrize("meant", [torch.ones(4, 8), -torch.ones(4, 8), torch.cat([torch.ones(2, 8), -torch.ones(2, 8)])])
def test_what_the_float_model_sends_elsewhere_is_not_compared(meant: Tensor) -> None:
    block, given = Routed().requires_grad_(False), torch.ones(4, 8)
    seen = see_stage(
        block, [Site("a.weight")], {}, {}, {}, [(lambda: block(given), lambda: block(given)), (lambda: block(meant), lambda: block(given))]
    )
    assert (seen is not None) == bool((meant > 0).all())


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
    folder = tmp_path / "llama"
    folder.mkdir()
    model = with_tokenizer("llama", folder, num_hidden_layers=4)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options: dict[str, Any] = {**FAST, "samples": 16, "method": "auto", "calibration": str(text)}
    errors = {}
    for share in (0.0, 1.0):
        monkeypatch.setattr(budget, "_TOWARD_FLOAT", share)
        result = quantize(str(model), tmp_path / f"out-{share}", **options)
        errors[share] = list(result.block_errors.values())
    assert errors[1.0][-1] < 0.9 * errors[0.0][-1]
