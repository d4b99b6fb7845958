"""Packing canonical quantized weights into the layouts that engines load: AWQ gemm, GPTQ v1, compressed-tensors. Knows no method.

What a method decided is written as it is: nothing is rounded here. Layouts: AutoAWQ awq/modules/linear/gemm.py, AutoGPTQ, and
compressed-tensors' pack-quantized, int-quantized and float-quantized.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels.grouped_linear import GroupedWeight
from ..quant.schemes.awq import pack_awq
from ..quant.schemes.words import pack
from .eight_bit import BLOCK


def _zeros(weight: GroupedWeight) -> Tensor:
    return weight.zeros if weight.zeros is not None else torch.full(weight.scale.shape, weight.zero, dtype=torch.uint8)


def _check(weight: GroupedWeight, layout: str, bits: tuple[int, ...]) -> None:
    if weight.bits not in bits or weight.codes.dtype != torch.uint8 or weight.offset is not None or weight.permutation is not None:
        raise ValueError(f"{layout} holds codes of {' or '.join(map(str, bits))} bits with whole zero points, in the order of the inputs")


def awq_tensors(weight: GroupedWeight) -> dict[str, Tensor]:
    """qweight, qzeros and scales of an AWQ module. Raises ValueError for what the layout cannot hold."""
    _check(weight, "AWQ", (4,))

    def packed(codes: Tensor) -> Tensor:
        return pack_awq(codes.t())

    return {"qweight": packed(weight.codes), "qzeros": packed(_zeros(weight)), "scales": weight.scale.t().to(torch.float16).contiguous()}


def awq_config(group_size: int) -> dict[str, Any]:
    """config.json's quantization_config."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }


def gptq_tensors(weight: GroupedWeight) -> dict[str, Tensor]:
    """qweight, qzeros (less one), scales and g_idx of a GPTQ v1 module. Raises ValueError for what the layout cannot hold."""
    _check(weight, "GPTQ", (2, 4, 8))
    zeros = _zeros(weight)
    if int(zeros.min()) < 1:
        raise ValueError("GPTQ's first layout cannot hold a zero point of 0: write AWQ, or keep zero points at 1 or more")
    return {
        "qweight": pack(weight.codes.t(), weight.bits, 0),
        "qzeros": pack((zeros - 1).t(), weight.bits, 1),
        "scales": weight.scale.t().to(torch.float16).contiguous(),
        "g_idx": (torch.arange(weight.in_features) // weight.group_size).to(torch.int32),
    }


def gptq_config(bits: int, group_size: int, *, symmetric: bool) -> dict[str, Any]:
    """config.json's quantization_config; vLLM asks for every one of these keys."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }


Strategy = Literal["channel", "group", "tensor", "block"]


def compressed_tensors(
    weight: GroupedWeight, *, scale_dtype: torch.dtype = torch.bfloat16, strategy: Strategy | None = None
) -> dict[str, Tensor]:
    """A compressed-tensors module: packed for codes of 4 or 8 bits, plain int8 or float8 for those of W8A8.

    With the strategies "tensor" and "block", whose scales are spread over the rows of `weight`, one of each is written.
    """
    if weight.codes.dtype != torch.uint8:
        scale = weight.scale.to(scale_dtype)
        if strategy == "tensor":
            scale = scale[0].clone()
        elif strategy == "block":
            scale = scale[::BLOCK].contiguous()
        return {"weight": weight.codes, "weight_scale": scale}
    _check(weight, "pack-quantized", (4, 8))
    tensors = {
        "weight_packed": pack(weight.codes, weight.bits, 1),
        "weight_scale": weight.scale.to(scale_dtype),
        "weight_shape": torch.tensor(list(weight.codes.shape), dtype=torch.int64),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = pack(weight.zeros, weight.bits, 0)
    return tensors


def compressed_config(
    weight: GroupedWeight, *, strategy: Strategy | None = None, static_inputs: bool = False, kv_cache: bool = False
) -> dict[str, Any]:
    """config.json's quantization_config for a model whose linears are all like `weight`; W8A8 has dynamic inputs unless told otherwise.

    `strategy` must be given where others of them may have more groups in a row than `weight`.

    `kv_cache`: attention layers have k_scale and v_scale, for a cache in fp8.
    """
    is_fp8, packed = weight.codes.dtype == torch.float8_e4m3fn, weight.codes.dtype == torch.uint8
    strategy = strategy or ("channel" if weight.num_groups == 1 else "group")
    kind: dict[str, Any] = {
        "num_bits": weight.bits,
        "type": "float" if is_fp8 else "int",
        "symmetric": weight.zeros is None,
        "strategy": strategy,
        "group_size": weight.group_size if strategy == "group" else None,
        "dynamic": False,
    }
    if strategy == "block":
        kind["block_structure"] = [BLOCK, BLOCK]
    inputs: dict[str, Any] = {"num_bits": 8, "type": "float" if is_fp8 else "int", "symmetric": True, "strategy": "token", "dynamic": True}
    if static_inputs:
        inputs |= {"strategy": "tensor", "dynamic": False}
    elif strategy == "block":
        inputs |= {"strategy": "group", "group_size": BLOCK}
    cache = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else ("float-quantized" if is_fp8 else "int-quantized"),
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": cache if kv_cache else None,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": kind, "input_activations": None if packed else inputs}},
    }
