"""Rounding inputs to the grid that a checkpoint's activations have, kept as floats. Knows no weights.

Codes times scales come back as float32, for kernels that multiply floats: the same numbers as an fp8 or int8 kernel would have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .int8_linear import wide_limit

FP8_MAX = 448.0


@functools.cache
def _fp8_on_cpu() -> Callable[..., None]:
    """The CPU kernel, imported at the first call."""
    from .cpu.round_fp8 import round_fp8

    return round_fp8


def quantize_dequantize(
    x: Tensor,
    dtype: Literal["int8", "int16", "fp8_e4m3"],
    *,
    group_size: int | None = None,
    static_scale: Tensor | None = None,
    symmetric: bool = True,
) -> Tensor:
    """x [M, K] rounded, float32 [M, K].

    One scale for each token, or for each group of `group_size` inputs of a token (the last one may be short): max|x| / 448 for fp8,
    max|x| / 127 for int8, max|x| / wide_limit(K) for int16, (max - min) / 255 for int8 that is not symmetric. With `static_scale`
    (one number) values saturate. NaN stays NaN. Raises ValueError for a static scale without symmetry, which would need a static zero
    point too.
    """
    k = x.shape[1]
    size = k if group_size is None else group_size
    if dtype == "fp8_e4m3" and x.is_cpu and x.dtype == torch.float32 and x.stride(1) == 1:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        _fp8_on_cpu()(x, size, 0.0 if static_scale is None else float(static_scale), out)
        return out
    cells = torch.nn.functional.pad(x.float(), (0, -k % size)).view(x.shape[0], -(-k // size), size)
    if dtype == "int8" and not symmetric:
        if static_scale is not None:
            raise ValueError("inputs with a static scale must be symmetric")
        return _asymmetric(cells).flatten(1)[:, :k]
    limit = {"fp8_e4m3": FP8_MAX, "int8": 127.0, "int16": float(wide_limit(k))}[dtype]
    if static_scale is not None:
        scale = static_scale.float()
    else:
        scale = cells.abs().amax(-1, keepdim=True) / limit
        scale = torch.where(scale == 0, 1.0, scale)
    value = cells / scale
    if dtype == "fp8_e4m3":
        rounded = value.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
    else:
        rounded = torch.round(value).clamp(-limit - 1 if static_scale is not None else -limit, limit)
    return (rounded * scale).flatten(1)[:, :k]


def _asymmetric(cells: Tensor) -> Tensor:
    low, high = cells.amin(-1, keepdim=True).clamp(max=0), cells.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255.0
    scale = torch.where(scale == 0, 1.0, scale)
    zero = torch.round(-128 - low / scale).clamp(-128, 127)
    return (torch.round(cells / scale + zero).clamp(-128, 127) - zero) * scale
