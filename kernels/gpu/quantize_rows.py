"""Rows of activations to fp8 or int8 codes, after a norm or a gate or as they are. The contract stands in kernels/quantize_rows.py.

One program a row, whose cells [groups of inputs, inputs of a group] it holds all at once where the row is short enough (`_whole`);
else it walks over the row in tiles: for the sum of squares, for each group's maximum, and to round (`_long`).

Codes are x / scale rounded to float32 once, as a division is, at the price of three multiplications: with the scale's correctly rounded
reciprocal, a product and one correction by the exact remainder give the correctly rounded quotient (P. Markstein, "Computation of
elementary functions on the IBM RISC System/6000 processor", 1990).
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantize_rows import LIMITS, SMALLEST, QuantizedRows, check_rows, check_static_scale
from .device import Device
from .launch import Launch

_WHOLE_CELLS: Final = 16384  # the most that a program holds at once
_LONG_CELLS: Final = 4096
_CELLS_PER_WARP: Final = 512  # 16 a thread: two loads of 16 bytes on their way

_INFINITY = tl.constexpr(0x7F800000)
_SMALLEST = tl.constexpr(SMALLEST)
# 1.5 * 2 ** 23: a sum with it has no room for fractions, so that the addition rounds to whole numbers, ties to even.
_TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def silu_mul(gate, up, dtype: tl.constexpr):
    """SiLU(gate) * up of floats as kernels/silu_mul.py stores it, back in float32."""
    gate = gate.to(tl.float32)
    return (gate * tl.sigmoid(gate) * up.to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def inverse_rms(sum_of_squares, k, eps):
    """1 / sqrt(mean + eps)"""
    return tl.rsqrt(sum_of_squares / k + eps)


@triton.jit
def _reciprocal(value):
    """1 / value rounded once, by two of Newton's steps: without the call for rare operands that tl.div_rn is.

    Where all bits of the mantissa are ones, the last bit may be wrong; of the quotients only that of the value by itself is then.
    """
    near = 1.0 / value
    near = tl.fma(tl.fma(near, -value, 1.0), near, near)
    return tl.fma(tl.fma(near, -value, 1.0), near, near)


@triton.jit
def _divide(value, divisor, reciprocal):
    """value / divisor rounded once, given the correctly rounded reciprocal. Zeros as divisor and reciprocal give zero."""
    quotient = value * reciprocal
    return tl.fma(tl.fma(quotient, -divisor, value), reciprocal, quotient)


@triton.jit
def _magnitudes(value):
    """|value| as whole numbers of the same order, in which infinity and NaN are the greatest."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scales(most, static_scale, LIMIT: tl.constexpr, STATIC: tl.constexpr):
    """Of groups whose greatest magnitudes are `most`: the scale to store, the one to divide by and its reciprocal, 0 for codes of 0."""
    is_finite = most < _INFINITY
    if STATIC:
        scale = tl.where(is_finite, tl.load(static_scale), 0.0)
    else:
        greatest = tl.where(is_finite, most, 0).to(tl.float32, bitcast=True)
        scale = tl.where(greatest < _SMALLEST, 0.0, _divide(greatest, LIMIT, 1.0 / LIMIT))
    reciprocal = tl.where(scale == 0.0, 0.0, _reciprocal(tl.where(scale == 0.0, 1.0, scale)))
    return tl.where(is_finite, scale, float("nan")), scale, reciprocal


@triton.jit
def _round(value, scale, reciprocal, LIMIT: tl.constexpr, STATIC: tl.constexpr, IS_INT: tl.constexpr):
    """Codes of `value` over `scale`."""
    if STATIC:
        value = tl.minimum(tl.maximum(value, scale * (-LIMIT - IS_INT)), scale * LIMIT)
    quotient = _divide(value, scale, reciprocal)
    if IS_INT:
        rounded = (quotient + _TO_INTEGER).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        rounded = quotient.to(tl.float8e4nv)
    return rounded


@triton.jit
def _load(x, k, column, inside, GATED: tl.constexpr):
    """A row's values at `column`, float32."""
    raw = tl.load(x + column, mask=inside, other=0.0)
    if GATED:
        value = silu_mul(raw, tl.load(x + k + column, mask=inside, other=0.0), raw.dtype)
    else:
        value = raw.to(tl.float32)
    return value


