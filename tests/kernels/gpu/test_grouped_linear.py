"""Linears over grouped quantized weights under the interpreter, against float64 from the same integers."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.gpu import grouped_linear as gpu
from octavo.kernels.gpu.config import Tile
from octavo.kernels.gpu.device import DEVICES
from octavo.kernels.gpu.grouped_format import pack, rows
from octavo.kernels.gpu.workspace import Workspace
from octavo.kernels.grouped_linear import GroupedWeight, dequantize

from .guarded import Guarded

TILE = Tile("split", 16, 64, 64, 4, 2)


def make(
    n: int, k: int, bits: int, group: int, *, symmetric: bool = False, act_order: bool = False, scale_dtype: torch.dtype = torch.float16
) -> GroupedWeight:
    """Random codes; one group of zeros, zero points 0 and 2 ** bits - 1 among the others."""
    generator = torch.Generator().manual_seed(n + k + bits + group)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator).to(torch.uint8)
    scale = (torch.rand(n, k // group, generator=generator) / 10 + 0.01).to(scale_dtype)
    scale[0, 0] = 0.0
    zeros = torch.randint(0, 1 << bits, (n, k // group), generator=generator).to(torch.uint8)
    zeros[:2] = torch.tensor([[0], [(1 << bits) - 1]])[: min(n, 2)]
    permutation = torch.randperm(k, generator=generator) if act_order else None
    if symmetric:
        return GroupedWeight(codes, bits, group, scale, zero=1 << (bits - 1), permutation=permutation)
    return GroupedWeight(codes, bits, group, scale, zeros=zeros, permutation=permutation)


def two_level(n: int, k: int, bits: int, group: int, *, minima: bool) -> GroupedWeight:
    """As GGUF's K-quants: whole scales (and minima) of groups under a float for each super-group of 256 inputs."""
    generator = torch.Generator().manual_seed(n + k + bits)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator).to(torch.uint8)
    small = torch.randint(0, 64, (2, n, k // group), generator=generator).to(torch.uint8)
    over = (torch.rand(2, n, k // 256, generator=generator) / 100).to(torch.float16)
    if minima:
        return GroupedWeight(codes, bits, group, small[0], offset=small[1], super_scale=over[0], super_offset=-over[1])
    return GroupedWeight(codes, bits, group, small[0], zero=1 << (bits - 1), super_scale=over[0])


def one_level(weight: GroupedWeight) -> GroupedWeight:
    """With the scales that a GPU holds, rounded to float16."""
    times = weight.scale.shape[1] // weight.super_scale.shape[1]
    scale = (weight.scale.float() * weight.super_scale.float().repeat_interleave(times, 1)).half()
    offset = None if weight.offset is None else (weight.offset.float() * weight.super_offset.float().repeat_interleave(times, 1)).half()
    return GroupedWeight(weight.codes, weight.bits, weight.group_size, scale, zero=weight.zero, offset=offset)


def fp8(n: int, k: int, group: int) -> GroupedWeight:
    """Every finite code, subnormals and both zeros among them."""
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 256, (n, k), generator=generator).to(torch.uint8)
    codes = torch.where((codes & 0x7F) == 0x7F, 0, codes)
    scale = torch.rand(n, k // group, generator=generator) / 1000
    return GroupedWeight(codes.view(torch.float8_e4m3fn), 8, group, scale)


def check(
    weight: GroupedWeight, m: int, *, dtype: torch.dtype = torch.bfloat16, bias: bool = True, tile: Tile = TILE, arch: int = 90
) -> None:
    n, k = weight.codes.shape
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator)
    x_scale = None
    if dtype == torch.float8_e4m3fn:
        x, x_scale = (x * 100).clamp(-448, 448), torch.rand(m, 1, generator=generator)
    x = torch.cat([x, torch.full((m, 16), float("nan"))], 1).to(dtype)[:, :k]  # strided rows, and nothing between them may be read
    out_dtype = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    added = torch.randn(n, generator=generator).to(out_dtype) if bias else None
    out = Guarded((m, n), out_dtype, stride=n + 8)
    workspace = Workspace(torch.device("cpu"))
    packed = pack(weight)
    ordered = x if packed.permutation is None else x.index_select(1, packed.permutation)
    launched = gpu._launch(tile, ordered, packed, added, out.tensor, device=DEVICES[arch], workspace=workspace, x_scale=x_scale)
    launched()
    out.check()
    inputs = x.double() if x_scale is None else x.double() * x_scale.double()
    exact = inputs @ dequantize(weight, torch.float64).T + (0 if added is None else added.double())
    size = (inputs.abs() @ dequantize(weight, torch.float64).abs().T) + exact.abs()
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[out_dtype]
    error = (out.tensor.double() - exact).abs()
    # One rounding of the result, and float32 sums; a scale for every column alone makes the weights themselves be rounded.
    allowed = 1.01 * rounding * exact.abs() + (2 * rounding if packed.scale_rule == "column" else 1e-6) * size
    assert bool((error <= allowed).all()), float((error - allowed).max())
    assert int(workspace.arrived.abs().sum()) == 0
    first = out.tensor.clone()
    launched()
    assert torch.equal(first, out.tensor)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    check(make(70, 256, bits, 64, symmetric=symmetric), 3, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "group", "minima"),
    [(2, 16, True), (3, 16, False), (4, 32, True), (5, 32, True), (6, 16, False), (5, 32, False), (8, 32, False)],
)
def test_two_levels_and_offsets(dtype: torch.dtype, bits: int, group: int, minima: bool) -> None:
    weight = two_level(40, 512, bits, group, minima=minima)
    check(one_level(weight), 3, dtype=dtype)
    assert float((rows(pack(weight), torch.arange(40)) - dequantize(weight)).abs().max()) <= 2**-10 * float(dequantize(weight).abs().max())


@pytest.mark.parametrize(("k", "group"), [(96, 96), (120, 24)])
def test_offsets_of_a_channel_and_of_columns(k: int, group: int) -> None:
    plain = make(20, k, 4, group, symmetric=True)
    check(GroupedWeight(plain.codes, 4, group, plain.scale, offset=torch.randn(20, k // group).half()), 3)


@pytest.mark.parametrize("m", [1, 15, 16, 17, 40])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (63, 256), (129, 1152)])
def test_rows_and_features_off_the_tile(m: int, n: int, k: int) -> None:
    check(make(n, k, 4, 128), m)


@pytest.mark.parametrize(
    ("k", "group"),
    [
        (128, 32),
        (1152, 384),
        (96, 96),
        (160, 32),
        (208, 16),
        (512, 256),
        (120, 24),
        (72, 8),
        (1000, 1000),
        (577, 577),
        (640, 320),
        (16, 16),
    ],
)
@pytest.mark.parametrize("bits", [4, 3])
def test_any_group_size(k: int, group: int, bits: int) -> None:
    check(make(33, k, bits, group), 2)


@pytest.mark.parametrize("group", [64, 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_act_order(group: int, dtype: torch.dtype) -> None:
    check(make(40, 192, 4, group, act_order=True), 5, dtype=dtype)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_scales_of_any_float_dtype(scale_dtype: torch.dtype, bias: bool) -> None:
    check(make(20, 128, 4, 64, scale_dtype=scale_dtype), 2, bias=bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "group"), [(256, 256), (256, 128), (192, 64), (100, 100), (48, 8)])
def test_fp8_weights(dtype: torch.dtype, k: int, group: int) -> None:
    check(fp8(70, k, group), 3, dtype=dtype)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_fp8_inputs(bits: int, group: int) -> None:
    check(make(70, 256, bits, group), 18, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("n", "k", "group"), [(70, 192, 64), (64, 120, 24), (3, 50, 50)])
def test_dequantized(bits: int, act_order: bool, n: int, k: int, group: int) -> None:
    weight = make(n, k, bits, group, act_order=act_order)
    out = Guarded((n, k), torch.float32, stride=k + 4)
    gpu.dequantize(pack(weight), out.tensor)()
    out.check()
    assert torch.equal(out.tensor, dequantize(weight))
    taken = torch.tensor([n - 1, 0, 0])
    assert torch.equal(rows(pack(weight), taken), dequantize(weight)[taken])


@pytest.mark.parametrize("group", [64, 8])
def test_fp8_dequantized(group: int) -> None:
    weight = fp8(10, 128, group)
    out = Guarded((10, 128), torch.float32)
    gpu.dequantize(pack(weight), out.tensor)()
    assert torch.equal(out.tensor, dequantize(weight))
