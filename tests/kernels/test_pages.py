"""Quantized rows: how far a number moves, and that zeros, tiny numbers, infinities and what is no number keep their meaning."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.kernels.pages import CODE_RANGE, decode, encode, row_width, static_scales, storage_dtype

CODES = tuple(CODE_RANGE)
# Half a step of a float8's mantissa, of the number itself; half a step of int8, of the row's greatest.
RELATIVE = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3, torch.int8: 0.0}
OF_GREATEST = {torch.float8_e4m3fn: 2**-10 / 448, torch.float8_e5m2: 2**-17 / 57344, torch.int8: 0.5 / 127}


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_number_moves_by_half_a_step_at_most(dtype: torch.dtype, size: float) -> None:
    x = torch.randn(50, 3, 64).double() * size
    rows = encode(x.float(), dtype)
    assert rows.shape == (50, 3, row_width(64, dtype))
    assert rows.dtype == storage_dtype(dtype) == torch.uint8
    bound = x.abs() * RELATIVE[dtype] + x.abs().amax(-1, keepdim=True) * OF_GREATEST[dtype]
    assert ((decode(rows, dtype) - x).abs() <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", CODES)
def test_zeros_have_scale_one(dtype: torch.dtype) -> None:
    rows = encode(torch.zeros(2, 8), dtype)
    assert not rows[..., :8].any()
    assert rows[..., 8:].contiguous().view(torch.float32).flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", CODES)
def test_numbers_near_nothing_do_not_grow(dtype: torch.dtype) -> None:
    x = torch.full((1, 8), 1e-44)
    x[0, 0] = -3e-39
    assert (decode(encode(x, dtype), dtype) - x).abs().max() <= 2.0**-126


@pytest.mark.parametrize("dtype", CODES)
def test_what_is_no_number_stays_visible(dtype: torch.dtype) -> None:
    x = torch.randn(4, 16)
    x[1, 3], x[2, 5], x[3] = math.nan, math.inf, math.nan
    for scale in (None, torch.tensor(0.5)):
        numbers = decode(encode(x, dtype, scale), dtype)
        assert numbers[0].isfinite().all()
        assert numbers[[1, 3]].isnan().all()
        if scale is None:
            assert numbers[2].isnan().all()
        else:  # beyond the range: saturates
            assert numbers[2, 5] == CODE_RANGE[dtype][1] * 0.5


@pytest.mark.parametrize("dtype", CODES)
def test_a_static_scale_saturates(dtype: torch.dtype) -> None:
    low, high = CODE_RANGE[dtype]
    scales = torch.tensor([2.0, 0.25])[:, None]
    x = torch.tensor([[1e9, -1e9, 1.0, 0.0]]).expand(2, 4)
    assert torch.equal(
        decode(encode(x, dtype, scales), dtype),
        torch.tensor([[2 * high, 2 * low, 0.0 if dtype == torch.int8 else 1.0, 0.0], [high / 4, low / 4, 1.0, 0.0]]),
    )


def test_static_scales_of_a_wrong_kind_are_refused() -> None:
    device = torch.device("cpu")
    assert static_scales(None, 3, device) is None
    assert static_scales(0.5, 3, device).tolist() == [0.5] * 3
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="above 0"):
            static_scales(wrong, 3, device)
    for tensor in (torch.ones(2), torch.ones(3).double(), torch.ones(3, 1)):
        with pytest.raises(ValueError, match=r"float32 \[3\]"):
            static_scales(tensor, 3, device)
