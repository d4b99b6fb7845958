"""silu(gate) * up against float64."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.silu_mul import reference, silu_mul


@pytest.mark.parametrize("rows", [0, 1, 7, 200])
@pytest.mark.parametrize("width", [1, 33, 1536])
def test_against_float64(rows: int, width: int) -> None:
    buffer, target = torch.randn(rows + 1, 2 * width + 3) * 5, torch.full((rows + 2, width + 5), 7.0)
    gate_up, out = buffer[:rows, 1 : 1 + 2 * width], target[1 : rows + 1, 2 : 2 + width]
    assert silu_mul(gate_up, out=out) is out
    gate, up = gate_up.double().chunk(2, dim=-1)
    torch.testing.assert_close(out.double(), gate * torch.sigmoid(gate) * up, rtol=1e-6, atol=1e-12)
    out.fill_(7.0)
    assert (target == 7.0).all()


def test_far_ends() -> None:
    """Large arguments neither overflow nor lose the sign; NaN stays."""
    gate = torch.tensor([-1e30, -1000.0, -90.0, -50.0, 0.0, 50.0, 1000.0, 1e30, torch.nan])
    out = silu_mul(torch.cat([gate, torch.ones(9)])[None], out=torch.empty(1, 9))[0]
    wanted = (gate.double() * torch.sigmoid(gate.double())).float()
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_take_the_reference(dtype: torch.dtype) -> None:
    gate_up = torch.randn(5, 64).to(dtype)
    assert torch.equal(silu_mul(gate_up, out=torch.empty(5, 32, dtype=dtype)), reference(gate_up))


def test_refusals() -> None:
    for gate_up, out, text in (
        (torch.randn(4, 64), torch.empty(4, 31), "of one dtype"),
        (torch.randn(4, 64), torch.empty(4, 32).half(), "of one dtype"),
        (torch.randn(64, 4).t(), torch.empty(4, 32), "contiguous"),
    ):
        with pytest.raises(ValueError, match=text):
            silu_mul(gate_up, out=out)
