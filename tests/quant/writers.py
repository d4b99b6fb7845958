"""Writers of every layout, from whole numbers to the tensors of a checkpoint, written from the published layouts (QUANTIZATION.md).

They share nothing with quant/schemes: bits are laid out by numpy as a stream of bits, and weights come out in float64 beside the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.quant.linear_format import ActivationFormat, LinearFormat
from octavo.quant.schemes.base import Module

INT8_TOKEN = ActivationFormat("int8", "token", dynamic=True)
INT8_STATIC = ActivationFormat("int8", "tensor", dynamic=False)
FP8_TOKEN = ActivationFormat("fp8_e4m3", "token", dynamic=True)
FP8_STATIC = ActivationFormat("fp8_e4m3", "tensor", dynamic=False)
FP8_GROUP = ActivationFormat("fp8_e4m3", "group", dynamic=True, group_size=128)


@dataclass(frozen=True, eq=False)
class Written:
    """One linear of a checkpoint: its tensors by name, and what they mean: `weight` float64 [N, K]."""

    format: LinearFormat
    tensors: dict[str, Tensor]
    weight: Tensor
    config: dict[str, Any] = field(default_factory=dict)  # `quantization_config` of a checkpoint of such linears

    @property
    def module(self) -> Module:
        n, k = self.weight.shape
        return Module(self.format, k, n, "bias" in self.tensors, torch.float32)

    def with_bias(self, seed: int = 0) -> Written:
        bias = torch.randn(self.weight.shape[0], generator=torch.Generator().manual_seed(seed))
        return replace(self, tensors={**self.tensors, "bias": bias.half()})

    def without(self, name: str) -> Written:
        return replace(self, tensors={key: tensor for key, tensor in self.tensors.items() if key != name})

    def renamed(self, **names: str) -> Written:
        return replace(self, tensors={names.get(key, key): tensor for key, tensor in self.tensors.items()})


def random_integers(shape: Sequence[int], low: int, high: int, seed: int) -> Tensor:
    """Whole numbers low..high, both ends among them, int64."""
    numbers = torch.randint(low, high + 1, tuple(shape), generator=torch.Generator().manual_seed(seed))
    numbers.view(-1)[0], numbers.view(-1)[-1] = low, high
    return numbers


def random_scales(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float16, *, bits: int = 4) -> Tensor:
    """Of a size that makes weights of any width about as large."""
    return ((torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed)) * 0.01 + 0.001) * 16 / (1 << bits)).to(dtype)


def stream(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, L] below 2**bits to int32 words [R, ceil(L * bits / 32)], one stream of bits, lowest first."""
    numbers = codes.numpy().astype(np.int64)
    flat = ((numbers[:, :, None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(len(numbers), -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return torch.from_numpy(np.packbits(flat, axis=1, bitorder="little").view("<i4").copy())


def padded(codes: Tensor, bits: int) -> Tensor:
    """As `stream`, but no code lies in two words: the top bits of a word stay empty."""
    per_word = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word)).reshape(codes.shape[0], -1, per_word)
    words = np.zeros(codes.shape[:2], np.uint32)
    for place in range(per_word):
        words |= codes[:, :, place].numpy().astype(np.uint32) << np.uint32(place * bits)
    return torch.from_numpy(words.view(np.int32))


def spread(groups: Tensor, group_of_column: Tensor) -> Tensor:
    return groups[:, group_of_column].double()


def awq(n: int, k: int, group_size: int | None, *, seed: int = 0, codes: Tensor | None = None, zeros: Tensor | None = None) -> Written:
    size = group_size or k
    codes = random_integers((n, k), 0, 15, seed) if codes is None else codes
    zeros = random_integers((n, k // size), 0, 15, seed + 1) if zeros is None else zeros
    scales = random_scales((n, k // size), seed + 2)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(numbers: Tensor) -> Tensor:
        rows = numbers.t().contiguous()
        return stream(rows.view(rows.shape[0], -1, 8)[:, :, order].flatten(1), 4)

    tensors = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales.t().contiguous()}
    column = torch.arange(k) // size
    weight = (codes.double() - spread(zeros, column)) * spread(scales, column)
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size or -1, "zero_point": True, "version": "gemm"}
    return Written(LinearFormat("awq", 4, "group" if group_size else "channel", group_size, symmetric=False), tensors, weight, config)


def gptq(
    n: int,
    k: int,
    group_size: int | None,
    *,
    bits: int = 4,
    v2: bool = False,
    symmetric: bool = True,
    act_order: bool = False,
    zeros: Tensor | None = None,
    seed: int = 0,
) -> Written:
    """A ragged K has a short last group. Asymmetric v1 has a zero point of 0 too, which wraps around."""
    size = group_size or k
    count = -(-k // size)
    codes = random_integers((n, k), 0, (1 << bits) - 1, seed)
    if zeros is None:
        zeros = torch.full((n, count), 1 << (bits - 1)) if symmetric else random_integers((n, count), 0, (1 << bits) - 1, seed + 1)
    scales = random_scales((n, count), seed + 2, bits=bits)
    index = torch.arange(k) // size
    if act_order:
        index = index[torch.randperm(k, generator=torch.Generator().manual_seed(seed + 3))]
    stored = zeros if v2 else (zeros - 1) % (1 << bits)
    tensors = {
        "qweight": stream(codes, bits).t().contiguous(),
        "qzeros": stream(stored.t().contiguous(), bits),
        "scales": scales.t().contiguous(),
        "g_idx": index.to(torch.int32),
    }
    weight = (codes.double() - spread(zeros, index)) * spread(scales, index)
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size or -1,
        "desc_act": act_order,
        "sym": symmetric,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }
    stored_as = LinearFormat(
        "gptq",
        bits,
        "group" if group_size else "channel",
        group_size,
        symmetric=symmetric,
        act_order=act_order,
        zero_offset=0 if v2 else 1,
    )
    return Written(stored_as, tensors, weight, config)


def _compressed(layout: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}, "input_activations": activations, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def pack_quantized(
    n: int,
    k: int,
    granularity: str = "group",
    group_size: int | None = 32,
    *,
    bits: int = 4,
    symmetric: bool = True,
    act_order: bool = False,
    ten_a_word: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    activation: ActivationFormat | None = None,
    seed: int = 0,
) -> Written:
    middle = 1 << (bits - 1)
    size = group_size if granularity == "group" and group_size else k
    count = k // size
    codes = random_integers((n, k), -middle, middle - 1, seed)
    zeros = torch.zeros(n, count) if symmetric else random_integers((n, count), -middle, middle - 1, seed + 1)
    scales = random_scales((1,) if granularity == "tensor" else (n, count), seed + 2, scale_dtype, bits=bits)
    index = torch.arange(k) // size
    if act_order:
        index = index[torch.randperm(k, generator=torch.Generator().manual_seed(seed + 3))]
    words = padded if ten_a_word else stream
    tensors = {
        "weight_packed": words(codes + middle, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words((zeros + middle).t().contiguous(), bits).t().contiguous()
    if act_order:
        tensors["weight_g_idx"] = index.to(torch.int32)
    weight = (codes.double() - spread(zeros, index)) * spread(
        scales.reshape(1, 1).expand(n, 1) if granularity == "tensor" else scales, index
    )
    args: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": granularity}
    if granularity == "group":
        args["group_size"] = size
    if act_order:
        args["actorder"] = "group"
    stored = LinearFormat(
        "pack-quantized",
        bits,
        granularity,  # type: ignore[arg-type]
        size if granularity == "group" else None,
        symmetric=symmetric,
        act_order=act_order,
        activation=activation,
        padded_words=ten_a_word and bits == 3,
    )
    return Written(stored, tensors, weight, _compressed("pack-quantized", args, None))


def random_fp8(n: int, k: int, seed: int) -> Tensor:
    """All 254 numbers of e4m3."""
    numbers = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    return numbers[random_integers((n, k), 0, 253, seed)].view(torch.float8_e4m3fn)


def fp8(
    n: int,
    k: int,
    granularity: str,
    *,
    layout: str = "float-quantized",
    activation: ActivationFormat | None = FP8_TOKEN,
    block: tuple[int, int] = (128, 128),
    scale_shape: tuple[int, ...] | None = None,
    scale_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Written:
    """compressed-tensors' float-quantized, native fp8 and ModelOpt's; `scale_shape` for one scale a tensor."""
    codes = random_fp8(n, k, seed)
    is_block = granularity == "block"
    if is_block:
        shape: tuple[int, ...] = (-(-n // block[0]), -(-k // block[1]))
    else:
        shape = (n, 1) if granularity == "channel" else (1, 1)
    scales = random_scales(shape, seed + 2, scale_dtype) / 10
    rows, columns = (
        (torch.arange(n) // block[0], torch.arange(k) // block[1]) if is_block else (torch.arange(n) % shape[0], torch.zeros(k).long())
    )
    weight = codes.float().double() * scales.double()[rows][:, columns]
    if layout == "modelopt-fp8":
        stored_scales = scales[:, None, :, None] if is_block else scales.flatten() if granularity == "channel" else scales.reshape(())
    else:
        stored_scales = scales if granularity != "tensor" else scales.reshape((1,) if scale_shape is None else scale_shape)
    tensors = {"weight": codes, "weight_scale": stored_scales.contiguous()}
    if activation is not None and not activation.dynamic:
        tensors["input_scale"] = torch.tensor(0.01)
    stored = LinearFormat(layout, 8, granularity, block=block if is_block else None, activation=activation)  # type: ignore[arg-type]
    args = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": granularity,
        "block_structure": list(block) if is_block else None,
    }
    return Written(stored, tensors, weight, _compressed("float-quantized", args, _activation_args(activation)))


def _activation_args(activation: ActivationFormat | None) -> dict[str, Any] | None:
    if activation is None:
        return None
    kind = "int" if activation.dtype == "int8" else "float"
    args: dict[str, Any] = {"num_bits": 8, "type": kind, "symmetric": activation.symmetric, "dynamic": activation.dynamic}
    args["strategy"] = activation.granularity
    if activation.group_size is not None:
        args["group_size"] = activation.group_size
    return args


def int8(n: int, k: int, granularity: str = "channel", *, activation: ActivationFormat | None = INT8_TOKEN, seed: int = 0) -> Written:
    codes = random_integers((n, k), -128, 127, seed)
    scales = random_scales((n, 1) if granularity == "channel" else (1,), seed + 2, torch.float32, bits=8)
    tensors = {"weight": codes.to(torch.int8), "weight_scale": scales}
    if activation is not None and not activation.dynamic:
        tensors["input_scale"] = torch.tensor([0.02])
    weight = codes.double() * scales.double().reshape(-1, 1)
    args = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": granularity}
    config = _compressed("int-quantized", args, _activation_args(activation))
    return Written(LinearFormat("int-quantized", 8, granularity, activation=activation), tensors, weight, config)  # type: ignore[arg-type]


def dense(n: int, k: int, *, seed: int = 0) -> Written:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5
    return Written(LinearFormat("dense", 16, "tensor"), {"weight": weight}, weight.double())


def rounded(x: Tensor, activation: ActivationFormat | None, static: Tensor | None) -> Tensor:
    """Inputs as the format has them, by a rule of its own: each cell divided by its scale in float32, rounded, multiplied."""
    if activation is None:
        return x.double()
    wide = float(min(32767, (2**31 - 1) // (128 * x.shape[1])))  # sums with int8 weights then fit 32 bits
    limit = {"int8": 127.0, "int16": wide, "fp8_e4m3": 448.0}[activation.dtype]
    out = torch.empty_like(x, dtype=torch.float64)
    size = activation.group_size or x.shape[1]
    for start in range(0, x.shape[1], size):
        cell = x[:, start : start + size]
        zero = torch.zeros(len(x), 1)
        if static is not None:
            scale = static.float().reshape(1, 1)
        elif activation.symmetric:
            scale = cell.abs().amax(1, keepdim=True) / limit
            scale = torch.where(scale == 0, 1.0, scale)
        else:
            low, high = cell.amin(1, keepdim=True).clamp(max=0), cell.amax(1, keepdim=True).clamp(min=0)
            scale = (high - low) / 255.0
            zero = torch.round(-128 - low / scale).clamp(-128, 127)
        value = cell / scale
        if activation.dtype != "fp8_e4m3":
            codes = torch.round(value + zero).clamp(-limit - 1, limit) - zero
        else:
            codes = value.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        out[:, start : start + size] = codes.double() * scale.double()
    return out
