"""AWQ's "gemm" layout (AutoAWQ awq/modules/linear/gemm.py): 4 bits, packed along the output features in an interleaved order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels.grouped_linear import from_group_of_column
from ..linear import Axis, LinearWeights, WeightForm, WeightSpec
from .base import Module, Slice, bias_spec, check_scales
from .words import pack, unpack

# Nibble i of a word is column ORDER[i] of eight; reading takes the inverse.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack_awq(words: Tensor) -> Tensor:
    """int32 [R, C] to uint8 codes [R, 8 * C] in the order of the columns."""
    return unpack(words, 4, 1).view(words.shape[0], -1, 8)[:, :, list(_INVERSE)].reshape(words.shape[0], -1)


def pack_awq(codes: Tensor) -> Tensor:
    """Codes below 16 [R, 8 * C] to int32 words [R, C]."""
    return pack(codes.reshape(codes.shape[0], -1, 8)[:, :, list(ORDER)].flatten(1), 4, 1)


class AwqScheme:
    """qweight int32 [K, N / 8], qzeros int32 [K / g, N / 8] with true zero points, scales [K / g, N]."""

    def form(self, module: Module) -> WeightForm:
        stored = module.format
        return WeightForm("integer", 4, stored.group_size, stored.symmetric)

    def create_weights(self, module: Module) -> tuple[WeightSpec, ...]:
        k, n, size = module.in_features, module.out_features, module.format.group_size or module.in_features
        packed, groups = Axis("out", values=8), Axis("group", values=size, straddles=True)
        return (
            WeightSpec("qweight", (k, n // 8), torch.int32, (Axis("in"), packed)),
            WeightSpec("qzeros", (k // size, n // 8), torch.int32, (groups, packed)),
            WeightSpec("scales", (k // size, n), None, (groups, Axis("out"))),
            *bias_spec(module),
        )

    def to_canonical(self, tensors: Mapping[str, Tensor], module: Module, part: Slice) -> LinearWeights:
        weight = from_group_of_column(
            unpack_awq(tensors["qweight"]).t().contiguous(),
            part.groups_of_columns(module.format.group_size or module.in_features),
            bits=4,
            scale=check_scales("scales", tensors["scales"]).t().contiguous(),
            zeros=unpack_awq(tensors["qzeros"]).t().contiguous(),
        )
        return LinearWeights(weight, tensors.get("bias"))
