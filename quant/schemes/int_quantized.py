"""compressed-tensors' int-quantized: int8 weights with one scale a row or for all, and int8 inputs (W8A8)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels.grouped_linear import GroupedWeight
from ..linear import Axis, LinearWeights, WeightForm, WeightSpec
from .base import Module, Slice, bias_spec, check_scales
from .fp8 import input_scale


class IntQuantizedScheme:
    """weight int8 [N, K], weight_scale [N, 1] or [1], static input_scale. Symmetric."""

    def form(self, module: Module) -> WeightForm:
        return WeightForm("integer", 8, None, activation=module.format.activation)

    def create_weights(self, module: Module) -> tuple[WeightSpec, ...]:
        k, n, stored = module.in_features, module.out_features, module.format
        one = stored.granularity == "tensor"
        specs = [
            WeightSpec("weight", (n, k), torch.int8, (Axis("out"), Axis("in"))),
            WeightSpec("weight_scale", () if one else (n, 1), None, () if one else (Axis("out"), Axis("none"))),
        ]
        if stored.activation is not None and not stored.activation.dynamic:
            specs.append(WeightSpec("input_scale", (), None, ()))
        return (*specs, *bias_spec(module))

    def to_canonical(self, tensors: Mapping[str, Tensor], module: Module, part: Slice) -> LinearWeights:
        scale = check_scales("weight_scale", tensors["weight_scale"]).reshape(-1, 1).expand(part.out_features, 1).contiguous()
        weight = GroupedWeight(tensors["weight"], 8, part.in_features, scale)
        return LinearWeights(weight, tensors.get("bias"), input_scale(tensors))
