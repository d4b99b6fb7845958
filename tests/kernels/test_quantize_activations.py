"""Rounding of inputs, against the same rule written element by element in numpy."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from octavo.kernels.quantize_activations import quantize_dequantize


def e4m3(value: np.ndarray) -> np.ndarray:
    """To the nearest e4m3 number, ties to the even code; from the format's definition: 1-4-3 bits, bias 7, subnormals, up to 448."""
    numbers = np.array([(code % 8 / 8 + (code >= 8)) * 2.0 ** (max(code // 8, 1) - 7) for code in range(127)])
    size = np.abs(value.astype(np.float64))
    above = np.clip(np.searchsorted(numbers, size), 1, 126)
    low, high = size - numbers[above - 1], numbers[above] - size
    code = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    return np.copysign(numbers[code], value).astype(np.float32)


def cell_by_cell(cell: np.ndarray, dtype: str) -> np.ndarray:
    """One cell with its own symmetric scale."""
    limit = np.float32(448 if dtype == "fp8_e4m3" else 127)
    scale = np.abs(cell).max() / limit
    if scale == 0:
        return np.zeros_like(cell)
    value = cell / scale
    rounded = e4m3(value) if dtype == "fp8_e4m3" else np.rint(value)
    return rounded * scale


def inputs(m: int, k: int) -> torch.Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)) * torch.logspace(-3, 3, m)[:, None]
    x[m // 2] = 0.0
    return x


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize(("k", "group_size"), [(1, None), (33, None), (128, 64), (100, 64), (30, 64), (576, 128), (9, 1)])
def test_dynamic_scales(dtype: Literal["int8", "fp8_e4m3"], k: int, group_size: int | None) -> None:
    """A scale a token, or a group of its inputs, of which the last may be short."""
    x = inputs(7, k)
    size = group_size or k
    wanted = np.concatenate(
        [np.stack([cell_by_cell(row[start : start + size], dtype) for row in x.numpy()]) for start in range(0, k, size)], axis=1
    )
    found = quantize_dequantize(x, dtype, group_size=group_size)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(wanted))


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_static_scale_saturates(dtype: Literal["int8", "fp8_e4m3"]) -> None:
    scale, low, high = 0.5, *((-128, 127) if dtype == "int8" else (-448, 448))
    x = torch.tensor([[1e9, -1e9, high * scale, low * scale, high * scale * 1.2, low * scale * 1.2, 0.0, scale]])
    found = quantize_dequantize(x, dtype, static_scale=torch.tensor([scale]))
    assert found.tolist() == [[high * scale, low * scale, high * scale, low * scale, high * scale, low * scale, 0.0, scale]]


def test_asymmetric_int8_spans_the_range_and_keeps_zero() -> None:
    x = torch.tensor([[0.0, 2.55, 1.0, 0.01], [-1.0, -2.55, 0.0, -0.3], [0.0, 0.0, 0.0, 0.0], [-1.0, 1.55, 0.0, 0.5]])
    found = quantize_dequantize(x, "int8", symmetric=False)
    torch.testing.assert_close(found, x, rtol=0, atol=0.0051)
    assert (found[x == 0] == 0).all()
    for row in found:
        steps = row / 0.01
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


def test_asymmetric_static_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="static scale must be symmetric"):
        quantize_dequantize(torch.ones(1, 4), "int8", static_scale=torch.tensor([0.1]), symmetric=False)


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("static", [None, torch.tensor([0.1])])
def test_nan_stays(dtype: Literal["int8", "fp8_e4m3"], static: torch.Tensor | None) -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 3.0, 2.0]])
    found = quantize_dequantize(x, dtype, static_scale=static)
    assert found[0, 1].isnan()
    assert found[1].isfinite().all()


@pytest.mark.parametrize("group_size", [None, 48])
def test_fp8_on_the_cpu_is_torchs_own_rounding(group_size: int | None) -> None:
    """Every finite exponent, subnormals, ties and strided rows."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.arange(254, dtype=torch.uint8)[torch.arange(254) % 128 != 127].view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2  # ties
    wide = torch.randn(3, 512, generator=generator) * 2.0 ** torch.randint(-30, 30, (3, 512), generator=generator)
    x = torch.cat([wide, torch.nn.functional.pad(torch.stack([codes[:250], between[:250]]), (0, 262))])
    x[3:, 300] = 448.0  # a scale of 1
    strided = torch.cat([x, x], 1)[:, :512]
    assert torch.equal(quantize_dequantize(strided, "fp8_e4m3", group_size=group_size), through_torch(x, group_size or 512))


def test_an_infinity_poisons_its_token_alone() -> None:
    found = quantize_dequantize(torch.tensor([[1.0, float("inf"), 2.0], [1.0, 3.0, 2.0]]), "fp8_e4m3")
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def through_torch(x: torch.Tensor, size: int) -> torch.Tensor:
    cells = torch.nn.functional.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    scale = cells.abs().amax(-1, keepdim=True) / 448.0
    scale = torch.where(scale == 0, 1.0, scale)
    rounded = (cells / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(1)[:, : x.shape[1]]


def test_no_rows() -> None:
    assert quantize_dequantize(torch.empty(0, 8), "int8", group_size=4).shape == (0, 8)
