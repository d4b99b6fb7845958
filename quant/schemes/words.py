"""Unpacking small whole numbers from 32-bit words, lowest bits first. Knows no format's shapes."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """Words int32 to uint8 codes along `dim`: 32 / bits a word for 2, 4 and 8 bits; 32 in three words (one bit stream) for 3 bits.

    Words are unsigned: a set top bit is a code's and no sign.
    """
    words = words.movedim(dim, -1).to(torch.int64) & 0xFFFFFFFF
    if bits == 3:
        codes = _unpack_stream(words, bits)
    else:
        shifts = torch.arange(0, 32, bits)
        codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2).to(torch.uint8).movedim(-1, dim).contiguous()


def _unpack_stream(words: Tensor, bits: int) -> Tensor:
    """[..., 3n] words to [..., n, 32] codes that may straddle words."""
    if words.shape[-1] % bits:
        raise ValueError(f"{words.shape[-1]} words are no whole number of {bits}-word units of {bits}-bit codes")
    units = words.reshape(*words.shape[:-1], -1, bits)
    starts = torch.arange(0, 32 * bits, bits)
    first, shift = starts // 32, starts % 32
    low = units[..., first] >> shift
    after = units[..., (first + 1).clamp(max=bits - 1)] << (32 - shift)
    straddles = shift + bits > 32
    return torch.where(straddles, low | after, low) & ((1 << bits) - 1)
