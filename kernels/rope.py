"""Rotary embedding of queries and keys, and their way into the pages. Knows no model and no schedule.

Half style (GPT-NeoX, Llama): pairs are (i, i + rotary_dim / 2) among the first rotary_dim of a head's elements; the rest passes.
https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .paged_attention import PAGE_DTYPES


@functools.cache
def _on_cpu() -> Callable[..., None]:
    """The CPU kernel, imported at the first call."""
    from .cpu.rope import rope_and_store as on_cpu

    return on_cpu


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
) -> None:
    """Rotate q and k in place, then write k and v to their slots.

    - qkv        [T, (num_heads + 2 * num_kv_heads) * head_dim] q heads, k heads, v heads; rows may be strided. float32 on the CPU.
    - positions  int64 [T]; slots int64 [T], slot = page * page_size + offset, -1 writes nothing. Both contiguous.
    - cos_sin    float32 [max_position, 2, rotary_dim / 2]: cosines, then sines, of each position's angles. Contiguous.
    - k/v_pages  [num_pages, num_kv_heads, page_size, head_dim] float32, bfloat16 or float16 (rounded to nearest even).
    - q_norm, k_norm  float32 [head_dim]: weights of an RMS norm over each head before the rotation, or None.

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
    shape, strides, dtype = k_pages.shape, k_pages.stride(), k_pages.dtype
    if len(shape) != 4 or shape[1] != num_kv_heads or shape[3] != head_dim or v_pages.shape != shape:
        raise ValueError(f"pages are {tuple(shape)}, {tuple(v_pages.shape)}; wanted [pages, {num_kv_heads}, page_size, {head_dim}]")
    if dtype not in PAGE_DTYPES or v_pages.dtype != dtype or strides[3] != 1 or v_pages.stride() != strides:
        raise ValueError("pages must both be float32, bfloat16 or float16, with equal strides and a contiguous last dimension")
    for norm in (q_norm, k_norm):
        if norm is not None and (norm.shape != (head_dim,) or norm.dtype != torch.float32 or not norm.is_contiguous()):
            raise ValueError(f"q_norm and k_norm must be contiguous float32 [{head_dim}], not {norm.dtype} {tuple(norm.shape)}")
    if rows == 0:
        return
    if qkv.is_cpu and qkv.dtype == torch.float32:
        _on_cpu()(qkv, positions, slots, cos_sin, k_pages, v_pages, num_heads, q_norm, k_norm, norm_eps)
        return
    reference(qkv, positions, slots, cos_sin, k_pages, v_pages, num_heads=num_heads, q_norm=q_norm, k_norm=k_norm, norm_eps=norm_eps)


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
) -> None:
    """The same in plain float32 torch, on any device and for any dtype of qkv."""
    _, num_kv_heads, page_size, head_dim = k_pages.shape
    half = cos_sin.shape[2]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    cos, sin = (cos_sin[positions, i, None, :] for i in (0, 1))
    for part, norm in ((heads[:, :num_heads], q_norm), (heads[:, num_heads : num_heads + num_kv_heads], k_norm)):
        x = part.float()
        if norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps) * norm
        first, second = x[..., :half], x[..., half : 2 * half]
        part.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], dim=-1))
    kept = (slots >= 0).nonzero()[:, 0]
    page, offset = slots[kept] // page_size, slots[kept] % page_size
    k_pages[page, :, offset] = heads[kept, num_heads : num_heads + num_kv_heads].to(k_pages.dtype)
    v_pages[page, :, offset] = heads[kept, num_heads + num_kv_heads :].to(v_pages.dtype)
