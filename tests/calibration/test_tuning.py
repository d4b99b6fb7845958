"""The last pass: its loss and gradient against autograd in float64, what it may change, and that it helps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from octavo.calibration.grid import Grid, round_to_nearest
from octavo.calibration.sites import Site
from octavo.calibration.tuning import TunedVector, TunedWeight, TuningSchedule, kl_and_gradient, tune
from octavo.kernels.grouped_linear import dequantize

H, VOCAB = 32, 50


def test_kl_and_its_gradient_are_autograds() -> None:
    torch.manual_seed(0)
    head = torch.randn(VOCAB, H)
    hidden, target = torch.randn(2, 700, H), torch.randn(2, 700, H)  # more rows than are taken at once
    kl, gradient = kl_and_gradient(hidden, target, lambda rows: 5 * torch.tanh(rows @ head.t() / 5))

    exact = hidden.double().requires_grad_(True)

    def log_probabilities(x: torch.Tensor) -> torch.Tensor:
        return (5 * torch.tanh(x @ head.double().t() / 5)).log_softmax(-1)

    loss = nn.functional.kl_div(log_probabilities(exact), log_probabilities(target.double()), log_target=True, reduction="sum") / 1400
    loss.backward()
    assert kl == pytest.approx(loss.item(), rel=1e-5)
    assert exact.grad is not None
    torch.testing.assert_close(gradient, exact.grad.float(), atol=1e-7, rtol=1e-4)


class Model(nn.Module):
    """A norm, a linear of two experts, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(H).mul_(1.3))
        self.experts = nn.Parameter(torch.randn(2, H, H))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.rms_norm(x, (H,)) * self.norm
        return x @ self.experts[0].t() + torch.tanh(x) @ self.experts[1].t()


@pytest.mark.parametrize("symmetric", [False, True])
def test_tuning_brings_the_model_nearer(symmetric: bool) -> None:
    torch.manual_seed(1)
    model, head, embedding = Model().requires_grad_(False), torch.randn(VOCAB, H) * 0.3, torch.randn(VOCAB, H)
    tokens = torch.randint(0, VOCAB, (40, 20))
    targets = model(embedding[tokens])
    original = model.experts.data.clone()
    grid = Grid(4, 16, symmetric, torch.bfloat16)
    tuned: dict[Site, TunedWeight] = {}
    quantized = {}
    for expert in range(2):
        site = Site("experts", expert)
        quantized[site] = round_to_nearest(original[expert], grid)
        tuned[site] = TunedWeight(model.experts.data[expert], quantized[site])
        model.experts.data[expert] = dequantize(quantized[site])
    vector = TunedVector(model.norm, torch.bfloat16)
    schedule = TuningSchedule(steps=60, batch=8, scale_rate=3e-3, norm_rate=3e-3)
    losses = tune(
        lambda rows: model(embedding[rows].requires_grad_(True)),
        lambda rows: rows @ head.t(),
        tokens,
        lambda rows: targets[rows],
        {model.experts: tuned},
        {model.norm: vector},
        schedule,
    )
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    for expert in range(2):
        site = Site("experts", expert)
        result = tuned[site].result()
        assert torch.equal(dequantize(result), model.experts.data[expert])  # what was tuned is what is written
        assert result.scale.dtype == torch.bfloat16
        assert torch.equal(result.codes, quantized[site].codes)
        if not symmetric:
            assert result.zeros is not None
            assert quantized[site].zeros is not None
            assert torch.equal(result.zeros, quantized[site].zeros)
    assert torch.equal(vector.result(), vector.result().bfloat16().float())
    assert not torch.equal(vector.result(), torch.full((H,), 1.3))
    assert not model.experts.requires_grad


def test_the_rate_rises_and_falls() -> None:
    schedule = TuningSchedule(steps=40, scale_rate=1e-3, norm_rate=1e-3)
    rates = [schedule.rate(step) for step in range(1, 41)]
    assert max(rates) <= 1
    assert rates[0] < rates[4]
    assert rates[-1] == pytest.approx(0.05)
    assert TuningSchedule(steps=1, scale_rate=1e-3, norm_rate=1e-3).rate(1) > 0
