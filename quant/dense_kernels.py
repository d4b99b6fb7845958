"""Dense linear kernels: packed panels on the CPU, and torch's own matmul. Knows no checkpoint format."""

from __future__ import annotations

from typing import ClassVar

import torch

from .linear import LinearKernel, LinearSpec, LinearWeights, WeightForm

DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cpu_has_bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX), which oneDNN then uses."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _refuses_weights(spec: LinearSpec) -> str | None:
    if spec.form.kind != "dense":
        return f"takes dense weights, not {spec.form.describe()}"
    if spec.weight_dtype not in DENSE_DTYPES:
        return f"takes float32, bfloat16 and float16 weights, not {spec.weight_dtype}"
    return None


class PackedPanels(LinearKernel):
    """Weights in column panels, widened to float32 in registers (kernels/cpu/packed_linear.py)."""

    name: ClassVar[str] = "cpu_packed_panels"

    @staticmethod
    def takes(form: WeightForm) -> bool:
        return form.kind == "dense"

    @staticmethod
    def refuses(spec: LinearSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"runs on the CPU, not on {spec.device.type}"
        reason = _refuses_weights(spec)
        if reason is not None:
            return reason
        if spec.activation_dtype != torch.float32:
            return f"takes float32 activations, not {spec.activation_dtype}"
        if spec.weight_dtype == torch.bfloat16 and cpu_has_bf16_units() and not spec.deterministic:
            return "this CPU has bfloat16 units, with which oneDNN is faster"
        return None

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        from ..kernels.cpu import packed_linear
        from ..kernels.cpu.tile import COLUMNS

        assert isinstance(weights.weight, torch.Tensor)
        self._linear = packed_linear.linear
        self._columns = COLUMNS
        self._out_features = spec.out_features
        self._packed = packed_linear.pack(weights.weight)
        self._bias = None if weights.bias is None else weights.bias.float().contiguous()

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return self._linear(x, self._packed, self._out_features, self._bias, out)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self._packed[indices // self._columns, :, indices % self._columns].float()

    @property
    def weight_bytes(self) -> int:
        return self._packed.nbytes


class TorchMatmul(LinearKernel):
    """torch's matmul in the weight's dtype: cuBLAS on CUDA, oneDNN or MKL on the CPU."""

    name: ClassVar[str] = "torch_matmul"
    repeats: ClassVar[bool] = False

    @staticmethod
    def takes(form: WeightForm) -> bool:
        return form.kind == "dense"

    @staticmethod
    def refuses(spec: LinearSpec) -> str | None:
        return _refuses_weights(spec)

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        assert isinstance(weights.weight, torch.Tensor)
        self._weight = weights.weight.to(spec.device).contiguous()
        self._bias = None if weights.bias is None else weights.bias.to(device=spec.device, dtype=spec.weight_dtype)
        self._activation_dtype = spec.activation_dtype

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(torch.nn.functional.linear(x.to(self._weight.dtype), self._weight, self._bias))

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self._weight[indices].to(self._activation_dtype)

    @property
    def weight_bytes(self) -> int:
        return self._weight.nbytes
