"""FloatReference: any linear, on any device, in float32: right and slow. Knows no checkpoint format."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..kernels.quantize_activations import quantize_dequantize
from .linear import LinearKernel, LinearSpec, LinearWeights, WeightForm
from .linear_format import ActivationFormat


def round_inputs(x: torch.Tensor, activation: ActivationFormat | None, input_scale: torch.Tensor | None) -> torch.Tensor:
    """x as the format's quantized activations, in floats; x itself where they are not quantized."""
    if activation is None:
        return x
    return quantize_dequantize(
        x,
        activation.dtype,
        group_size=activation.group_size if activation.granularity == "group" else None,
        static_scale=None if activation.dynamic else input_scale,
        symmetric=activation.symmetric,
    )


class FloatReference(LinearKernel):
    """Weights dequantized to float32 at every call, on any device: right, slow, and the last in every list."""

    name: ClassVar[str] = "reference"
    can_be_captured: ClassVar[bool] = False
    repeats: ClassVar[bool] = False
    is_reference: ClassVar[bool] = True

    @staticmethod
    def takes(form: WeightForm) -> bool:
        return True

    @staticmethod
    def refuses(spec: LinearSpec) -> str | None:
        return None

    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        self._weights = weights.to(spec.device)
        self._activation, self._dtype = spec.form.activation, spec.activation_dtype

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        weights = self._weights
        x = round_inputs(x.float(), self._activation, weights.input_scale)
        bias = None if weights.bias is None else weights.bias.float()
        return out.copy_(torch.nn.functional.linear(x, weights.dense(), bias))

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self._weights.dense()[indices].to(self._dtype)

    @property
    def weight_bytes(self) -> int:
        return self._weights.nbytes
