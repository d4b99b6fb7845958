"""Other people's GPU kernels for quantized linears, behind the same seam: to be chosen by name. Knows no checkpoint format."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch

from ..kernels.grouped_linear import GroupedWeight
from ..kernels.quantize_rows import QuantizedRows
from .awq_extension import MODULE, extension_fault
from .gpu_kernels import TritonFp8, refuses_gpu
from .linear import LinearKernel, LinearSpec, LinearWeights, WeightForm
from .schemes.awq import pack_awq

_TILE_INPUTS, _INNER_TILES = 16, 8  # of torch's int4 kernel: inputs of a tile, and tiles that lie together


class TorchScaledMM(TritonFp8):
    """torch._scaled_mm (cuBLAS), scales per token and per channel; inputs are quantized as for our own kernel."""

    name: ClassVar[str] = "torch_scaled_mm"
    repeats: ClassVar[bool] = False

    @staticmethod
    def refuses(spec: LinearSpec) -> str | None:
        reason = TritonFp8.refuses(spec)
        if reason is not None:
            return reason
        activation = spec.form.activation
        if spec.form.group_size is not None or (activation is not None and activation.granularity == "group"):
            return "takes one scale a channel and one a token"
        if spec.activation_dtype != torch.bfloat16:
            return f"gives bfloat16, not {spec.activation_dtype}"
        if spec.in_features % 16 or spec.out_features % 16:
            return f"takes multiples of 16 inputs and outputs, not {spec.in_features} and {spec.out_features}"
        return None

    def multiply_codes(self, rows: QuantizedRows, *, out: torch.Tensor) -> torch.Tensor:
        weight = self._weight
        product = torch._scaled_mm(
            rows.codes, weight.codes.t(), rows.scales, weight.scale, bias=self._bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return out.copy_(product)


class TorchInt4Pack(LinearKernel):
    """torch._weight_int4pack_mm (tinygemm): bfloat16 inputs, int4 weights, scales and zero points rounded to bfloat16."""

    name: ClassVar[str] = "torch_int4pack"
    repeats: ClassVar[bool] = False

    @staticmethod
    def takes(form: WeightForm) -> bool:
        return form.kind == "integer" and form.bits == 4 and form.activation is None

    @staticmethod
    def refuses(spec: LinearSpec) -> str | None:
        reason = refuses_gpu(spec)
        if reason is not None:
            return reason
        form, k, n = spec.form, spec.in_features, spec.out_features
        if not TorchInt4Pack.takes(form) or form.act_order:
            return f"takes int4 weights without act-order and without quantized inputs, not {form.describe()}"
        if spec.activation_dtype != torch.bfloat16:
            return f"takes bfloat16 activations, not {spec.activation_dtype}"
        if form.group_size not in (32, 64, 128, 256):
            return f"takes groups of 32, 64, 128 or 256, not {form.group_size}"
        if k % (_TILE_INPUTS * _INNER_TILES) or n % 8:
            return f"takes multiples of {_TILE_INPUTS * _INNER_TILES} inputs and of 8 outputs, not {k} and {n}"
        return None

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        weights = weights.to(spec.device)
        weight = weights.weight
        assert isinstance(weight, GroupedWeight)
        if weight.super_scale is not None:
            raise ValueError("torch_int4pack takes one level of scales, not a GGUF format's")
        codes = weight.codes
        self._packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), _INNER_TILES)
        scale = weight.scale.float()
        zeros = weight.zeros.float() if weight.zeros is not None else torch.full_like(scale, float(weight.zero))
        added = (8.0 - zeros) * scale + (0.0 if weight.offset is None else weight.offset.float())
        self._scales = torch.stack([scale, added], dim=2).transpose(0, 1).to(torch.bfloat16).contiguous()  # [G, N, 2]
        self._group_size = weight.group_size
        self._in_features = spec.in_features
        self._bias = None if weights.bias is None else weights.bias.to(torch.bfloat16)

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        product = torch._weight_int4pack_mm(x, self._packed, self._group_size, self._scales)
        return out.copy_(product if self._bias is None else product + self._bias)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self._weights().index_select(0, indices)

    def _weights(self) -> torch.Tensor:
        """W [N, K], by multiplying it with the identity."""
        eye = torch.eye(self._in_features, dtype=torch.bfloat16, device=self._packed.device)
        return torch._weight_int4pack_mm(eye, self._packed, self._group_size, self._scales).t().contiguous()

    @property
    def weight_bytes(self) -> int:
        return self._packed.nbytes + self._scales.nbytes


class AwqExtension(LinearKernel):
    """autoawq-kernels' GEMM: float16 inputs, int4 weights in AutoAWQ's own layout."""

    name: ClassVar[str] = "autoawq_kernels"
    can_be_captured: ClassVar[bool] = False  # nobody has seen on which stream it launches
    repeats: ClassVar[bool] = False

    @staticmethod
    def takes(form: WeightForm) -> bool:
        return TorchInt4Pack.takes(form)

    @staticmethod
    def refuses(spec: LinearSpec) -> str | None:
        reason = refuses_gpu(spec)
        if reason is not None:
            return reason
        form = spec.form
        if not AwqExtension.takes(form) or form.act_order:
            return f"takes int4 weights without act-order and without quantized inputs, not {form.describe()}"
        if spec.activation_dtype != torch.float16:
            return f"takes float16 activations, not {spec.activation_dtype}"
        if form.group_size not in (32, 64, 128):
            return f"takes groups of 32, 64 or 128, not {form.group_size}"
        if spec.out_features % 64 or spec.in_features % 32:
            return f"takes multiples of 64 outputs and of 32 inputs, not {spec.out_features} and {spec.in_features}"
        return extension_fault()

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        weights = weights.to(spec.device)
        weight = weights.weight
        assert isinstance(weight, GroupedWeight)
        if weight.offset is not None or weight.super_scale is not None:
            raise ValueError("autoawq_kernels takes whole zero points and one level of scales, not a GGUF format's")
        zeros = weight.zeros if weight.zeros is not None else torch.full_like(weight.scale, weight.zero, dtype=torch.uint8)
        self._extension: Any = importlib.import_module(MODULE)
        self._words, self._zeros = pack_awq(weight.codes.t()), pack_awq(zeros.t())
        self._scales = weight.scale.t().to(torch.float16).contiguous()
        self._bias = None if weights.bias is None else weights.bias.to(torch.float16)

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        product = self._extension.gemm_forward_cuda(x, self._words, self._scales, self._zeros, 8)
        return out.copy_(product if self._bias is None else product + self._bias)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        dense = self._extension.dequantize_weights_cuda(self._words, self._scales, self._zeros, 0, 0, 0, False)  # [K, N]
        rows: torch.Tensor = dense.index_select(1, indices).t()
        return rows

    @property
    def weight_bytes(self) -> int:
        return self._words.nbytes + self._scales.nbytes + self._zeros.nbytes
