"""Dense weights: float32, bfloat16 or float16. Knows no device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..linear import Axis, LinearWeights, WeightForm, WeightSpec
from .base import Module, Slice, bias_spec


class DenseScheme:
    """`weight` [out, in]."""

    def form(self, module: Module) -> WeightForm:
        return WeightForm("dense", module.weight_dtype.itemsize * 8)

    def create_weights(self, module: Module) -> tuple[WeightSpec, ...]:
        shape = (module.out_features, module.in_features)
        return (WeightSpec("weight", shape, module.weight_dtype, (Axis("out"), Axis("in"))), *bias_spec(module))

    def to_canonical(self, tensors: Mapping[str, torch.Tensor], module: Module, part: Slice) -> LinearWeights:
        return LinearWeights(tensors["weight"], tensors.get("bias"))
