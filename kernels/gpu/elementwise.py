"""RMS norm of rows, alone or after adding a residual, and SiLU's gate, in the activations' own dtype. Contracts: rms_norm.py, silu_mul.py.

Where what follows wants codes, quantize_rows.py does the same and rounds in one pass.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .quantize_rows import inverse_rms
from .quantize_rows import silu_mul as gated

_GATED: Final = 1024  # cells a program


@triton.jit
def _rms_norm(x, residual, weight, out, eps, width, x_stride, residual_stride, out_stride, ADDED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual + row * residual_stride + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    inverse = inverse_rms(tl.sum(value * value, 0), width, eps)
    scaled = value * inverse * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul(gate_up, out, width, gate_up_stride, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * gate_up_stride + width + column, mask=inside, other=0.0)
    tl.store(out + row * out_stride + column, gated(gate, up, out.dtype.element_ty).to(out.dtype.element_ty), mask=inside)


def launch_rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, *, residual: Tensor | None = None) -> Launch:
    """The launch that fills out [T, H] with RMSNorm(x) * weight, or after residual += x with that of the residual. T is at least 1."""
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    strides = (x.stride(0), residual.stride(0) if residual is not None else 0, out.stride(0))
    options = {"ADDED": residual is not None, "BLOCK": block, "num_warps": max(1, min(16, block // 512)), "num_stages": 1}
    return Launch(_rms_norm, (rows,), (x, residual, weight, out, eps, width, *strides), options)


def launch_silu_mul(gate_up: Tensor, out: Tensor) -> Launch:
    """The launch that fills out [T, I] with SiLU(gate_up[:, :I]) * gate_up[:, I:]. T is at least 1."""
    rows, width = out.shape
    options = {"BLOCK": _GATED, "num_warps": 4, "num_stages": 1}
    args = (gate_up, out, width, gate_up.stride(0), out.stride(0))
    return Launch(_silu_mul, (rows, -(-width // _GATED)), args, options)
