"""compressed-tensors' pack-quantized: weight-only integers of 2, 3, 4 or 8 bits, packed along the inputs, stored with an offset."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels.grouped_linear import from_group_of_column
from ..linear import Axis, LinearWeights, WeightForm, WeightSpec
from .base import Module, Slice, bias_spec, check_scales
from .words import num_words, unit, unpack


def has_padded_words(width: int, in_features: int) -> bool:
    """Whether 3-bit codes in rows of `width` words lie ten to a word (compressed-tensors to 0.12), not in one stream of bits (0.20).

    Raises ValueError where both would give such a width, and mean different codes.
    """
    padded = width == num_words(in_features, 3, padded=True)
    if padded and width == num_words(in_features, 3) and in_features > 10:
        raise ValueError(
            f"{in_features} inputs of 3 bits take {width} words in either of the two ways that compressed-tensors packs them, "
            "so which one it is cannot be known: quantize this layer to 4 bits"
        )
    return padded


class PackQuantizedScheme:
    """weight_packed int32 [N, K * b / 32], weight_scale [N, G], asymmetric also weight_zero_point int32 [N * b / 32, G].

    The package packed codes of 3 bits ten to a word once, and now in a stream of bits.

    Codes and zero points are signed and stored plus 2**(b - 1). weight_shape repeats [N, K]. With actorder "group", weight_g_idx gives
    each input's group. G is 1 for one scale a row (or one for all: a scale of [1] is spread over the rows).
    """

    def form(self, module: Module) -> WeightForm:
        stored = module.format
        size = stored.group_size if stored.granularity == "group" else None
        return WeightForm("integer", stored.bits, size, stored.symmetric, stored.act_order, stored.activation)

    def create_weights(self, module: Module) -> tuple[WeightSpec, ...]:
        k, n, stored = module.in_features, module.out_features, module.format
        bits = stored.bits
        size = stored.group_size if stored.granularity == "group" and stored.group_size else k
        padded = stored.padded_words
        packed = unit(bits, padded=padded)
        groups = Axis("none") if stored.act_order else Axis("group", values=size, straddles=True)
        one = stored.granularity == "tensor"
        specs = [
            WeightSpec("weight_packed", (n, num_words(k, bits, padded=padded)), torch.int32, (Axis("out"), Axis("in", *packed))),
            WeightSpec("weight_scale", (1,), None, (Axis("none"),))
            if one
            else WeightSpec("weight_scale", (n, k // size), None, (Axis("out"), groups)),
            WeightSpec("weight_shape", (2,), torch.int64, (Axis("none"),), required=False),
        ]
        if not stored.symmetric:
            shape = (num_words(n, bits, padded=padded), k // size)
            specs.append(WeightSpec("weight_zero_point", shape, torch.int32, (Axis("out", *packed), groups)))
        if stored.act_order:
            specs.append(WeightSpec("weight_g_idx", (k,), torch.int32, (Axis("in"),), required=False))
        return (*specs, *bias_spec(module))

    def to_canonical(self, tensors: Mapping[str, Tensor], module: Module, part: Slice) -> LinearWeights:
        stored = module.format
        size = stored.group_size if stored.granularity == "group" and stored.group_size else module.in_features
        shape = tensors.get("weight_shape")
        if shape is not None and shape.tolist() != [module.out_features, module.in_features]:
            raise ValueError(f"weight_shape says {shape.tolist()}, the config asks for {[module.out_features, module.in_features]}")
        scale = check_scales("weight_scale", tensors["weight_scale"])
        if scale.numel() == 1:
            scale = scale.reshape(1, 1).expand(part.out_features, 1)
        groups = part.groups_of_columns(size)
        if stored.act_order:
            index = tensors.get("weight_g_idx")
            groups = torch.arange(part.in_start, part.in_stop) // size if index is None else index.to(torch.int64)
            if groups.numel() and (int(groups.min()) < 0 or int(groups.max()) >= scale.shape[1]):
                raise ValueError(f"weight_g_idx names groups {int(groups.min())} to {int(groups.max())} of {scale.shape[1]}")
        zeros = None
        if not stored.symmetric:
            zeros = unpack(tensors["weight_zero_point"], stored.bits, 0, padded=stored.padded_words)[: part.out_features]
        codes = unpack(tensors["weight_packed"], stored.bits, 1, padded=stored.padded_words)
        weight = from_group_of_column(
            codes[:, : part.in_features].contiguous(),
            groups,
            bits=stored.bits,
            scale=scale,
            zero=1 << (stored.bits - 1) if zeros is None else 0,
            zeros=zeros,
        )
        return LinearWeights(weight, tensors.get("bias"))
