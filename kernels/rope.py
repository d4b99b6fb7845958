"""Rotary embedding of queries and keys, and their way into the pages. Knows no model and no schedule.

Half style (GPT-NeoX, Llama): pairs are (i, i + rotary_dim / 2) among the first rotary_dim of a head's elements; the rest passes.
https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .gpu.device import is_gpu
from .pages import CODE_RANGE, check_pages, quantize, split_rows, static_scales


@functools.cache
def _on_cpu() -> Callable[..., None]:
    """The CPU kernel, imported at the first call."""
    from .cpu.rope import rope_and_store as on_cpu

    return on_cpu


@functools.cache
def _on_gpu() -> Callable[..., None]:
    """The kernel for NVIDIA GPUs, imported at the first call."""
    from .gpu.rope_store import rope_and_store as on_gpu

    return on_gpu


def rope_and_store(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    kv_dtype: torch.dtype | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
) -> None:
    """Rotate q and k in place, then write k and v to their slots.

    - qkv        [T, (num_heads + 2 * num_kv_heads) * head_dim] q heads, k heads, v heads; rows may be strided. float32 on the CPU.
    - positions  int64 [T]; slots int64 [T], slot = page * page_size + offset, -1 writes nothing. Both contiguous.
    - cos_sin    float32 [max_position, 2, rotary_dim / 2]: cosines, then sines, of each position's angles. Contiguous.
    - k/v_pages  [num_pages, num_kv_heads, page_size, head_dim] float32, bfloat16 or float16 (rounded to nearest even); with a
                 `kv_dtype` of int8 or float8 uint8 [num_pages, num_kv_heads, page_size, head_dim + 4], quantized (see pages.py).
    - q_norm, k_norm  float32 [head_dim]: weights of an RMS norm over each head before the rotation, or None.
    - k_scale, v_scale  of quantized pages: a number above 0, or float32 [num_kv_heads], and what lies beyond the code's range
                 saturates; None: a scale for each row, from its own greatest magnitude.

    On the CPU, raises IndexError for a position or slot outside its table.
    """
    rows, width = qkv.shape
    if width != (num_heads + 2 * num_kv_heads) * head_dim or qkv.stride()[1] != 1:
        raise ValueError(f"qkv is {tuple(qkv.shape)} with strides {qkv.stride()}; wanted {num_heads}+2*{num_kv_heads} heads of {head_dim}")
    if positions.shape != (rows,) or slots.shape != (rows,) or positions.dtype != torch.int64 or slots.dtype != torch.int64:
        raise ValueError(
            f"positions and slots must be int64 [{rows}], not {positions.dtype} {tuple(positions.shape)}, {tuple(slots.shape)}"
        )
    if cos_sin.dtype != torch.float32 or cos_sin.ndim != 3 or cos_sin.shape[1] != 2 or 2 * cos_sin.shape[2] > head_dim:
        raise ValueError(f"cos_sin must be float32 [max_position, 2, rotary_dim / 2], not {cos_sin.dtype} {tuple(cos_sin.shape)}")
    if not (cos_sin.is_contiguous() and positions.is_contiguous() and slots.is_contiguous()):
        raise ValueError("cos_sin, positions and slots must be contiguous")
    check_pages(k_pages, v_pages, num_kv_heads=num_kv_heads, head_dim=head_dim, kv_dtype=kv_dtype)
    kind = kv_dtype or k_pages.dtype
    k_scales, v_scales = (static_scales(scale, num_kv_heads, qkv.device) for scale in (k_scale, v_scale))
    if kind not in CODE_RANGE and not (k_scales is None and v_scales is None):
        raise ValueError(f"k_scale and v_scale belong to quantized pages, and these hold {kind}")
    for norm in (q_norm, k_norm):
        if norm is not None and (norm.shape != (head_dim,) or norm.dtype != torch.float32 or not norm.is_contiguous()):
            raise ValueError(f"q_norm and k_norm must be contiguous float32 [{head_dim}], not {norm.dtype} {tuple(norm.shape)}")
    if rows == 0:
        return
    if is_gpu(qkv.device) and (k_scales is None) == (v_scales is None):
        _on_gpu()(qkv, positions, slots, cos_sin, k_pages, v_pages, kind, num_heads, q_norm, k_norm, norm_eps, k_scales, v_scales)
        return
    if qkv.is_cpu and qkv.dtype == torch.float32 and not is_gpu(qkv.device):
        _on_cpu()(qkv, positions, slots, cos_sin, k_pages, v_pages, num_heads, head_dim, q_norm, k_norm, norm_eps, kind, k_scales, v_scales)
        return
    reference(
        qkv,
        positions,
        slots,
        cos_sin,
        k_pages,
        v_pages,
        num_heads=num_heads,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=norm_eps,
        kv_dtype=kv_dtype,
        k_scale=k_scales,
        v_scale=v_scales,
    )


def reference(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    num_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
    kv_dtype: torch.dtype | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """The same in plain float32 torch, on any device and for any dtype of qkv."""
    num_kv_heads, page_size, kind = k_pages.shape[1], k_pages.shape[2], kv_dtype or k_pages.dtype
    half = cos_sin.shape[2]
    count = num_heads + 2 * num_kv_heads
    heads = qkv.view(qkv.shape[0], count, qkv.shape[1] // count)
    cos, sin = (cos_sin[positions, i, None, :] for i in (0, 1))
    for part, norm in ((heads[:, :num_heads], q_norm), (heads[:, num_heads : num_heads + num_kv_heads], k_norm)):
        x = part.float()
        if norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps) * norm
        first, second = x[..., :half], x[..., half : 2 * half]
        part.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], dim=-1))
    kept = (slots >= 0).nonzero()[:, 0]
    page, offset = slots[kept] // page_size, slots[kept] % page_size
    keys, values = heads[kept, num_heads : num_heads + num_kv_heads], heads[kept, num_heads + num_kv_heads :]
    for pages, rows, scale in ((k_pages, keys, k_scale), (v_pages, values, v_scale)):
        if kind in CODE_RANGE:
            codes, scales = split_rows(pages, kind)
            codes[page, :, offset], scales[page, :, offset] = quantize(rows, kind, None if scale is None else scale[:, None])
        else:
            pages[page, :, offset] = rows.to(pages.dtype)
