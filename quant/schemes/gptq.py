"""GPTQ's layouts v1 and v2 (AutoGPTQ, GPTQModel): 2, 3, 4 or 8 bits packed along the inputs; v1 stores zero points less one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels.grouped_linear import from_group_of_column
from ..linear import Axis, LinearWeights, WeightForm, WeightSpec
from .base import Module, Slice, bias_spec, check_scales
from .words import num_words, unit, unpack


class GptqScheme:
    """qweight int32 [K * b / 32, N], qzeros int32 [G, N * b / 32], scales [G, N], g_idx int32 [K]; G counts a short last group.

    With act-order, g_idx gives each input's group and every rank needs all groups; without it, g_idx is k // g and may be missing.
    """

    def form(self, module: Module) -> WeightForm:
        stored = module.format
        return WeightForm("integer", stored.bits, stored.group_size, stored.symmetric, stored.act_order)

    def create_weights(self, module: Module) -> tuple[WeightSpec, ...]:
        k, n, stored = module.in_features, module.out_features, module.format
        size, bits = stored.group_size or k, stored.bits
        count = -(-k // size)
        values, words = unit(bits)
        groups = Axis("none") if stored.act_order else Axis("group", values=size, straddles=True)
        return (
            WeightSpec("qweight", (num_words(k, bits), n), torch.int32, (Axis("in", values, words), Axis("out"))),
            WeightSpec("qzeros", (count, num_words(n, bits)), torch.int32, (groups, Axis("out", values, words))),
            WeightSpec("scales", (count, n), None, (groups, Axis("out"))),
            WeightSpec("g_idx", (k,), torch.int32, (Axis("in"),), required=False),
            *bias_spec(module),
        )

    def to_canonical(self, tensors: Mapping[str, Tensor], module: Module, part: Slice) -> LinearWeights:
        stored, groups = module.format, part.groups_of_columns(module.format.group_size or module.in_features)
        scales = check_scales("scales", tensors["scales"])
        if stored.act_order and "g_idx" in tensors:
            groups = tensors["g_idx"].to(torch.int64)
            if groups.numel() and (int(groups.min()) < 0 or int(groups.max()) >= scales.shape[0]):
                raise ValueError(f"g_idx names groups {int(groups.min())} to {int(groups.max())}, and scales has {scales.shape[0]}")
        elif stored.act_order:  # in order, and this rank has the scales of all groups
            groups = torch.arange(part.in_start, part.in_stop) // (stored.group_size or module.in_features)
        elif "g_idx" in tensors:
            _check_in_order(tensors["g_idx"], torch.arange(part.in_start, part.in_stop) // (stored.group_size or module.in_features))
        zeros = unpack(tensors["qzeros"], stored.bits, 1)[:, : part.out_features]
        zeros = (zeros + stored.zero_offset) & ((1 << stored.bits) - 1)
        codes = unpack(tensors["qweight"], stored.bits, 0)[: part.in_features]
        if zeros.is_meta:
            constant, is_constant = 1 << (stored.bits - 1), stored.symmetric
        else:
            constant = int(zeros.flatten()[0]) if zeros.numel() else 0
            is_constant = stored.symmetric and bool((zeros == constant).all())
        if is_constant and constant == (1 << (stored.bits - 1)) - 1 + 2 * stored.zero_offset:
            raise ValueError(
                f"every zero point is {constant}, next to the {1 << (stored.bits - 1)} of a symmetric model: checkpoint_format in "
                "the config, gptq or gptq_v2, is not what the weights were written in"
            )
        weight = from_group_of_column(
            codes.t().contiguous(),
            groups,
            bits=stored.bits,
            scale=scales.t().contiguous(),
            zero=constant if is_constant else 0,
            zeros=None if is_constant else zeros.t().contiguous(),
        )
        return LinearWeights(weight, tensors.get("bias"))


def _check_in_order(index: Tensor, in_order: Tensor) -> None:
    """Raises ValueError for a g_idx that scatters inputs where the config says that nothing does. All zeros is a tool's placeholder."""
    if bool((index != in_order).any()) and bool(index.any()):
        raise ValueError(
            "g_idx does not count up in groups, but the config says desc_act=false: one of them is wrong. "
            "If the model was quantized with desc_act=true, set it so in the config"
        )
