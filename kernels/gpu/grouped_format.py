"""How quantized weights lie in GPU memory for grouped_linear.py: packed once at load, at the width of their bits. Launches nothing.

Weights are cut into bands of ROWS output features and steps of `slots * depth` inputs. A step of a band is one contiguous run of 16-bit
words, [ROWS, words * depth]: word j of a row holds, lowest bits first, the codes of inputs j, depth + j, 2 * depth + j, ... of the step.
So one load serves `slots` products of `depth` inputs; and two neighbouring words are two neighbouring inputs of every slot, as matrix
units want them in one register, so that no code moves. 3, 5 and 6 bits are words of lower bits, and behind them one of upper bits: of 3
bits two words of 8 codes' lower 2 bits each, and one of 16 codes' upper bit. Scales, zero points and offsets lie [G, N], neighbours in N
together; two levels of scales become one, in float16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from ..grouped_linear import GroupedWeight

ROWS: Final = 64
_DEPTHS: Final = (32, 16)  # products of matrix units are at least 16 deep
LOWER_BITS: Final = {2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 8: 8}  # bits of a code in the first words; the others are in the last

CodeKind = Literal["integer", "fp8"]
ScaleRule = Literal["channel", "slots", "column"]


@dataclass(frozen=True, eq=False)
class Packed:
    """data int16 [bands, steps, ROWS, words * depth]; scale [G, N]; zeros uint8 [G, N] or None, and then `zero` for all.

    w = (code - zero) * scale + offset, where there is an `offset` like scale.
    """

    data: Tensor
    scale: Tensor
    zeros: Tensor | None
    zero: int
    offset: Tensor | None
    kind: CodeKind
    bits: int
    depth: int
    group_size: int
    in_features: int
    out_features: int
    permutation: Tensor | None

    @property
    def slots(self) -> int:
        return slots_of(self.bits)

    @property
    def step(self) -> int:
        """Inputs of a step."""
        return self.slots * self.depth

    @property
    def num_steps(self) -> int:
        return self.data.shape[1]

    @property
    def scale_rule(self) -> ScaleRule:
        """What shares a scale: all inputs of a channel, some whole slots, or columns wherever a group ends."""
        if self.scale.shape[0] == 1 and self.offset is None:
            return "channel"
        return "slots" if self.group_size % self.depth == 0 else "column"

    @property
    def run(self) -> int:
        """Slots of a step that share a scale, one after the other, wherever in a group the step begins."""
        return math.gcd(max(self.group_size // self.depth, 1), self.slots)

    @property
    def nbytes(self) -> int:
        tensors = (self.data, self.scale, self.zeros, self.offset, self.permutation)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def refuses(*, bits: int, in_features: int) -> str | None:
    """Why weights cannot be packed; None when they can."""
    if bits not in LOWER_BITS:
        return f"takes {', '.join(map(str, LOWER_BITS))} bits, not {bits}"
    return "needs at least 16 inputs" if in_features < 16 else None


def pack(weight: GroupedWeight) -> Packed:
    """Pack once, at load."""
    n, k = weight.codes.shape
    bits, size = weight.bits, weight.group_size
    slots, depth = slots_of(bits), depth_of(size, k, slots_of(bits))
    bands, steps = -(-n // ROWS), -(-k // (slots * depth))
    kind: CodeKind = "fp8" if weight.codes.dtype == torch.float8_e4m3fn else "integer"
    codes = weight.codes.view(torch.uint8)
    zero = weight.zero
    if weight.codes.dtype == torch.int8:  # signed to plain
        codes, zero = codes + (1 << (bits - 1)), zero + (1 << (bits - 1))
        codes = codes & ((1 << bits) - 1)
    cells = torch.zeros(bands * ROWS, steps * slots * depth, dtype=torch.uint8, device=codes.device)
    cells[:n, :k] = codes
    cells = cells.view(bands, ROWS, steps, slots, depth).transpose(1, 2)  # [bands, steps, ROWS, slots, depth]
    return Packed(
        torch.cat([_words(cells, *part) for part in _parts(bits)], dim=3).contiguous(),
        _one_level(weight.scale, weight.super_scale).t().contiguous(),
        None if weight.zeros is None else weight.zeros.t().contiguous(),
        zero,
        None if weight.offset is None else _one_level(weight.offset, weight.super_offset).t().contiguous(),
        kind,
        bits,
        depth,
        size,
        k,
        n,
        None if weight.permutation is None else weight.permutation.to(torch.int32),
    )


def depth_of(group_size: int, in_features: int, slots: int) -> int:
    """The deepest product that stays within a group; where none does, the deepest that K is not padded for."""
    sizes = [group_size] if group_size < in_features else []
    for depth in _DEPTHS:
        if all(size % depth == 0 for size in sizes or [in_features // slots]):
            return depth
    return _DEPTHS[-1]


def slots_of(bits: int) -> int:
    """Codes that a word has bits of, in the words that have bits of most."""
    lower = LOWER_BITS[bits]
    return 16 // (bits - lower or lower)


def _one_level(small: Tensor, over: Tensor | None) -> Tensor:
    if over is None:
        return small
    return (small.float() * over.float().repeat_interleave(small.shape[1] // over.shape[1], dim=1)).to(torch.float16)


def _parts(bits: int) -> list[tuple[int, int, int, int]]:
    """Words of a row: (bits of each code in it, shift of those bits, first slot, last slot)."""
    lower, slots = LOWER_BITS[bits], slots_of(bits)
    per_word = 16 // lower
    parts = [(lower, 0, first, first + per_word) for first in range(0, slots, per_word)]
    return parts if lower == bits else [*parts, (bits - lower, lower, 0, slots)]


def _words(cells: Tensor, bits: int, shift: int, first: int, last: int) -> Tensor:
    """[bands, steps, ROWS, depth] words of codes [..., slots, depth]."""
    out = torch.zeros(*cells.shape[:3], cells.shape[4], dtype=torch.int32, device=cells.device)
    for slot in range(first, last):
        out |= ((cells[..., slot, :] >> shift) & ((1 << bits) - 1)).to(torch.int32) << ((slot - first) * bits)
    return torch.where(out >= 1 << 15, out - (1 << 16), out).to(torch.int16)


def rows(weight: Packed, indices: Tensor) -> Tensor:
    """W[indices], float32 [R, K], inputs in their own order."""
    words = weight.data[indices // ROWS, :, indices % ROWS].to(torch.int32).unflatten(2, (-1, weight.depth))  # [R, steps, words, depth]
    codes = torch.zeros(*words.shape[:2], weight.slots, weight.depth, dtype=torch.int32, device=words.device)
    for word, (bits, shift, first, last) in enumerate(_parts(weight.bits)):
        for slot in range(first, last):
            codes[:, :, slot] |= ((words[:, :, word] >> ((slot - first) * bits)) & ((1 << bits) - 1)) << shift
    flat = codes.flatten(1)[:, : weight.in_features]

    def spread(tensor: Tensor) -> Tensor:
        return tensor.t()[indices].float().repeat_interleave(weight.group_size, dim=1)

    if weight.kind == "fp8":
        values = flat.to(torch.uint8).view(torch.float8_e4m3fn).float() * spread(weight.scale)
    else:
        zeros = weight.zero if weight.zeros is None else spread(weight.zeros)
        values = (flat - zeros) * spread(weight.scale)
    if weight.offset is not None:
        values = values + spread(weight.offset)
    if weight.permutation is None:
        return values
    return torch.empty_like(values).index_copy_(1, weight.permutation.long(), values)
