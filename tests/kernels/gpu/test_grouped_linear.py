"""Linears over grouped quantized weights under the interpreter, against float64 from the same integers."""

from __future__ import annotations

import pytest
import torch

from octavo.benchmarks.gpu.cases import Added, DequantizeCase, Dtype, GroupedCase
from octavo.benchmarks.gpu.checks import Place, check
from octavo.benchmarks.gpu.data import grouped_weight
from octavo.kernels.gpu.config import Tile
from octavo.kernels.gpu.device import DEVICES
from octavo.kernels.gpu.grouped_format import pack, rows
from octavo.kernels.grouped_linear import dequantize

TILE = Tile("split", 16, 64, 64, 4, 2)
H100 = Place(torch.device("cpu"), DEVICES[90])

dtypes = pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.long)])


def check_case(case: GroupedCase | DequantizeCase) -> None:
    check(case, H100, tile=TILE)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("added", ["symmetric", "zeros"])
@dtypes
def test_bits(bits: int, added: Added, dtype: Dtype) -> None:
    check_case(GroupedCase(f"w{bits}a16", 3, 70, 256, 64, added, dtype=dtype))


@dtypes
@pytest.mark.parametrize(
    ("bits", "group", "added"),
    [
        (2, 16, "two-level"),
        (3, 16, "two-level symmetric"),
        (4, 32, "two-level"),
        (5, 32, "two-level"),
        (6, 16, "two-level symmetric"),
        (5, 32, "two-level symmetric"),
        (8, 32, "two-level symmetric"),
    ],
)
def test_two_levels_and_offsets(dtype: Dtype, bits: int, group: int, added: Added) -> None:
    check_case(GroupedCase(f"w{bits}a16", 3, 40, 512, group, added, dtype=dtype))
    weight = grouped_weight(40, 512, bits, group, added)
    assert float((rows(pack(weight), torch.arange(40)) - dequantize(weight)).abs().max()) <= 2**-10 * float(dequantize(weight).abs().max())


@pytest.mark.parametrize(("k", "group"), [(96, 96), (120, 24)])
def test_offsets_of_a_channel_and_of_columns(k: int, group: int) -> None:
    check_case(GroupedCase("w4a16", 3, 20, k, group, "offset"))


@pytest.mark.parametrize("m", [1, 15, 16, 17, 40])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (63, 256), (129, 1152)])
def test_rows_and_features_off_the_tile(m: int, n: int, k: int) -> None:
    check_case(GroupedCase("w4a16", m, n, k, 128))


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
    check_case(GroupedCase(f"w{bits}a16", 2, 33, k, group))


@pytest.mark.parametrize("group", [64, 24])
@dtypes
def test_act_order(group: int, dtype: Dtype) -> None:
    check_case(GroupedCase("w4a16", 5, 40, 192, group, act_order=True, dtype=dtype))


@pytest.mark.parametrize("scales", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("bias", [True, False])
def test_scales_of_any_float_dtype(scales: Dtype, bias: bool) -> None:
    check_case(GroupedCase("w4a16", 2, 20, 128, 64, bias=bias, scales=scales))


@dtypes
@pytest.mark.parametrize(("k", "group"), [(256, 256), (256, 128), (192, 64), (100, 100), (48, 8)])
def test_fp8_weights(dtype: Dtype, k: int, group: int) -> None:
    check_case(GroupedCase("w8a16_fp8", 3, 70, k, group, dtype=dtype))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_fp8_inputs(bits: int, group: int) -> None:
    check_case(GroupedCase(f"w{bits}a8", 18, 70, 256, group))


@pytest.mark.parametrize("bits", [3, 4, *(pytest.param(bits, marks=pytest.mark.long) for bits in (2, 8))])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("n", "k", "group"), [(70, 192, 64), (64, 120, 24), (3, 50, 50)])
def test_dequantized(bits: int, act_order: bool, n: int, k: int, group: int) -> None:
    check_case(DequantizeCase(bits, n, k, group, act_order=act_order))


@pytest.mark.parametrize("group", [64, 8])
def test_fp8_dequantized(group: int) -> None:
    check_case(DequantizeCase(8, 10, 128, group, is_fp8=True))
