"""fp8 and int8 linears under the interpreter, against float64 from the same codes."""

from __future__ import annotations

import pytest
import torch

from octavo.benchmarks.gpu.cases import Dtype, ScaledCase
from octavo.benchmarks.gpu.checks import Place, check
from octavo.kernels.gpu.config import Tile
from octavo.kernels.gpu.device import DEVICES, Device

SPLIT = Tile("split", 16, 32, 64, 4, 2)
STREAM = Tile("stream", 32, 64, 64, 4, 2)
H100 = Place(torch.device("cpu"), DEVICES[90])
SMALL = Place(torch.device("cpu"), Device(90, 3, 232_448))  # three multiprocessors: blocks walk over several tiles

tiles = pytest.mark.parametrize("tile", [SPLIT, STREAM], ids=["split", "stream"])


@pytest.mark.parametrize("op", ["fp8", "int8"])
@pytest.mark.parametrize("m", [1, 15, 16, 17])
@pytest.mark.parametrize(("n", "k"), [(32, 64), (33, 80), (31, 577), (70, 1040)])
def test_few_rows(m: int, n: int, k: int, op: str) -> None:
    check(ScaledCase(op, m, n, k), H100, tile=SPLIT)


@pytest.mark.parametrize("m", [1, 31, 32, 33, 100])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (65, 100), (130, 640)])
@pytest.mark.parametrize("op", ["fp8", "int8"])
def test_many_rows(m: int, n: int, k: int, op: str) -> None:
    check(ScaledCase(op, m, n, k), SMALL, tile=STREAM)


@tiles
@pytest.mark.parametrize(
    ("rows", "group", "x_group"), [(128, 128, 128), (1, 128, None), (1, None, 64), (128, 128, None), (1, 32, 128), (64, 96, 32)]
)
@pytest.mark.parametrize("op", ["fp8", pytest.param("int8", marks=pytest.mark.long)])
def test_groups(op: str, tile: Tile, rows: int, group: int | None, x_group: int | None) -> None:
    check(ScaledCase(op, 19, 150, 480, rows, group, x_group), H100, tile=tile)


@tiles
@pytest.mark.parametrize("out", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_scale_for_all_inputs(tile: Tile, out: Dtype, bias: bool) -> None:
    check(ScaledCase("fp8", 5, 40, 256, static=True, out=out, bias=bias), H100, tile=tile)
