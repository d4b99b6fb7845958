"""Rounding rows of activations to 8-bit codes with scales, as the linears of scaled_linear.py take them. The contract and its reference.

What is rounded is one of four: rows as they are; RMSNorm of rows; RMSNorm of a residual that the rows were added to; SiLU(gate) * up.
Of the last three the values are those of rms_norm.py and silu_mul.py, rounded to the dtype of the rows before they are quantized: so
the codes and scales are those that the unfused operation and `reference` give after it.

One scale for each token, or for each `group` inputs of a token (the last group may be short):

    scale = max|x| / limit, codes = round(x / scale), limit 448 for fp8 (e4m3) and 127 for int8

Both divisions are rounded once, to float32; codes are rounded to the nearest, ties to even; the sign of a zero means nothing. Where
max|x| is below SMALLEST the scale is 0 and so are the codes, for fp8 as for int8. With one static scale for all, codes saturate, at
448 in magnitude or at -128 and 127, and that scale is written for each token. A NaN or an infinity makes the scale of its token or
group NaN, and with it what is computed from that token; the group's codes then mean nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from .gpu.device import device_of, is_gpu
from .rms_norm import add_rms_norm, rms_norm
from .scaled_linear import CODE_DTYPES
from .silu_mul import silu_mul

ALIGNMENT: Final = 16  # columns that codes are padded to a multiple of
LIMITS: Final = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
SMALLEST: Final = 2.0**-64
ROW_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Where M rows of `in_features` inputs go: codes [M, K'], K' the next multiple of 16, and scales float32 [M, ceil(K / group)].

    The codes' columns from `in_features` on are filled with zeros. `group` is a multiple of 32, or at least `in_features`: one scale a
    token. Rows may be strided. Raises ValueError for other shapes and dtypes.
    """

    codes: Tensor
    scales: Tensor
    in_features: int
    group: int

    def __post_init__(self) -> None:
        k, group = self.in_features, self.group
        if self.codes.dtype not in CODE_DTYPES:
            raise ValueError(f"codes must be float8_e4m3fn or int8, not {self.codes.dtype}")
        if group < 1 or (group < k and group % 32):
            raise ValueError(f"groups of inputs must be multiples of 32, not {group}")
        m = self.codes.shape[0]
        wanted = (m, -(-k // ALIGNMENT) * ALIGNMENT)
        if tuple(self.codes.shape) != wanted or self.codes.stride(1) != 1:
            raise ValueError(f"codes must be {wanted} with contiguous rows, not {tuple(self.codes.shape)}, strides {self.codes.stride()}")
        wanted = (m, -(-k // group))
        if tuple(self.scales.shape) != wanted or self.scales.dtype != torch.float32 or self.scales.stride(1) != 1:
            raise ValueError(f"scales must be float32 {wanted} with contiguous rows, not {self.scales.dtype} {tuple(self.scales.shape)}")

    @classmethod
    def empty(cls, m: int, in_features: int, dtype: torch.dtype, *, group: int | None = None, device: torch.device) -> QuantizedRows:
        """Room for M rows; no `group` is one scale a token."""
        group = in_features if group is None else group
        codes = torch.empty(m, -(-in_features // ALIGNMENT) * ALIGNMENT, dtype=dtype, device=device)
        return cls(codes, torch.empty(m, -(-in_features // group), device=device), in_features, group)


def check_rows(name: str, x: Tensor, shape: tuple[int, int], dtype: torch.dtype | None = None) -> None:
    """Raises ValueError where `x` has another shape, is of no float dtype or another than `dtype`, or its rows are not contiguous."""
    if tuple(x.shape) != shape or x.dtype not in ROW_DTYPES or dtype not in (None, x.dtype):
        kind = "bfloat16, float16 or float32" if dtype is None else dtype
        raise ValueError(f"{name} must be {kind} {shape}, not {x.dtype} {tuple(x.shape)}")
    if x.stride(1) != 1:
        raise ValueError(f"rows of {name} must be contiguous, its strides are {x.stride()}")


def check_static_scale(static_scale: Tensor | None, out: QuantizedRows) -> None:
    """Raises ValueError where it is not one float32 number, or groups are asked for beside it."""
    if static_scale is None:
        return
    if static_scale.numel() != 1 or static_scale.dtype != torch.float32:
        raise ValueError(f"a static scale must be one float32 number, not {static_scale.dtype} {tuple(static_scale.shape)}")
    if out.group < out.in_features:
        raise ValueError(f"a static scale is one for all {out.in_features} inputs: it goes without groups of {out.group}")


def reference(x: Tensor, out: QuantizedRows, *, static_scale: Tensor | None = None) -> QuantizedRows:
    """Fills and returns `out` from rows x [M, K] as they are; `static_scale` is one positive float32 number."""
    k = out.in_features
    check_rows("x", x, (out.codes.shape[0], k))
    check_static_scale(static_scale, out)
    limit, group = LIMITS[out.codes.dtype], min(out.group, k)
    cells = pad(x.float(), (0, -k % group)).reshape(x.shape[0], -1, group)
    most = cells.abs().amax(2, keepdim=True)
    if static_scale is None:
        scale = torch.where(most < SMALLEST, 0.0, most / most.new_tensor(limit))
    else:
        scale = static_scale.to(x.device).reshape(()).expand_as(most)
    value = torch.where(scale == 0, cells * 0.0, cells / scale)
    low = -limit - 1 if static_scale is not None and out.codes.dtype == torch.int8 else -limit
    value = value.nan_to_num(0.0).clamp(low, limit).flatten(1)[:, :k]
    rounded = torch.round(value) if out.codes.dtype == torch.int8 else value
    out.codes.view(torch.uint8).zero_()
    out.codes[:, :k] = rounded.to(out.codes.dtype)
    out.scales.copy_(torch.where(most.isfinite(), scale, torch.nan).squeeze(2))
    return out


@functools.cache
def _on_gpu() -> Any:
    """The kernels for NVIDIA GPUs, imported at the first call."""
    from .gpu import quantize_rows as on_gpu

    return on_gpu


def quantize_rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: QuantizedRows, *, residual: Tensor | None = None, static_scale: Tensor | None = None
) -> QuantizedRows:
    """Fills and returns `out` from rms_norm(x), or with a residual from that of residual += x, in place: as rms_norm.py computes it.

    x and residual [M, K] of one dtype; the values that are rounded are of that dtype.
    """
    if out.codes.shape[0] == 0:
        return out
    if is_gpu(x.device):
        launched = _on_gpu().launch_rms_norm(x, weight, eps, out, device=device_of(x.device), residual=residual, static_scale=static_scale)
        launched()
        return out
    values = torch.empty_like(x)
    if residual is None:
        rms_norm(x, weight, eps, out=values)
    else:
        add_rms_norm(x, residual, weight, eps, out=values)
    return reference(values, out, static_scale=static_scale)


def quantize_silu_mul(gate_up: Tensor, out: QuantizedRows, *, static_scale: Tensor | None = None) -> QuantizedRows:
    """Fills and returns `out` from silu_mul(gate_up), gate_up [M, 2 * K], as silu_mul.py computes it."""
    if out.codes.shape[0] == 0:
        return out
    if is_gpu(gate_up.device):
        _on_gpu().launch_silu_mul(gate_up, out, device=device_of(gate_up.device), static_scale=static_scale)()
        return out
    values = gate_up.new_empty(gate_up.shape[0], out.in_features)
    return reference(silu_mul(gate_up, out=values), out, static_scale=static_scale)
