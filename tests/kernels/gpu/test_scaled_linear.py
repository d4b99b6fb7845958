"""fp8 and int8 linears under the interpreter, against float64 from the same codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.gpu import scaled_linear as gpu
from octavo.kernels.gpu.config import Tile
from octavo.kernels.gpu.device import DEVICES, Device
from octavo.kernels.gpu.workspace import Workspace
from octavo.kernels.scaled_linear import ScaledWeight, reference

from .guarded import Guarded

SPLIT = Tile("split", 16, 32, 64, 4, 2)
STREAM = Tile("stream", 32, 64, 64, 4, 2)
SMALL = Device(90, 3, 232_448)  # three multiprocessors: blocks walk over several tiles


def codes(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
    return (torch.randn(rows, columns, generator=generator) * 100).clamp(-448, 448).to(dtype)


def padded(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], gpu.padded_inputs(x.shape[1]), dtype=torch.uint8)
    out[:, : x.shape[1]] = x.view(torch.uint8)
    return out.view(x.dtype)


def check(
    tile: Tile, m: int, n: int, k: int, *, dtype: torch.dtype = torch.float8_e4m3fn, rows: int = 1, group: int | None = None,
    x_group: int | None = None, static: bool = False, bias: bool = True, out_dtype: torch.dtype = torch.bfloat16,
    device: Device = DEVICES[90],
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(m + n + k)
    group, x_group = group or k, x_group or k
    weight = ScaledWeight(codes(n, k, dtype, 1), torch.rand(-(-n // rows), -(-k // group), generator=generator) / 100, rows, group)
    x = codes(m, k, dtype, 2)
    x_scale = torch.rand((1, 1) if static else (m, -(-k // x_group)), generator=generator) / 100
    added = torch.randn(n, generator=generator).to(out_dtype) if bias else None
    out = Guarded((m, n), out_dtype, stride=n + 8)
    workspace = Workspace(torch.device("cpu"))
    launched = gpu._launch(tile, padded(x), x_scale, x_group, gpu.pack(weight), added, out.tensor, device=device, workspace=workspace)
    launched()
    out.check()
    wanted = reference(x, x_scale, x_group, weight, added, torch.empty(m, n, dtype=torch.float64))
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}[out_dtype]
    assert float((out.tensor.double() - wanted).abs().max()) <= 1.01 * tolerance * float(wanted.abs().max())
    assert int(workspace.arrived.abs().sum()) == 0
    first = out.tensor.clone()
    launched()
    assert torch.equal(first, out.tensor)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("m", [1, 15, 16, 17])
@pytest.mark.parametrize(("n", "k"), [(32, 64), (33, 80), (31, 577), (70, 1040)])
def test_few_rows(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(SPLIT, m, n, k, dtype=dtype)


@pytest.mark.parametrize("m", [1, 31, 32, 33, 100])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (65, 100), (130, 640)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_many_rows(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(STREAM, m, n, k, dtype=dtype, device=SMALL)


@pytest.mark.parametrize("tile", [SPLIT, STREAM], ids=["split", "stream"])
@pytest.mark.parametrize(
    ("rows", "group", "x_group"), [(128, 128, 128), (1, 128, None), (1, None, 64), (128, 128, None), (1, 32, 128), (64, 96, 32)]
)
def test_groups(tile: Tile, rows: int, group: int | None, x_group: int | None) -> None:
    check(tile, 19, 150, 480, rows=rows, group=group, x_group=x_group)


@pytest.mark.parametrize("tile", [SPLIT, STREAM], ids=["split", "stream"])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_one_scale_for_all_inputs(tile: Tile, out_dtype: torch.dtype, bias: bool) -> None:
    check(tile, 5, 40, 256, static=True, out_dtype=out_dtype, bias=bias)
