"""Dense weights quantized while they load: `--quantization fp8`, `int8` or `int4`. Round-to-nearest, no data needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ...kernels.grouped_linear import GroupedWeight
from ..linear import LinearWeights, WeightForm
from ..linear_format import ActivationFormat, LinearFormat
from .base import Module, Slice, check_finite
from .dense import DenseScheme

GROUP_SIZES = (128, 64, 32, 16)
FP8_MAX = 448.0


def load_time_format(method: str, in_features: int) -> LinearFormat:
    """What `method` ("fp8", "int8" or "int4") makes of a dense linear. int4 takes the largest group size that divides its inputs."""
    if method == "fp8":
        return LinearFormat("load-time", 8, "channel", activation=ActivationFormat("fp8_e4m3", "token", dynamic=True))
    if method == "int8":  # 8-bit inputs would cost SmolLM2 2 % of perplexity, these a quarter of a percent
        return LinearFormat("load-time", 8, "channel", activation=ActivationFormat("int16", "token", dynamic=True))
    size = next((size for size in GROUP_SIZES if in_features % size == 0), None)
    return LinearFormat("load-time", 4, "channel" if size is None else "group", group_size=size, symmetric=False)


class LoadTimeScheme(DenseScheme):
    """Tensors as a dense module has them."""

    def form(self, module: Module) -> WeightForm:
        stored = module.format
        kind: Literal["fp8", "integer"] = "fp8" if stored.weight_type == "fp8" else "integer"
        return WeightForm(kind, stored.bits, stored.group_size, stored.symmetric, activation=stored.activation)

    def to_canonical(self, tensors: Mapping[str, Tensor], module: Module, part: Slice) -> LinearWeights:
        weight = check_finite("weight", tensors["weight"]).float()
        form = self.form(module)
        if form.kind == "fp8":
            grouped = quantize_fp8(weight)
        elif form.bits == 8:
            grouped = quantize_int8(weight)
        else:
            # A slice that cuts a group sees a part of its weights: smaller groups fit, and lose nothing.
            size = part.in_features if form.group_size is None else math.gcd(form.group_size, part.in_start, part.in_stop)
            grouped = quantize_int4(weight, size)
        return LinearWeights(grouped, tensors.get("bias"))


def _safe(scale: Tensor) -> Tensor:
    """Scales of zero, of rows or groups of zeros, replaced by 1."""
    return torch.where(scale > 0, scale, 1.0)


def quantize_int8(weight: Tensor) -> GroupedWeight:
    """float32 [N, K] to int8 with one scale a row, `max|w| / 127`."""
    scale = _safe(weight.abs().amax(1, keepdim=True) / 127.0)
    return GroupedWeight(torch.round(weight / scale).to(torch.int8), 8, weight.shape[1], scale)


def quantize_fp8(weight: Tensor) -> GroupedWeight:
    """float32 [N, K] to float8_e4m3fn with one scale a row, `max|w| / 448`."""
    scale = _safe(weight.abs().amax(1, keepdim=True) / FP8_MAX)
    codes = (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return GroupedWeight(codes, 8, weight.shape[1], scale)


def quantize_int4(weight: Tensor, group_size: int, *, lowest_zero: int = 0) -> GroupedWeight:
    """float32 [N, K] to 4 bits in groups of `group_size`, asymmetric: a group's range, widened to hold 0, on 16 steps.

    Scales are rounded to float16 before the codes are found. Zero points are at least `lowest_zero`.
    """
    groups = weight.reshape(weight.shape[0], -1, group_size)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = _safe(((high - low) / 15.0).to(torch.float16).float())
    zeros = torch.round(-low / scale).clamp(lowest_zero, 15)
    codes = torch.round(groups / scale[..., None] + zeros[..., None]).clamp(0, 15)
    return GroupedWeight(codes.flatten(1).to(torch.uint8), 4, group_size, scale.to(torch.float16), zeros=zeros.to(torch.uint8))
