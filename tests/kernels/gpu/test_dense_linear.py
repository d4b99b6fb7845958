"""The dense linear for runs that have to repeat: right, and a row's bits its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from octavo.kernels.gpu import dense_linear
from octavo.kernels.gpu.config import operations, table_architectures, tile_for
from octavo.kernels.gpu.device import DEVICES, FIXED_ROWS, Device
from octavo.kernels.gpu.workspace import Workspace

from .interpreter import products_rounded_once

FEW_SMS = replace(Device(90, 8, DEVICES[90].shared_bytes), fixed_rows=FIXED_ROWS)


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out, workspace = torch.full((len(x), len(weight)), torch.nan, dtype=x.dtype), Workspace(x.device)
    dense_linear.launch(x, weight, bias, out, device=FEW_SMS, workspace=workspace)()
    assert not workspace.arrived.any()
    return out


@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 64), (3, 70, 100), (65, 128, 1000), (130, 1, 640)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(m + n + k)
    x, weight = (torch.randn(rows, k + 8, generator=source).to(dtype)[:, :k] for rows in (m, n))
    bias = torch.randn(n, generator=source).to(dtype) if m > 1 else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = multiply(x, weight, bias).double()
    size = x.double().abs() @ weight.double().abs().T + 1
    assert ((found - exact).abs() <= 2.0 ** (-8 if dtype == torch.bfloat16 else -11) * exact.abs() + 1e-6 * size).all()


def test_a_rows_bits_do_not_depend_on_the_others() -> None:
    source = torch.Generator().manual_seed(0)
    x, weight = torch.randn(150, 1024, generator=source).bfloat16(), torch.randn(70, 1024, generator=source).bfloat16()
    with products_rounded_once():
        whole = multiply(x, weight, None)
        for first, last in ((0, 1), (3, 9), (63, 66), (149, 150), (20, 140)):
            assert torch.equal(multiply(x[first:last], weight, None), whole[first:last])


def test_more_rows_than_counters_are_refused() -> None:
    meta = torch.device("meta")
    x, weight, out = (torch.empty(shape, dtype=torch.bfloat16, device=meta) for shape in ((1 << 23, 1024), (64, 1024), (1 << 23, 64)))
    with pytest.raises(ValueError, match="too many to sum in fixed parts: lower --chunked-prefill-size"):
        dense_linear.launch(x, weight, None, out, device=FEW_SMS, workspace=Workspace(meta))


@pytest.mark.parametrize("arch", table_architectures())
def test_where_rows_are_fixed_torch_multiplies_nothing(arch: int) -> None:
    fixed = replace(DEVICES[arch], fixed_rows=FIXED_ROWS)
    for op in operations(arch):
        tiles = {tile_for(fixed, op, m) for m in (1, 16, 17, 64, 65, 512, 5000)}
        assert len(tiles) == 1, op
        assert tiles.pop().route != "dense", op
