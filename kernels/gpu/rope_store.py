"""Rotary embedding of queries and keys, and their way into the pages, quantized or not. The contract stands in kernels/rope.py.

A block takes some heads of one token. Both elements of a pair are read before either is written.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pages import CODE_RANGE, SMALLEST_SCALE
from .launch import Launch
from .paged_attention import KINDS, Pages, pages_of
from .quantize_rows import inverse_rms

_CELLS: Final = 2048  # heads times their padded size, of one block
_SMALLEST = tl.constexpr(SMALLEST_SCALE)
_TO_INTEGER = tl.constexpr(12582912.0)  # see quantize_rows.py


@triton.jit
def _codes(number, KIND: tl.constexpr):
    """Numbers within a code's range as the nearest code, ties to even, uint8; by whole numbers, for GPUs without fp8 too."""
    if KIND == 3:
        return (number + _TO_INTEGER - _TO_INTEGER).to(tl.int8).to(tl.uint8, bitcast=True)
    MANTISSA: tl.constexpr = 3 if KIND == 1 else 2
    BIAS: tl.constexpr = 7 if KIND == 1 else 15
    DROPPED: tl.constexpr = 23 - MANTISSA
    bits = number.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits &= 0x7FFFFFFF
    normal = ((bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED) - ((127 - BIAS) << MANTISSA)
    # Below the least normal number codes are whole multiples of the least.
    small = (tl.abs(number) * (2.0 ** (BIAS - 1 + MANTISSA)) + _TO_INTEGER - _TO_INTEGER).to(tl.int32)
    is_small = bits < ((128 - BIAS) << 23)
    return (sign | tl.where(is_small, small, normal)).to(tl.uint8)


@triton.jit
def _rope_store(
    qkv, positions, slots, cos_sin, q_norm, k_norm, k, v, k_scales, v_scales, k_static, v_static, eps,
    qkv_stride, page_stride, head_stride, row_stride, scale_page_stride, scale_head_stride, scale_row_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr, KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    STATIC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    is_value = head >= HEADS + KV_HEADS
    is_query = head < HEADS
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (column < DIM)[None, :]
    at = qkv + token.to(tl.int64) * qkv_stride + head[:, None] * DIM + column[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    is_turned = column < 2 * HALF
    partner = tl.where(column < HALF, column + HALF, column - HALF)
    turns = inside & is_turned[None, :] & (~is_value)[:, None]
    other = tl.load(at - column[None, :] + partner[None, :], mask=turns, other=0.0).to(tl.float32)
    if HAS_Q_NORM or HAS_K_NORM:
        inverse = inverse_rms(tl.sum(x * x, 1), DIM, eps)[:, None]
        has_norm = inside & (is_query & HAS_Q_NORM | ~is_query & ~is_value & HAS_K_NORM)[:, None]
        weight, other_weight = tl.full((BLOCK_H, BLOCK_D), 1.0, tl.float32), tl.full((BLOCK_H, BLOCK_D), 1.0, tl.float32)
        if HAS_Q_NORM:
            of_query = inside & is_query[:, None]
            weight = tl.load(q_norm + column[None, :], mask=of_query, other=1.0)
            other_weight = tl.load(q_norm + partner[None, :], mask=of_query & is_turned[None, :], other=1.0)
        if HAS_K_NORM:
            of_key = inside & (~is_query & ~is_value)[:, None]
            weight = tl.where(of_key, tl.load(k_norm + column[None, :], mask=of_key, other=1.0), weight)
            of_partner = of_key & is_turned[None, :]
            other_weight = tl.where(of_partner, tl.load(k_norm + partner[None, :], mask=of_partner, other=1.0), other_weight)
        x = tl.where(has_norm, x * inverse * weight, x)
        other = tl.where(has_norm, other * inverse * other_weight, other)
    angles = cos_sin + tl.load(positions + token) * (2 * HALF)
    angle = tl.where(column < HALF, column, column - HALF)
    cosine = tl.load(angles + angle, mask=is_turned, other=1.0)
    sine = tl.load(angles + HALF + angle, mask=is_turned, other=0.0)
    sine = tl.where(column < HALF, -sine, sine)
    x = tl.where((~is_value)[:, None], x * cosine[None, :] + other * sine[None, :], x)
    dtype: tl.constexpr = qkv.dtype.element_ty
    rounded = x.to(dtype)
    tl.debug_barrier()  # all of a pair are read before one is written
    tl.store(at, rounded, mask=inside & (~is_value)[:, None])
    slot = tl.load(slots + token)
    is_kept = inside & (slot >= 0) & (~is_query)[:, None]
    kv_head = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS).to(tl.int64)
    page, offset = slot // PAGE, slot % PAGE
    to = (page * page_stride + kv_head * head_stride + offset * row_stride)[:, None] + column[None, :]
    x = rounded.to(tl.float32)
    if KIND > 0:
        is_row = (head < HEADS + 2 * KV_HEADS) & (slot >= 0) & ~is_query
        magnitude = tl.where(inside, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)  # ordered as numbers; infinity and NaN are the greatest
        greatest_bits = tl.max(magnitude, 1)
        is_broken = greatest_bits > 0x7F800000
        if STATIC:
            scale = tl.load(tl.where(is_value, v_static + kv_head, k_static + kv_head), mask=is_row, other=1.0)
        else:
            greatest = greatest_bits.to(tl.float32, bitcast=True)
            scale = tl.where(greatest_bits == 0, 1.0, tl.maximum(tl.div_rn(greatest, greatest * 0 + HIGH), _SMALLEST))
            is_broken |= greatest_bits == 0x7F800000
        number = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        number = tl.where(is_broken[:, None], 0.0, number)
        codes = _codes(tl.minimum(tl.maximum(number, LOW), HIGH), KIND)
        scale_to = page * scale_page_stride + kv_head * scale_head_stride + offset * scale_row_stride
        stored_scale = tl.where(is_broken, float("nan"), scale)
        tl.store(k_scales + scale_to, stored_scale, mask=is_row & ~is_value)
        tl.store(v_scales + scale_to, stored_scale, mask=is_row & is_value)
        tl.store(k + to, codes, mask=is_kept & (~is_value)[:, None])
        tl.store(v + to, codes, mask=is_kept & is_value[:, None])
    else:
        tl.store(k + to, x.to(k.dtype.element_ty), mask=is_kept & (~is_value)[:, None])
        tl.store(v + to, x.to(v.dtype.element_ty), mask=is_kept & is_value[:, None])


def launch(
    qkv: Tensor, positions: Tensor, slots: Tensor, cos_sin: Tensor, pages: Pages, *, num_heads: int, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, norm_eps: float = 1e-6, k_static: Tensor | None = None, v_static: Tensor | None = None,
) -> Launch:  # fmt: skip
    """The launch that turns queries and keys of qkv [T, (Hq + 2 * Hkv) * D] in place, and fills the slots of `pages`.

    bfloat16, float16 or float32; arguments as kernels/rope.py says. Static scales float32 [Hkv], both or none. T is at least 1.
    """
    num_kv_heads, page_size, dim = pages.k.shape[1:]
    block_d = max(16, triton.next_power_of_2(dim))
    block_h = max(1, _CELLS // block_d)
    total = num_heads + 2 * num_kv_heads
    kind = pages.kind if pages.kind in CODE_RANGE else None
    args = (
        qkv, positions, slots, cos_sin, q_norm, k_norm, pages.k, pages.v, pages.k_scale, pages.v_scale, k_static, v_static, norm_eps,
        qkv.stride(0), *pages.k.stride()[:3], *(pages.k_scale.stride() if pages.k_scale is not None else (0, 0, 0)),
    )  # fmt: skip
    low, high = CODE_RANGE[kind] if kind is not None else (0.0, 0.0)
    options: dict[str, Any] = {
        "HEADS": num_heads, "KV_HEADS": num_kv_heads, "DIM": dim, "HALF": cos_sin.shape[2], "PAGE": page_size,
        "HAS_Q_NORM": q_norm is not None, "HAS_K_NORM": k_norm is not None, "KIND": KINDS.get(pages.kind, 0), "LOW": low, "HIGH": high,
        "STATIC": k_static is not None, "BLOCK_H": block_h, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 1,
    }  # fmt: skip
    return Launch(_rope_store, (qkv.shape[0], -(-total // block_h)), args, options)


def rope_and_store(
    qkv: Tensor, positions: Tensor, slots: Tensor, cos_sin: Tensor, k_pages: Tensor, v_pages: Tensor, kind: torch.dtype, num_heads: int,
    q_norm: Tensor | None, k_norm: Tensor | None, norm_eps: float, k_static: Tensor | None, v_static: Tensor | None,
) -> None:  # fmt: skip
    """kernels/rope.py's operation, whose arguments it has checked."""
    launch(
        qkv, positions, slots, cos_sin, pages_of(k_pages, v_pages, kind), num_heads=num_heads, q_norm=q_norm, k_norm=k_norm,
        norm_eps=norm_eps, k_static=k_static, v_static=v_static,
    )()  # fmt: skip