@triton.jit
def _add(x, residual, column, inside):
    """residual += x at `column`; gives the sum as it is stored, float32."""
    total = tl.load(x + column, mask=inside, other=0.0).to(tl.float32) + tl.load(residual + column, mask=inside, other=0.0).to(tl.float32)
    stored = total.to(residual.dtype.element_ty)
    tl.store(residual + column, stored, mask=inside)
    return stored.to(tl.float32)


@triton.jit
def _normed(value, inverse, weight, column, inside, dtype: tl.constexpr):
    """Values times 1 / rms times weight as kernels/rms_norm.py stores them, back in float32."""
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    return (value * inverse * factor).to(dtype).to(tl.float32)


@triton.jit
def _whole(
    x, residual, weight, static_scale, codes, scales, kept, eps,
    k, k_padded, group, num_groups, x_stride, residual_stride, codes_stride, scales_stride, kept_stride,
    GATED: tl.constexpr, NORMED: tl.constexpr, ADDED: tl.constexpr, STATIC: tl.constexpr, KEEP: tl.constexpr, IS_INT: tl.constexpr,
    LIMIT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    dtype: tl.constexpr = x.dtype.element_ty
    groups = tl.arange(0, GROUPS)
    within = tl.arange(0, BLOCK)[None, :]
    column = groups[:, None] * group + within
    inside = (within < group) & (column < k)
    if ADDED:
        value = _add(x, residual + row * residual_stride, column, inside)
    else:
        value = _load(x, k, column, inside, GATED)
    if NORMED:
        value = _normed(value, inverse_rms(tl.sum(value * value), k, eps), weight, column, inside, dtype)
    if KEEP:
        tl.store(kept + row * kept_stride + column, value.to(dtype), mask=inside)
    stored, scale, reciprocal = _scales(tl.max(_magnitudes(value), 1), static_scale, LIMIT, STATIC)
    tl.store(scales + row * scales_stride + groups, stored, mask=groups < num_groups)
    rounded = _round(value, scale[:, None], reciprocal[:, None], LIMIT, STATIC, IS_INT)
    tl.store(codes + row * codes_stride + column, rounded, mask=(within < group) & (column < k_padded))


@triton.jit
def _long(
    x, residual, weight, static_scale, codes, scales, kept, eps,
    k, k_padded, group, num_groups, x_stride, residual_stride, codes_stride, scales_stride, kept_stride,
    GATED: tl.constexpr, NORMED: tl.constexpr, ADDED: tl.constexpr, STATIC: tl.constexpr, KEEP: tl.constexpr, IS_INT: tl.constexpr,
    LIMIT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    if ADDED:
        residual += row * residual_stride
    codes += row * codes_stride
    scales += row * scales_stride
    if KEEP:
        kept += row * kept_stride
    dtype: tl.constexpr = x.dtype.element_ty
    inverse = 1.0
    if NORMED:
        squares = tl.zeros((GROUPS * BLOCK,), tl.float32)
        for start in range(0, k, GROUPS * BLOCK):
            column = start + tl.arange(0, GROUPS * BLOCK)
            if ADDED:
                value = _add(x, residual, column, column < k)
            else:
                value = _load(x, k, column, column < k, GATED)
            squares += value * value
        inverse = inverse_rms(tl.sum(squares), k, eps)
    if ADDED:
        tl.debug_barrier()  # what other threads stored is read below
        x = residual
    for first in range(0, num_groups, GROUPS):
        groups = first + tl.arange(0, GROUPS)
        most = tl.zeros((GROUPS,), tl.int32)
        for start in range(0, group, BLOCK):
            within = start + tl.arange(0, BLOCK)[None, :]
            column = groups[:, None] * group + within
            inside = (within < group) & (column < k)
            value = _load(x, k, column, inside, GATED)
            if NORMED:
                value = _normed(value, inverse, weight, column, inside, dtype)
            most = tl.maximum(most, tl.max(_magnitudes(value), 1))
        stored, scale, reciprocal = _scales(most, static_scale, LIMIT, STATIC)
        tl.store(scales + groups, stored, mask=groups < num_groups)
        for start in range(0, group, BLOCK):
            within = start + tl.arange(0, BLOCK)[None, :]
            column = groups[:, None] * group + within
            inside = (within < group) & (column < k)
            value = _load(x, k, column, inside, GATED)
            if NORMED:
                value = _normed(value, inverse, weight, column, inside, dtype)
            if KEEP:
                tl.store(kept + column, value.to(dtype), mask=inside)
            rounded = _round(value, scale[:, None], reciprocal[:, None], LIMIT, STATIC, IS_INT)
            tl.store(codes + column, rounded, mask=(within < group) & (column < k_padded))


def refuses(dtype: torch.dtype, device: Device) -> str | None:
    """Why rows cannot be rounded to codes of `dtype` on an architecture; None when they can."""
    if dtype == torch.float8_e4m3fn and not device.has_fp8:
        return f"fp8 codes need sm_89 or newer, not sm_{device.arch}: int8 codes work there"
    return None


def launch(x: Tensor, out: QuantizedRows, *, device: Device, static_scale: Tensor | None = None) -> Launch:
    """The launch that fills `out` from rows x [M, K] as they are: bfloat16, float16 or float32, rows may be strided.

    M is at least 1. `static_scale` is one positive float32 number on the device. Raises ValueError for shapes, dtypes and
    architectures that do not go.
    """
    check_rows("x", x, (out.codes.shape[0], out.in_features))
    return _launch(x, out, device=device, static_scale=static_scale)


def launch_rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: QuantizedRows, *, device: Device, residual: Tensor | None = None,
    static_scale: Tensor | None = None, values: Tensor | None = None,
) -> Launch:  # fmt: skip
    """The launch that fills `out` from RMSNorm(x) * weight, or with a `residual` from that of residual += x, in place.

    x, residual and values [M, K] of one dtype; `values` is filled with what was rounded; weight [K]. Else as for `launch`.
    """
    shape = (out.codes.shape[0], out.in_features)
    check_rows("x", x, shape)
    if tuple(weight.shape) != shape[1:] or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous [{shape[1]}], not {tuple(weight.shape)}")
    if residual is not None:
        check_rows("residual", residual, shape, x.dtype)
    return _launch(x, out, device=device, static_scale=static_scale, values=values, weight=weight, eps=eps, residual=residual)


def launch_silu_mul(
    gate_up: Tensor, out: QuantizedRows, *, device: Device, static_scale: Tensor | None = None, values: Tensor | None = None
) -> Launch:
    """The launch that fills `out` from SiLU(gate_up[:, :K]) * gate_up[:, K:]; gate_up [M, 2 * K], values as for `launch_rms_norm`."""
    check_rows("gate_up", gate_up, (out.codes.shape[0], 2 * out.in_features))
    return _launch(gate_up, out, device=device, static_scale=static_scale, values=values, gated=True)


def _launch(
    x: Tensor, out: QuantizedRows, *, device: Device, static_scale: Tensor | None, values: Tensor | None = None,
    weight: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None, gated: bool = False,
) -> Launch:  # fmt: skip
    check_static_scale(static_scale, out)
    m, k = out.codes.shape[0], out.in_features
    if (reason := refuses(out.codes.dtype, device)) is not None:
        raise ValueError(reason)
    if values is not None:
        check_rows("values", values, (m, k), x.dtype)
    group = out.group if out.group < k else out.codes.shape[1]
    is_whole, groups, block, num_warps = _cells(k, group)
    strides = (tensor.stride(0) if tensor is not None else 0 for tensor in (x, residual, out.codes, out.scales, values))
    args = (
        x, residual, weight, static_scale, out.codes, out.scales, values, eps,
        k, out.codes.shape[1], group, out.scales.shape[1], *strides,
    )  # fmt: skip
    options: dict[str, Any] = {
        "GATED": gated, "NORMED": weight is not None, "ADDED": residual is not None, "STATIC": static_scale is not None,
        "KEEP": values is not None, "IS_INT": out.codes.dtype == torch.int8, "LIMIT": LIMITS[out.codes.dtype],
        "GROUPS": groups, "BLOCK": block, "num_warps": num_warps, "num_stages": 1,
    }  # fmt: skip
    return Launch(_whole if is_whole else _long, (m,), args, options)


def _cells(k: int, group: int) -> tuple[bool, int, int, int]:
    """Whether a program holds a row of K inputs at once, the groups and inputs of each that it holds, and the warps it has."""
    block, groups = triton.next_power_of_2(group), triton.next_power_of_2(-(-k // group))
    is_whole = block * groups <= _WHOLE_CELLS
    if not is_whole:
        block = min(block, _LONG_CELLS)
        groups = min(groups, _LONG_CELLS // block)
    return is_whole, groups, block, max(1, block * groups // _CELLS_PER_WARP)
