"""FP8 (e4m3) weights: compressed-tensors' float-quantized, the native `fp8` of vLLM, SGLang, DeepSeek and transformers, ModelOpt's.

They differ in names and in what a scale covers: the whole weight, one output feature, or a block of output features and inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels.grouped_linear import from_group_of_column
from ..linear import Axis, LinearWeights, WeightForm, WeightSpec
from .base import Module, Slice, bias_spec, check_scales


class Fp8Scheme:
    """weight float8_e4m3fn [N, K]; weight_scale (also weight_scale_inv): what a code is multiplied with; static input_scale."""

    def form(self, module: Module) -> WeightForm:
        stored = module.format
        size = stored.block[1] if stored.block is not None else stored.group_size
        return WeightForm("fp8", 8, size, activation=stored.activation)

    def create_weights(self, module: Module) -> tuple[WeightSpec, ...]:
        k, n, stored = module.in_features, module.out_features, module.format
        axes: tuple[Axis, ...]
        shape: tuple[int, ...]
        if stored.block is not None:
            rows, columns = stored.block
            shape = (-(-n // rows), -(-k // columns))
            if stored.layout == "modelopt-fp8":
                shape = (shape[0], 1, shape[1], 1)
            over_rows, over_columns = Axis("out", rows, straddles=True), Axis("group", columns, straddles=True)
            axes = (over_rows, over_columns) if len(shape) == 2 else (over_rows, Axis("none"), over_columns, Axis("none"))
        elif stored.granularity == "channel":
            shape, axes = ((n,), (Axis("out"),)) if stored.layout == "modelopt-fp8" else ((n, 1), (Axis("out"), Axis("none")))
        else:
            shape, axes = (), ()
        specs = [
            WeightSpec("weight", (n, k), torch.float8_e4m3fn, (Axis("out"), Axis("in"))),
            WeightSpec("weight_scale", shape, None, axes, aliases=("weight_scale_inv",)),
        ]
        if stored.activation is not None and not stored.activation.dynamic:
            specs.append(WeightSpec("input_scale", (), None, (), aliases=("activation_scale",)))
        return (*specs, *bias_spec(module))

    def to_canonical(self, tensors: Mapping[str, Tensor], module: Module, part: Slice) -> LinearWeights:
        stored, codes = module.format, tensors["weight"]
        nans = 0 if codes.is_meta else int(((codes.view(torch.uint8) & 0x7F) == 0x7F).sum())
        if nans:
            raise ValueError(f"weight holds {nans} NaN of {codes.numel()} fp8 values: the checkpoint is damaged")
        scale = check_scales("weight_scale", tensors["weight_scale"])
        if stored.block is not None:
            rows, columns = stored.block
            block = torch.arange(part.out_start, part.out_stop) // rows - part.out_start // rows
            scale = scale.reshape(scale.shape[0], -1)[block]
        else:
            columns = module.in_features
            scale = scale.reshape(-1, 1).expand(part.out_features, 1)
        groups = part.groups_of_columns(columns)
        raw = from_group_of_column(codes.view(torch.uint8), groups, bits=8, scale=scale.contiguous())
        weight = type(raw)(raw.codes.view(torch.float8_e4m3fn), 8, raw.group_size, raw.scale)
        return LinearWeights(weight, tensors.get("bias"), input_scale(tensors))


def input_scale(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The static scale of the inputs, float32 [1]; None where there is none. Raises ValueError for one that is not above 0."""
    scale = tensors.get("input_scale")
    if scale is None:
        return None
    value = float(scale.float().reshape(-1)[0])
    if not 0 < value < float("inf"):
        raise ValueError(f"input_scale is {value}: it must be a number above 0")
    return scale.float().reshape(1)
