"""The trials of `octavo doctor`: every kernel passes, a wrong one is found, and each choice has its reasons."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from octavo.kernels.gpu.device import pretend
from octavo.quant import kernel_trials as trials
from octavo.quant import platforms
from octavo.quant.cpu_kernels import GroupedPanels
from octavo.quant.dense_kernels import TorchMatmul
from octavo.quant.linear import LinearKernel
from octavo.quant.platforms import kernels_for
from octavo.quant.reference_kernel import FloatReference

CPU = torch.device("cpu")


class Wrong(TorchMatmul):
    name: ClassVar[str] = "wrong"

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return super().__call__(x, out=out).mul_(1.1)


class Crashing(GroupedPanels):
    name: ClassVar[str] = "crashing"

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        raise OSError("no such\ninstruction")


def with_kernels(monkeypatch: pytest.MonkeyPatch, *kernels: type[LinearKernel]) -> None:
    monkeypatch.setitem(platforms._KERNELS, "cpu", kernels)


def test_every_kernel_of_the_cpu_passes() -> None:
    found = trials.kernel_trials(CPU)
    assert [trial for trial in found if trial.fault is not None] == []
    choices = trials.kernel_choices(CPU)
    assert len(choices) == 7
    assert {(choice.kernel, choice.weights) for choice in choices} <= {(trial.kernel, trial.weights) for trial in found}


def test_each_choice_has_the_reasons_of_those_before_it() -> None:
    names = [kernel.name for kernel in kernels_for(CPU)]
    for choice in trials.kernel_choices(CPU):
        assert choice.kernel is not None
        assert not choice.is_reference
        assert [name for name, _ in choice.refused] == names[: names.index(choice.kernel)]


def test_a_wrong_kernel_and_a_crashing_one_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels(monkeypatch, Wrong, Crashing, FloatReference)
    found = trials.kernel_trials(CPU)
    assert {trial.kernel for trial in found} == {"wrong", "crashing"}
    for trial in found:
        assert trial.fault is not None
        assert ("is off by" in trial.fault) if trial.kernel == "wrong" else (trial.fault == "OSError: no such instruction")


def test_weights_that_no_kernel_takes_have_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels(monkeypatch, TorchMatmul)
    int4 = next(choice for choice in trials.kernel_choices(CPU) if choice.weights.startswith("int4"))
    assert int4.kernel is None
    assert int4.refused == (("torch_matmul", "takes dense weights, not int4 in groups of 128"),)


def test_a_gpu_is_told_what_it_would_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "platform_of", lambda device: "sm_90")
    with pretend(90):
        choices = {choice.weights: choice for choice in trials.kernel_choices(torch.device("cuda"))}
    assert choices["dense bfloat16"].kernel == "torch_matmul"
    assert all(choice.kernel is not None for choice in choices.values())
