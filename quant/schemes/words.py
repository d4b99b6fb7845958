"""Unpacking small whole numbers from 32-bit words, lowest bits first. Knows no format's shapes."""

from __future__ import annotations

import torch
from torch import Tensor


def num_words(length: int, bits: int, *, padded: bool = False) -> int:
    """Words that hold `length` codes, in one stream of bits; `padded`: with no code in two words."""
    return -(-length // (32 // bits)) if padded else -(-length * bits // 32)


def unit(bits: int, *, padded: bool = False) -> tuple[int, int]:
    """(codes, words) of the shortest run that begins and ends with a word."""
    return (32, bits) if 32 % bits and not padded else (32 // bits, 1)


def unpack(words: Tensor, bits: int, dim: int, *, padded: bool = False) -> Tensor:
    """Words int32 to uint8 codes along `dim`, which lie as `num_words` says, and what fills up the last word (or three of 3 bits).

    Words are unsigned: a set top bit is a code's and no sign.
    """
    words = words.movedim(dim, -1).to(torch.int64) & 0xFFFFFFFF
    if 32 % bits and not padded:
        codes = _unpack_stream(torch.nn.functional.pad(words, (0, -words.shape[-1] % bits)), bits)
    else:
        shifts = torch.arange(0, 32 - bits + 1, bits, device=words.device)
        codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2).to(torch.uint8).movedim(-1, dim).contiguous()


def _unpack_stream(words: Tensor, bits: int) -> Tensor:
    """[..., 3n] words to [..., n, 32] codes that may straddle words."""
    units = words.reshape(*words.shape[:-1], -1, bits)
    starts = torch.arange(0, 32 * bits, bits, device=words.device)
    first, shift = starts // 32, starts % 32
    low = units[..., first] >> shift
    after = units[..., (first + 1).clamp(max=bits - 1)] << (32 - shift)
    straddles = shift + bits > 32
    return torch.where(straddles, low | after, low) & ((1 << bits) - 1)


def pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Codes below 2**bits, 32 / bits to a word along `dim`, lowest bits first: int32. `bits` is 2, 4 or 8."""
    values = codes.movedim(dim, -1).to(torch.int64)
    values = values.reshape(*values.shape[:-1], -1, 32 // bits)
    words = (values << torch.arange(0, 32, bits, device=codes.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).movedim(-1, dim).contiguous()
