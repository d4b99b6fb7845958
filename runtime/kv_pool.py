"""KVPool: the page tensors of every layer. Knows their shape and what they hold, and not who holds a page."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..kernels.pages import row_width, storage_dtype

# --kv-cache-dtype's names. One-byte numbers are codes with a scale for each row: see kernels/pages.py.
KV_DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}


def kv_dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in KV_DTYPES."""
    return next(name for name, value in KV_DTYPES.items() if value == dtype)


def kv_bytes_per_token(*, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes one token takes in the pool, keys and values of all layers, scales included."""
    return 2 * num_layers * num_kv_heads * row_width(head_dim, dtype) * storage_dtype(dtype).itemsize


class KVPool:
    """Keys and values of `dtype`, each [num_pages, num_kv_heads, page_size, row] a layer, laid out as kernels/pages.py says.

    `has_spare`: one page more, `spare_page`, that is nobody's; rows that only fill up a batch write there.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        has_spare: bool = False,
    ) -> None:
        shape = (num_pages + has_spare, num_kv_heads, page_size, row_width(head_dim, dtype))
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        self.k_pages = [torch.empty(shape, dtype=storage_dtype(dtype), device=device) for _ in range(num_layers)]
        self.v_pages = [torch.empty(shape, dtype=storage_dtype(dtype), device=device) for _ in range(num_layers)]

    @property
    def spare_page(self) -> int:
        return self.num_pages

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def nbytes(self) -> int:
        return sum(pages.nbytes for pages in (*self.k_pages, *self.v_pages))
