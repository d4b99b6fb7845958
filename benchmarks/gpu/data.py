"""Random weights and inputs of every format, the same on every machine: they are drawn on the CPU. Knows no kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.grouped_linear import GroupedWeight
from octavo.kernels.scaled_linear import ScaledWeight

from .cases import Added, Dtype

DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8 = torch.float8_e4m3fn
_SUPER = 256  # inputs that share a scale of the upper level, as in GGUF's K-quants


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes8(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """int8 codes of all values; fp8 codes of a normal distribution that now and then saturates."""
    if dtype == torch.int8:
        return torch.randint(-128, 128, (rows, columns), generator=generator(seed)).to(torch.int8)
    return (torch.randn(rows, columns, generator=generator(seed)) * 100).clamp(-448, 448).to(dtype)


def scales(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=generator(seed)) / 100 + 1e-4


def bias(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(n, generator=generator(n)).to(dtype).to(device)


def row_inputs(source: str, m: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, or gate and up side by side; a residual; a norm's weight. Magnitudes of rows differ by some thousands."""

    def rows(count: int, seed: int) -> Tensor:
        source = generator(1000 * seed + m + k)
        return torch.randn(count, k, generator=source) * torch.rand(count, 1, generator=source).mul(12).sub(6).exp()

    x = rows(m, 5)
    if source == "silu":
        x = torch.cat([5 * torch.randn(m, k, generator=generator(9)), x], 1)
    return among_nan(x, dtype, device), among_nan(rows(m, 6), dtype, device), rows(1, 7)[0].to(dtype).to(device)


def padded(x: Tensor, columns: int) -> Tensor:
    """8-bit codes with zeros behind them."""
    out = torch.zeros(x.shape[0], columns, dtype=torch.uint8)
    out[:, : x.shape[1]] = x.view(torch.uint8)
    return out.view(x.dtype)


def among_nan(values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values in rows that lie among NaN, which a load outside of them would bring in."""
    m, k = values.shape
    wide = torch.full((m + 2, k + 32), torch.nan, dtype=dtype, device=device)  # multiples of 16, as a model's rows are
    inner = wide[1:-1, 16 : 16 + k]
    inner.copy_(values)
    return inner


def scaled_weight(n: int, k: int, dtype: torch.dtype, rows: int, group: int, device: torch.device) -> ScaledWeight:
    scale = scales(-(-n // rows), -(-k // group), seed=2)
    return ScaledWeight(codes8(n, k, dtype, 1).to(device), scale.to(device), rows, group)


def fp8_weight(n: int, k: int, group: int) -> GroupedWeight:
    """Every finite code, subnormals and both zeros among them."""
    codes = torch.randint(0, 256, (n, k), generator=generator(n + k)).to(torch.uint8)
    codes = torch.where((codes & 0x7F) == 0x7F, 0, codes)
    return GroupedWeight(codes.view(FP8), 8, group, torch.rand(n, k // group, generator=generator(3)) / 1000)


def grouped_weight(
    n: int, k: int, bits: int, group: int, added: Added, *, act_order: bool = False, scale_dtype: torch.dtype = torch.float16
) -> GroupedWeight:
    """Random codes; zero points 0 and the greatest among the others, and one scale of zero."""
    source = generator(n + k + bits + group)
    codes = torch.randint(0, 1 << bits, (n, k), generator=source).to(torch.uint8)
    permutation = torch.randperm(k, generator=source) if act_order else None
    middle = 1 << (bits - 1)
    if added.startswith("two-level"):
        small = torch.randint(0, 64, (2, n, k // group), generator=source).to(torch.uint8)
        over = (torch.rand(2, n, k // _SUPER, generator=source) / 100).to(torch.float16)
        if added == "two-level symmetric":
            return GroupedWeight(codes, bits, group, small[0], zero=middle, super_scale=over[0])
        return GroupedWeight(codes, bits, group, small[0], offset=small[1], super_scale=over[0], super_offset=-over[1])
    scale = (torch.rand(n, k // group, generator=source) / 10 + 0.01).to(scale_dtype)
    scale[0, 0] = 0.0
    if added == "offset":
        return GroupedWeight(codes, bits, group, scale, offset=torch.randn(n, k // group, generator=source).to(scale_dtype))
    if added == "symmetric":
        return GroupedWeight(codes, bits, group, scale, zero=middle, permutation=permutation)
    zeros = torch.randint(0, 1 << bits, (n, k // group), generator=source).to(torch.uint8)
    zeros[:2] = torch.tensor([[0], [(1 << bits) - 1]])[: min(n, 2)]
    return GroupedWeight(codes, bits, group, scale, zeros=zeros, permutation=permutation)


def one_level(weight: GroupedWeight) -> GroupedWeight:
    """With the scales that a GPU holds: two levels as one, rounded to float16."""
    if weight.super_scale is None:
        return weight

    def joined(small: Tensor, over: Tensor) -> Tensor:
        return (small.float() * over.float().repeat_interleave(small.shape[1] // over.shape[1], 1)).half()

    scale = joined(weight.scale, weight.super_scale)
    offset = None if weight.offset is None or weight.super_offset is None else joined(weight.offset, weight.super_offset)
    return GroupedWeight(weight.codes, weight.bits, weight.group_size, scale, zero=weight.zero, offset=offset)
