"""RMS normalization against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference


def exact(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("rows", [0, 1, 7, 65, 300])
@pytest.mark.parametrize("width", [1, 31, 576, 1000])
def test_against_float64(rows: int, width: int) -> None:
    buffer, target = torch.randn(rows + 2, width + 9) * 3, torch.full((rows + 2, width + 5), 7.0)
    x, out, weight = buffer[1 : rows + 1, 4 : 4 + width], target[1 : rows + 1, 2 : 2 + width], torch.randn(width)
    before = buffer.clone()
    assert rms_norm(x, weight, 1e-5, out=out) is out
    torch.testing.assert_close(out.double(), exact(x, weight, 1e-5), rtol=1e-6, atol=1e-9)
    assert torch.equal(buffer, before)
    residual = torch.randn(rows, width)
    total = residual + x
    add_rms_norm(x, residual, weight, 1e-5, out=out)
    assert torch.equal(residual, total)
    torch.testing.assert_close(out.double(), exact(total, weight, 1e-5), rtol=1e-6, atol=1e-9)
    out.fill_(7.0)
    assert (target == 7.0).all()
    add_rms_norm(x, residual, weight, 1e-5, out=x)  # out may be x
    torch.testing.assert_close(x.double(), exact(residual, weight, 1e-5), rtol=1e-6, atol=1e-9)
    before[1 : rows + 1, 4 : 4 + width] = x
    assert torch.equal(buffer, before)


def test_a_row_does_not_depend_on_others() -> None:
    x, weight = torch.randn(200, 576), torch.randn(576)
    whole = rms_norm(x, weight, 1e-6, out=torch.empty_like(x))
    assert torch.equal(rms_norm(x[17:18], weight, 1e-6, out=torch.empty(1, 576)), whole[17:18])


def test_zeros_and_nan() -> None:
    x = torch.zeros(2, 40)
    x[1, 3] = torch.nan
    out = rms_norm(x, torch.ones(40), 1e-6, out=torch.empty_like(x))
    assert (out[0] == 0).all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_take_the_reference(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(5, 64).to(dtype), torch.randn(5, 64).to(dtype), torch.randn(64)
    assert torch.equal(rms_norm(x, weight, 1e-6, out=torch.empty_like(x)), rms_norm_reference(x, weight, 1e-6))
    total = residual + x
    out = add_rms_norm(x, residual, weight, 1e-6, out=torch.empty_like(x))
    assert torch.equal(residual, total)
    torch.testing.assert_close(out.double(), exact(total, weight, 1e-6), rtol=2**-8, atol=1e-3)


def test_refusals() -> None:
    x, weight = torch.randn(4, 32), torch.randn(32)
    for bad_x, bad_weight, out, text in (
        (x, weight, torch.empty(4, 31), "x and out"),
        (x, weight[:31], torch.empty(4, 32), "weight"),
        (x, weight.half(), torch.empty(4, 32), "float32 weight"),
        (torch.randn(32, 4).t(), weight, torch.empty(4, 32), "contiguous"),
    ):
        with pytest.raises(ValueError, match=text):
            rms_norm(bad_x, bad_weight, 1e-6, out=out)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(x, torch.randn(3, 32), weight, 1e-6, out=torch.empty(4, 32))
