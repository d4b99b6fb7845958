"""Reads memory and keeps nearly nothing of it: what the bandwidth of reading is measured with."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_STEPS, _BLOCK = 32, 2048


@triton.jit
def _read(data, greatest, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    found = tl.zeros((BLOCK,), tl.int32)
    at = data + tl.program_id(0).to(tl.int64) * (STEPS * BLOCK) + tl.arange(0, BLOCK)
    for step in range(STEPS):
        found = tl.maximum(found, tl.load(at + step * BLOCK))
    tl.store(greatest + tl.program_id(0), tl.max(found, 0))


def read_all(data: Tensor, greatest: Tensor) -> None:
    """Reads int32 `data`, a multiple of 65,536, and stores the greatest of each so many."""
    _read[(data.numel() // (_STEPS * _BLOCK),)](data, greatest, STEPS=_STEPS, BLOCK=_BLOCK, num_warps=8)
