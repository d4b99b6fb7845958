"""KVPool: the page tensors of every layer. Knows their shape and dtype, and not who holds a page."""

from __future__ import annotations

import torch


def kv_bytes_per_token(*, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes one token takes in the pool, keys and values of all layers."""
    return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize


class KVPool:
    """Keys and values, each [num_pages, num_kv_heads, page_size, head_dim] a layer, as kernels/paged_attention.py reads them."""

    def __init__(
        self, *, num_pages: int, page_size: int, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_pages, num_kv_heads, page_size, head_dim)
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        self.k_pages = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.v_pages = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def nbytes(self) -> int:
        return sum(pages.nbytes for pages in (*self.k_pages, *self.v_pages))
