"""Kernels for quantized linears on the CPU. Knows no checkpoint format."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..kernels.grouped_linear import GroupedWeight
from .linear import LinearKernel, LinearSpec, LinearWeights, WeightForm
from .reference_kernel import round_inputs


def _refuses_device(spec: LinearSpec) -> str | None:
    if spec.device.type != "cpu":
        return f"runs on the CPU, not on {spec.device.type}"
    if spec.activation_dtype != torch.float32:
        return f"takes float32 activations, not {spec.activation_dtype}"
    return None


class Int8Panels(LinearKernel):
    """int8 weights and whole-number inputs: VNNI, or 16-bit multiply-adds (kernels/cpu/int8_linear.py)."""

    name: ClassVar[str] = "cpu_int8"

    @staticmethod
    def takes(form: WeightForm) -> bool:
        return form.kind == "integer" and form.bits == 8 and form.activation is not None and form.activation.dtype != "fp8_e4m3"

    @staticmethod
    def refuses(spec: LinearSpec) -> str | None:
        reason = _refuses_device(spec)
        if reason is not None:
            return reason
        if not Int8Panels.takes(spec.form):
            return f"multiplies int8 weights with whole-number inputs, not {spec.form.describe()}"
        if spec.in_features > 1 << 16:
            return f"sums of {spec.in_features} products could overflow 32 bits"
        return Int8Panels._refuses_form(spec.form)

    @staticmethod
    def _refuses_form(form: WeightForm) -> str | None:
        assert form.activation is not None
        if form.group_size is not None or not form.symmetric or form.act_order:
            return "takes one symmetric scale a row of weights"
        if not form.activation.symmetric or form.activation.granularity == "group":
            return f"takes symmetric inputs with one scale a token or one for all, not {form.activation.describe()}"
        if form.activation.dtype == "int16" and not form.activation.dynamic:
            return "takes 16-bit inputs with dynamic scales"
        return None

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        from ..kernels.cpu import grouped_linear, int8_linear

        weight = weights.weight
        assert isinstance(weight, GroupedWeight)
        assert spec.form.activation is not None
        codes = weight.codes if weight.codes.dtype == torch.int8 else (weight.codes ^ 128).view(torch.int8)
        self._kernel = int8_linear
        self._packed = int8_linear.pack(codes, weight.scale[:, 0], wide=spec.form.activation.dtype == "int16")
        self._bias = grouped_linear.pad_bias(weights.bias)
        self._static = None if spec.form.activation.dynamic else weights.input_scale

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return self._kernel.linear(x, self._packed, self._bias, out, static_scale=self._static)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self._kernel.rows(self._packed, indices)

    @property
    def weight_bytes(self) -> int:
        return self._packed.nbytes


class WidePanels(LinearKernel):
    """Weights of 2, 4 or 8 bits at their width, inputs as 16-bit integers with a scale a group (kernels/cpu/wide_linear.py)."""

    name: ClassVar[str] = "cpu_wide"

    @staticmethod
    def takes(form: WeightForm) -> bool:
        return form.kind == "integer" and form.activation is None

    @staticmethod
    def refuses(spec: LinearSpec) -> str | None:
        from ..kernels.cpu import wide_linear

        reason = _refuses_device(spec)
        if reason is not None:
            return reason
        form, inputs = spec.form, spec.in_features
        if not WidePanels.takes(form):
            return f"multiplies integer weights with inputs that the format leaves alone, not {form.describe()}"
        if spec.weight_dtype == torch.float32:
            return "rounds inputs to 16-bit integers, and float32 was asked for"
        if form.act_order:
            return "takes inputs in the order of their groups, not act-order"
        size = form.group_size or inputs
        if inputs % size or not wide_linear.takes(bits=form.bits, group_size=size):
            return f"takes 2, 4 and 8 bits in whole groups of 32 or more that a 32-bit sum can hold, not {form.bits} in groups of {size}"
        return None

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        from ..kernels.cpu import grouped_linear, wide_linear

        assert isinstance(weights.weight, GroupedWeight)
        self._kernel = wide_linear
        self._packed = wide_linear.pack(weights.weight)
        self._bias = grouped_linear.pad_bias(weights.bias)

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return self._kernel.linear(x, self._packed, self._bias, out)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self._kernel.rows(self._packed, indices)

    @property
    def weight_bytes(self) -> int:
        return self._packed.nbytes


class GroupedPanels(LinearKernel):
    """Weights of 2 to 8 bits, or fp8, at their width in column panels, float32 arithmetic (kernels/cpu/grouped_linear.py)."""

    name: ClassVar[str] = "cpu_grouped"

    @staticmethod
    def takes(form: WeightForm) -> bool:
        return form.kind != "dense"

    @staticmethod
    def refuses(spec: LinearSpec) -> str | None:
        reason = _refuses_device(spec)
        if reason is not None:
            return reason
        if not GroupedPanels.takes(spec.form):
            return "takes quantized weights, not dense ones"
        if spec.form.bits not in (2, 3, 4, 5, 6, 8):
            return f"takes 2, 3, 4, 5, 6 and 8 bits, not {spec.form.bits}"
        return None

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        from ..kernels.cpu import grouped_linear

        assert isinstance(weights.weight, GroupedWeight)
        self._kernel = grouped_linear
        self._packed = grouped_linear.pack(weights.weight)
        self._bias = grouped_linear.pad_bias(weights.bias)
        self._activation, self._input_scale = spec.form.activation, weights.input_scale

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return self._kernel.linear(round_inputs(x, self._activation, self._input_scale), self._packed, self._bias, out)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self._kernel.rows(self._packed, indices)

    @property
    def weight_bytes(self) -> int:
        return self._packed.nbytes
