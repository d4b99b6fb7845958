"""Which kernel each common kind of weights gets on a device, and whether the kernels compute it right. Knows no checkpoint and no model."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.grouped_linear import GroupedWeight
from .build import KernelOptions, choose_kernel
from .linear import LinearKernel, LinearSpec, LinearWeights, NoKernel, WeightForm
from .linear_format import ActivationFormat
from .platforms import kernels_for
from .self_check import SelfCheck

OUT_FEATURES, IN_FEATURES = 72, 256
_GROUP = 128


@dataclass(frozen=True)
class Choice:
    """What a device has for one kind of weights. `kernel` None: none takes it, and `refused` has every reason."""

    weights: str
    kernel: str | None
    is_reference: bool
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Trial:
    """One kernel, run on small random weights and held against the float reference. `fault` None: it passed."""

    kernel: str
    weights: str
    milliseconds: float
    fault: str | None


def kernel_choices(device: torch.device) -> tuple[Choice, ...]:
    """The kernel for each common kind of weights. Raises ValueError for a device without kernels."""
    kernels_for(device)
    return tuple(_choice(name, _spec(form, device)) for name, form in _forms().items())


def kernel_trials(device: torch.device) -> tuple[Trial, ...]:
    """Every kernel of the device but the reference, on every common kind of weights that it does not refuse."""
    specs = [(name, _spec(form, device)) for name, form in _forms().items()]
    kernels = [kernel for kernel in kernels_for(device) if not kernel.is_reference]
    return tuple(
        _trial(kernel, name, spec) for kernel in kernels for name, spec in specs if kernel.takes(spec.form) and kernel.refuses(spec) is None
    )


def _choice(name: str, spec: LinearSpec) -> Choice:
    try:
        selection = choose_kernel(spec, KernelOptions())
    except NoKernel:
        refused = tuple((kernel.name, kernel.refuses(spec) or "slow") for kernel in kernels_for(spec.device))
        return Choice(name, None, False, refused)
    return Choice(name, selection.kernel.name, selection.kernel.is_reference, selection.refusals)


@torch.inference_mode()
def _trial(kernel: type[LinearKernel], name: str, spec: LinearSpec) -> Trial:
    started = time.perf_counter()
    fault = None
    try:
        weights = _weights(spec.form)
        SelfCheck()(kernel(spec, weights), spec, weights)
    except Exception as error:  # whatever a broken compiler, driver or library raises is what this is to find
        fault = " ".join(f"{type(error).__name__}: {error}".split())
    return Trial(kernel.name, name, (time.perf_counter() - started) * 1000, fault)


@functools.cache
def _forms() -> dict[str, WeightForm]:
    token = functools.partial(ActivationFormat, granularity="token", dynamic=True)
    int4 = WeightForm("integer", 4, _GROUP)
    fp8 = WeightForm("fp8", 8, activation=token("fp8_e4m3"))
    return {
        "dense bfloat16": WeightForm("dense", 16),
        "int8 per channel, inputs int8": WeightForm("integer", 8, activation=token("int8")),
        f"int4, groups of {_GROUP}": int4,
        f"int4, groups of {_GROUP}, asymmetric": replace(int4, symmetric=False),
        f"int4, groups of {_GROUP}, act-order": replace(int4, act_order=True),
        "fp8 per channel, inputs fp8": fp8,
        f"fp8, blocks of {_GROUP}x{_GROUP}, inputs fp8": replace(
            fp8, group_size=_GROUP, activation=ActivationFormat("fp8_e4m3", "group", dynamic=True, group_size=_GROUP)
        ),
    }


def _spec(form: WeightForm, device: torch.device) -> LinearSpec:
    return LinearSpec(
        "trial",
        IN_FEATURES,
        OUT_FEATURES,
        has_bias=True,
        weight_dtype=torch.bfloat16,
        device=device,
        activation_dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        form=form,
        scheme=form.describe(),
    )


def _weights(form: WeightForm) -> LinearWeights:
    """Random weights of a form, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (OUT_FEATURES, IN_FEATURES)
    bias = torch.randn(OUT_FEATURES, generator=generator)
    if form.kind == "dense":
        return LinearWeights(torch.randn(shape, generator=generator).bfloat16(), bias)
    size = form.group_size or IN_FEATURES
    scale = torch.rand(OUT_FEATURES, IN_FEATURES // size, generator=generator) * 0.01 + 0.001
    if form.kind == "fp8":
        codes = (torch.randn(shape, generator=generator) * 50).to(torch.float8_e4m3fn)
        return LinearWeights(GroupedWeight(codes, 8, size, scale), bias)
    if form.bits == 8:
        return LinearWeights(GroupedWeight(_integers(-127, 128, shape, generator).to(torch.int8), 8, size, scale), bias)
    codes = _integers(0, 1 << form.bits, shape, generator).to(torch.uint8)
    weight = GroupedWeight(codes, form.bits, size, scale, zero=1 << (form.bits - 1))
    if not form.symmetric:
        zeros = _integers(0, 1 << form.bits, tuple(scale.shape), generator).to(torch.uint8)
        weight = replace(weight, zero=0, zeros=zeros)
    if form.act_order:
        weight = replace(weight, permutation=torch.randperm(IN_FEATURES, generator=generator))
    return LinearWeights(weight, bias)


def _integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)
