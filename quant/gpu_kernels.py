"""Kernels for quantized linears on NVIDIA GPUs, in Triton. Knows no checkpoint format.

Without a GPU they are compiled ahead on meta tensors, and tested on CPU tensors under Triton's interpreter: so they follow the device
of the weights they are given, and ask kernels/gpu/device.py what a device is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from ..kernels.grouped_linear import GroupedWeight
from ..kernels.quantize_rows import ALIGNMENT, QuantizedRows
from ..kernels.scaled_linear import ScaledWeight
from .linear import InputCodes, LinearKernel, LinearSpec, LinearWeights, WeightForm

if TYPE_CHECKING:
    from ..kernels.gpu.device import Device
    from ..kernels.gpu.workspace import Workspace

_HALF_DTYPES = (torch.bfloat16, torch.float16)


def refuses_gpu(spec: LinearSpec, *, least: int = 80) -> str | None:
    """Why a kernel for 16-bit activations on sm_`least` and newer cannot run; None when it can."""
    from ..kernels.gpu.device import device_of, is_gpu

    if spec.device.type != "meta" and not is_gpu(spec.device):  # meta tensors stand for the GPU that kernels are compiled ahead for
        return f"runs on NVIDIA GPUs, not on {spec.device.type}"
    if spec.activation_dtype not in _HALF_DTYPES:
        return f"takes bfloat16 and float16 activations, not {spec.activation_dtype}"
    arch = device_of(spec.device).arch
    return None if arch >= least else f"needs sm_{least} or newer, and this is sm_{arch}"


def _bias(spec: LinearSpec, weights: LinearWeights) -> torch.Tensor | None:
    return None if weights.bias is None else weights.bias.to(dtype=spec.activation_dtype).contiguous()


def _rows_in(workspace: Workspace, m: int, k: int, group: int, dtype: torch.dtype) -> QuantizedRows:
    """Room in the workspace for M rows as codes and scales."""
    columns, groups = -(-k // ALIGNMENT) * ALIGNMENT, -(-k // group)
    scratch = workspace.take("inputs", m * columns + 4 * m * groups)
    codes = scratch[: m * columns].view(dtype).view(m, columns)
    return QuantizedRows(codes, scratch[m * columns :].view(torch.float32).view(m, groups), k, group)


class _Scaled(LinearKernel):
    """8-bit weights and inputs on tensor cores (kernels/gpu/scaled_linear.py); inputs are quantized before, in one pass."""

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        from ..kernels.gpu import quantize_rows, scaled_linear
        from ..kernels.gpu.device import device_of
        from ..kernels.gpu.workspace import workspace_of

        weights = weights.to(spec.device)
        weight, activation = weights.weight, spec.form.activation
        assert isinstance(weight, GroupedWeight)
        assert activation is not None
        codes = weight.codes
        if codes.dtype == torch.uint8:  # around the middle
            codes = (codes ^ 128).view(torch.int8)
        self._gemm, self._quantize = scaled_linear, quantize_rows
        self._device = device_of(spec.device, deterministic=spec.deterministic)
        self._workspace = workspace_of(codes.device)
        self._weight = scaled_linear.pack(ScaledWeight(codes, weight.scale.float().contiguous(), 1, weight.group_size))
        self._x_group = activation.group_size if activation.granularity == "group" and activation.group_size else spec.in_features
        self._static = None if activation.dynamic else weights.input_scale
        self._bias, self._activation_dtype = _bias(spec, weights), spec.activation_dtype

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 0:
            return out
        rows = self.room(x.shape[0])
        self._quantize.launch(x, rows, device=self._device, static_scale=self._static)()
        return self.multiply_codes(rows, out=out)

    @property
    def input_codes(self) -> InputCodes:
        return InputCodes(self._weight.codes.dtype, self._x_group, self._static)

    def room(self, num_rows: int) -> QuantizedRows:
        return _rows_in(self._workspace, num_rows, self._weight.in_features, self._x_group, self._weight.codes.dtype)

    def multiply_codes(self, rows: QuantizedRows, *, out: torch.Tensor) -> torch.Tensor:
        weight, bias = self._weight, self._bias
        self._gemm.launch(rows.codes, rows.scales, self._x_group, weight, bias, out, device=self._device, workspace=self._workspace)()
        return out

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        weight = self._weight
        codes = weight.codes.view(torch.uint8)[indices].view(weight.codes.dtype)[:, : weight.in_features]
        scale = weight.scale.t()[indices].repeat_interleave(weight.group, 1)[:, : weight.in_features]
        return (codes.float() * scale).to(self._activation_dtype)

    @property
    def weight_bytes(self) -> int:
        return self._weight.nbytes


class TritonFp8(_Scaled):
    """fp8 weights and inputs: per tensor, per channel, or in blocks of inputs."""

    name: ClassVar[str] = "triton_fp8"

    @staticmethod
    def takes(form: WeightForm) -> bool:
        return form.kind == "fp8" and form.activation is not None and form.activation.dtype == "fp8_e4m3"

    @staticmethod
    def refuses(spec: LinearSpec) -> str | None:
        reason = refuses_gpu(spec, least=89)
        if reason is not None:
            return reason
        if not TritonFp8.takes(spec.form):
            return f"multiplies fp8 weights with fp8 inputs, not {spec.form.describe()}"
        return _refuses_groups(spec)


class TritonInt8(_Scaled):
    """int8 weights, one scale a channel, and int8 inputs."""

    name: ClassVar[str] = "triton_int8"

    @staticmethod
    def takes(form: WeightForm) -> bool:
        is_int8 = form.kind == "integer" and form.bits == 8
        return is_int8 and form.activation is not None and form.activation.dtype == "int8"

    @staticmethod
    def refuses(spec: LinearSpec) -> str | None:
        reason = refuses_gpu(spec)
        if reason is not None:
            return reason
        form = spec.form
        if not TritonInt8.takes(form):
            return f"multiplies int8 weights with int8 inputs, not {form.describe()}"
        assert form.activation is not None
        if not form.symmetric or form.act_order or not form.activation.symmetric:
            return "takes symmetric weights and inputs, in their own order"
        return _refuses_groups(spec)


def _refuses_groups(spec: LinearSpec) -> str | None:
    from ..kernels.gpu import scaled_linear

    activation, k = spec.form.activation, spec.in_features
    x_group = activation.group_size if activation is not None and activation.granularity == "group" else None
    return scaled_linear.refuses(in_features=k, x_group=x_group or k, w_group=spec.form.group_size or k)


class TritonWeightOnly(LinearKernel):
    """Weights of 2 to 6 bits, 8 bits or fp8, and inputs as they are (kernels/gpu/grouped_linear.py).

    fp8 formats that quantize inputs too run here on GPUs that multiply no fp8: their inputs are left unrounded.
    """

    name: ClassVar[str] = "triton_weight_only"

    @staticmethod
    def takes(form: WeightForm) -> bool:
        if form.kind == "fp8":
            return True
        return form.kind == "integer" and (form.activation is None or form.activation.dtype == "int16")

    @staticmethod
    def refuses(spec: LinearSpec) -> str | None:
        reason = refuses_gpu(spec)
        if reason is not None:
            return reason
        if not TritonWeightOnly.takes(spec.form):
            return f"leaves inputs as they are, and the format has {spec.form.describe()}"
        return _refuses_codes(spec)

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        from ..kernels.gpu import config, grouped_format, grouped_linear
        from ..kernels.gpu.device import device_of
        from ..kernels.gpu.workspace import workspace_of

        weights = weights.to(spec.device)
        assert isinstance(weights.weight, GroupedWeight)
        self._kernel, self._format, self._tile_for = grouped_linear, grouped_format, config.tile_for
        self._weight = grouped_format.pack(weights.weight)
        self._device: Device = device_of(spec.device, deterministic=spec.deterministic)
        self._workspace = workspace_of(self._weight.data.device)
        self._bias, self._activation_dtype = _bias(spec, weights), spec.activation_dtype

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 0:
            return out
        weight, bias = self._weight, self._bias
        tile = self._tile_for(self._device, self._kernel.op_of(weight, x.dtype), x.shape[0])
        if tile.route != "dense":
            if weight.permutation is not None:
                x = torch.index_select(x, 1, weight.permutation)
            self._kernel.launch(x, weight, bias, out, device=self._device, workspace=self._workspace)()
            return out
        # Many rows: taking weights apart once and multiplying dense ones costs less than taking them apart for every tile of rows.
        n, k = weight.out_features, weight.in_features
        dense = self._workspace.take("weights", 2 * n * k).view(x.dtype).view(n, k)
        self._kernel.dequantize(weight, dense)()
        return torch.addmm(bias, x, dense.t(), out=out) if bias is not None else torch.mm(x, dense.t(), out=out)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self._format.rows(self._weight, indices).to(self._activation_dtype)

    @property
    def weight_bytes(self) -> int:
        return self._weight.nbytes


class TritonW4A8(TritonWeightOnly):
    """Weights of 2 to 4 bits as fp8, and inputs quantized to fp8 per token, which the format does not ask for: to be chosen by name."""

    name: ClassVar[str] = "triton_w4a8_fp8"

    @staticmethod
    def takes(form: WeightForm) -> bool:
        return form.kind == "integer" and form.activation is None and form.bits <= 4

    @staticmethod
    def refuses(spec: LinearSpec) -> str | None:
        from ..kernels.gpu import grouped_format

        reason = refuses_gpu(spec, least=89)
        if reason is not None:
            return reason
        form = spec.form
        if not TritonW4A8.takes(form) or form.act_order:
            return f"takes weights of 2 to 4 bits without act-order and without quantized inputs, not {form.describe()}"
        k, group = spec.in_features, form.group_size or spec.in_features
        if group % 32 or grouped_format.depth_of(group, k, grouped_format.slots_of(form.bits)) < 32:
            return f"takes groups of whole 32 inputs, or multiples of {32 * grouped_format.slots_of(form.bits)} inputs, not {group} of {k}"
        return _refuses_codes(spec)

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        from ..kernels.gpu import quantize_rows

        super().__init__(spec, weights)
        self._quantize = quantize_rows

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        (m, k), weight = x.shape, self._weight
        if m == 0:
            return out
        rows = _rows_in(self._workspace, m, k, k, torch.float8_e4m3fn)
        self._quantize.launch(x, rows, device=self._device)()
        self._kernel.launch(
            rows.codes[:, :k], weight, self._bias, out, device=self._device, workspace=self._workspace, x_scale=rows.scales
        )()
        return out


def _refuses_codes(spec: LinearSpec) -> str | None:
    from ..kernels.gpu import grouped_format

    return grouped_format.refuses(bits=spec.form.bits, in_features=spec.in_features)


class TritonDense(LinearKernel):
    """16-bit weights and inputs (kernels/gpu/dense_linear.py), where torch's matmul would give a row other bits beside other rows."""

    name: ClassVar[str] = "triton_dense"

    @staticmethod
    def takes(form: WeightForm) -> bool:
        return form.kind == "dense"

    @staticmethod
    def refuses(spec: LinearSpec) -> str | None:
        reason = refuses_gpu(spec)
        if reason is not None:
            return reason
        if not TritonDense.takes(spec.form) or spec.weight_dtype != spec.activation_dtype:
            return f"multiplies dense weights with inputs of their dtype, not {spec.form.describe()} of {spec.weight_dtype}"
        return None

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        from ..kernels.gpu import dense_linear
        from ..kernels.gpu.device import device_of
        from ..kernels.gpu.workspace import workspace_of

        assert isinstance(weights.weight, torch.Tensor)
        self._weight = weights.weight.to(spec.device).contiguous()
        self._kernel, self._bias = dense_linear, _bias(spec, weights.to(spec.device))
        self._device: Device = device_of(spec.device, deterministic=spec.deterministic)
        self._workspace = workspace_of(self._weight.device)

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        if x.shape[0]:
            self._kernel.launch(x, self._weight, self._bias, out, device=self._device, workspace=self._workspace)()
        return out

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self._weight[indices]

    @property
    def weight_bytes(self) -> int:
        return self._weight.nbytes
