"""What a KV page holds: plain numbers, or one-byte codes with a scale for each row. Knows no sequence and no model.

Plain pages are [num_pages, num_kv_heads, page_size, head_dim] of float32, bfloat16 or float16.

Quantized pages are uint8 [num_pages, num_kv_heads, page_size, head_dim + 4]. A row, one token's key (or value) of one head, is
`head_dim` codes and then its own float32 scale: number = code * scale. So a row's address alone is enough to read it, and two rows
of a page may have different scales. The dtype of the pages does not tell the kind of code: callers pass it as `kv_dtype`, one of
CODE_RANGE's. Static and dynamic scales are read the same way.

GPUs want codes at multiples of 16 bytes: there the bytes of a page's head hold all codes first, [page_size, head_dim], and then
all scales. `split_rows` gives both, however they lie; tensors of either kind have the same shape.

A row in which something is not a number has a NaN scale (and NaN codes at those places where the code has one): all of it reads
as NaN, and kernels need not look for NaN among the codes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .gpu.device import is_gpu

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The least and the greatest number a code stands for; beyond them storing saturates. Dynamic scales map a row's greatest
# magnitude to the greatest.
CODE_RANGE: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float8_e4m3fn: (-448.0, 448.0),
    torch.float8_e5m2: (-57344.0, 57344.0),
    torch.int8: (-128.0, 127.0),
}
SCALE_BYTES = 4
SMALLEST_SCALE = 2.0**-126  # of a dynamic scale: below it a float32 loses digits, and then is zero


def row_width(head_dim: int, kv_dtype: torch.dtype) -> int:
    """Elements of one row in pages of that kind: the last dimension of their tensor."""
    return head_dim + SCALE_BYTES if kv_dtype in CODE_RANGE else head_dim


def storage_dtype(kv_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the page tensors that hold `kv_dtype`."""
    return torch.uint8 if kv_dtype in CODE_RANGE else kv_dtype


def split_rows(pages: Tensor, kv_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Views of quantized pages: codes uint8 [num_pages, num_kv_heads, page_size, head_dim], scales float32 [..., page_size]."""
    page_size, head_dim = pages.shape[2], pages.shape[3] - SCALE_BYTES
    if not is_gpu(pages.device):
        return pages[..., :head_dim], pages[..., head_dim:].view(torch.float32)[..., 0]
    flat = pages.flatten(2)
    codes = flat[..., : page_size * head_dim].view(*pages.shape[:3], head_dim)
    return codes, flat[..., page_size * head_dim :].view(torch.float32)


def check_pages(k_pages: Tensor, v_pages: Tensor, *, num_kv_heads: int, head_dim: int, kv_dtype: torch.dtype | None) -> None:
    """Raise ValueError unless both are pages as this file describes them, alike, with a contiguous last dimension.

    `kv_dtype` None, or the pages' own dtype: plain numbers. Strides of quantized pages are multiples of 4, and so is head_dim of 8.
    """
    dtype, shape, strides = k_pages.dtype, k_pages.shape, k_pages.stride()
    kind = kv_dtype or dtype
    if dtype != v_pages.dtype or dtype != storage_dtype(kind) or kind not in (*PLAIN_DTYPES, *CODE_RANGE):
        wanted = "float32, bfloat16 or float16 (or uint8, with a kv_dtype)" if kv_dtype is None else f"{storage_dtype(kind)} for {kind}"
        raise ValueError(f"pages must both be {wanted}, not {dtype} and {v_pages.dtype}")
    width = row_width(head_dim, kind)
    if len(shape) != 4 or shape[1] != num_kv_heads or shape[3] != width or v_pages.shape != shape:
        raise ValueError(
            f"pages are {tuple(shape)} and {tuple(v_pages.shape)}; wanted [pages, {num_kv_heads}, page_size, {width}] for {kind}"
        )
    if strides[3] != 1 or v_pages.stride() != strides:
        raise ValueError(f"pages need equal strides and a contiguous last dimension, not {strides} and {v_pages.stride()}")
    if kind in CODE_RANGE and (head_dim % 8 or (strides[0] | strides[1] | strides[2]) % 4 or (k_pages.data_ptr() | v_pages.data_ptr()) % 4):
        raise ValueError(f"quantized pages need a head_dim of a multiple of 8 ({head_dim}), and strides ({strides}) and addresses of 4")


def encode(x: Tensor, kv_dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """Rows of numbers [..., D] as rows of a quantized page, uint8 [..., D + 4]; codes are rounded to nearest even.

    `scale` float32, broadcastable to [..., 1] and above 0; numbers beyond the code's range saturate. None: each row's own,
    its greatest magnitude over the code's greatest number; 1 for a row of zeros. A row with an infinity then reads as NaN.
    """
    codes, scales = quantize(x, kv_dtype, scale)
    return torch.cat([codes, scales.unsqueeze(-1).view(torch.uint8)], dim=-1)


def quantize(x: Tensor, kv_dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `encode`, codes uint8 [..., D] and scales float32 [...] apart."""
    low, high = CODE_RANGE[kv_dtype]
    x = x.float()
    if scale is None:
        greatest = x.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(-1, keepdim=True)
        scale = torch.where(greatest > 0, (greatest / high).clamp(min=SMALLEST_SCALE), 1.0)
    wanted = x / scale
    lost = wanted.isnan()
    codes = wanted.clamp(low, high)
    if kv_dtype == torch.int8:
        codes = codes.round().nan_to_num(nan=0.0)
    scales = scale.expand(*x.shape[:-1], 1).masked_fill(lost.any(-1, keepdim=True), math.nan)
    return codes.to(kv_dtype).view(torch.uint8), scales.squeeze(-1).contiguous()


def decode(rows: Tensor, kv_dtype: torch.dtype) -> Tensor:
    """What `encode` made, as float32 [..., D]: code * scale."""
    scales = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return rows[..., :-SCALE_BYTES].view(kv_dtype).float() * scales


def static_scales(scale: float | Tensor | None, num_kv_heads: int, device: torch.device) -> Tensor | None:
    """`scale` as contiguous float32 [num_kv_heads] on `device`, or None. Raises ValueError for another shape or a number not above 0."""
    if scale is None:
        return None
    if not isinstance(scale, Tensor):
        return _filled(float(scale), num_kv_heads, device)
    if scale.shape != (num_kv_heads,) or scale.dtype != torch.float32 or not scale.is_contiguous() or scale.device != device:
        raise ValueError(f"static scales are contiguous float32 [{num_kv_heads}] on {device}, not {scale.dtype} {tuple(scale.shape)}")
    return scale


@functools.lru_cache(maxsize=256)
def _filled(scale: float, count: int, device: torch.device) -> Tensor:
    if not 0 < scale < math.inf:
        raise ValueError(f"a static scale must be a number above 0, not {scale}")
    return torch.full((count,), scale, dtype=torch.float32, device=device)
