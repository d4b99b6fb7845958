"""The unquantized scheme: one dense weight and perhaps a bias, in float32, bfloat16 or float16. Knows no device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..dense_kernels import dense_kernels
from ..linear import Axis, LinearKernel, LinearSpec, Selection, WeightSpec, select_kernel


def create_weights(spec: LinearSpec) -> dict[str, WeightSpec]:
    """The tensors a dense linear is made of: `weight` [out, in] and, where it has one, `bias` [out]."""
    out_axis, in_axis = Axis("out"), Axis("in")
    weights = {"weight": WeightSpec("weight", (spec.out_features, spec.in_features), spec.weight_dtype, (out_axis, in_axis))}
    if spec.has_bias:
        weights["bias"] = WeightSpec("bias", (spec.out_features,), spec.weight_dtype, (out_axis,))
    return weights


def process_weights_after_loading(tensors: Mapping[str, torch.Tensor], spec: LinearSpec) -> tuple[LinearKernel, Selection]:
    """Choose a kernel for `spec` and give it the weights."""
    selection = select_kernel(spec, dense_kernels(spec.device))
    return selection.kernel(spec, tensors["weight"], tensors.get("bias")), selection
