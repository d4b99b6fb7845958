"""GGUF's blocks kept at their bit width: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and the K-quants (layouts: ggml's ggml-common.h).

A row is a run of blocks. Simple blocks hold 32 weights, `w = d * q + m`; K-quants 256 in sub-blocks of 16 or 32, whose small whole
scales (and minima) share a float: `w = d * s * q - dmin * m`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...kernels.grouped_linear import GroupedWeight
from ..linear import Axis, LinearWeights, WeightForm, WeightSpec
from .base import Module, Slice, bias_spec, check_finite

# Bytes and weights of a block, bits of a code, weights that share a scale.
BLOCKS: dict[str, tuple[int, int, int, int]] = {
    "Q4_0": (18, 32, 4, 32),
    "Q4_1": (20, 32, 4, 32),
    "Q5_0": (22, 32, 5, 32),
    "Q5_1": (24, 32, 5, 32),
    "Q8_0": (34, 32, 8, 32),
    "Q2_K": (84, 256, 2, 16),
    "Q3_K": (110, 256, 3, 16),
    "Q4_K": (144, 256, 4, 32),
    "Q5_K": (176, 256, 5, 32),
    "Q6_K": (210, 256, 6, 16),
}


class GgufScheme:
    """`weight` uint8 [N, K / weights * bytes]: the file's blocks, row by row."""

    def form(self, module: Module) -> WeightForm:
        _, _, bits, size = BLOCKS[_type(module)]
        return WeightForm("integer", bits, size, symmetric=_type(module) in ("Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K"))

    def create_weights(self, module: Module) -> tuple[WeightSpec, ...]:
        size, weights, _, _ = BLOCKS[_type(module)]
        shape = (module.out_features, module.in_features // weights * size)
        return (WeightSpec("weight", shape, torch.uint8, (Axis("out"), Axis("in", weights, size))), *bias_spec(module))

    def to_canonical(self, tensors: Mapping[str, Tensor], module: Module, part: Slice) -> LinearWeights:
        size = BLOCKS[_type(module)][0]
        blocks = tensors["weight"].view(part.out_features, -1, size)
        return LinearWeights(_READERS[_type(module)](blocks), tensors.get("bias"))


def _type(module: Module) -> str:
    assert module.format.gguf_type is not None
    return module.format.gguf_type


def _halves(blocks: Tensor, start: int, name: str) -> Tensor:
    """The float16 at a byte of every block: [N, blocks]."""
    return check_finite(name, blocks[..., start : start + 2].contiguous().view(torch.float16)[..., 0])


def _nibbles(raw: Tensor) -> Tensor:
    """[..., n] bytes to [..., 2n] codes: low nibbles first, then high ones."""
    return torch.cat([raw & 15, raw >> 4], dim=-1)


def _bit(raw: Tensor, shifts: Tensor) -> Tensor:
    """Bits of [..., n] bytes: [..., len(shifts), n]."""
    return (raw[..., None, :] >> shifts[:, None].to(raw.device)) & 1


def _cut(raw: Tensor, *sizes: int) -> Tensor:
    """The last dimension as several."""
    return raw.reshape(*raw.shape[:-1], *sizes)


def _rows(codes: Tensor) -> Tensor:
    return codes.flatten(1).contiguous()


def _q4_0(blocks: Tensor) -> GroupedWeight:
    return GroupedWeight(_rows(_nibbles(blocks[..., 2:])), 4, 32, _halves(blocks, 0, "d"), zero=8)


def _q4_1(blocks: Tensor) -> GroupedWeight:
    return GroupedWeight(_rows(_nibbles(blocks[..., 4:])), 4, 32, _halves(blocks, 0, "d"), offset=_halves(blocks, 2, "m"))


def _fifth_bits(raw: Tensor) -> Tensor:
    """The 32 bits of 4 bytes, as the fifth bits of codes."""
    return ((raw[..., :, None] >> torch.arange(8, dtype=torch.uint8, device=raw.device)) & 1).flatten(-2) << 4


def _q5_0(blocks: Tensor) -> GroupedWeight:
    codes = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return GroupedWeight(_rows(codes), 5, 32, _halves(blocks, 0, "d"), zero=16)


def _q5_1(blocks: Tensor) -> GroupedWeight:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return GroupedWeight(_rows(codes), 5, 32, _halves(blocks, 0, "d"), offset=_halves(blocks, 2, "m"))


def _q8_0(blocks: Tensor) -> GroupedWeight:
    return GroupedWeight(_rows(blocks[..., 2:]).view(torch.int8), 8, 32, _halves(blocks, 0, "d"))


def _two_bits(raw: Tensor) -> Tensor:
    """64 bytes to 256 codes: in each half, four runs of 32 from rising bit pairs of the same 32 bytes."""
    halves = _cut(raw, 2, 1, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=raw.device)[:, None]
    return ((halves >> shifts) & 3).flatten(-3)


def _q2_k(blocks: Tensor) -> GroupedWeight:
    packed = blocks[..., :16]
    return GroupedWeight(
        _rows(_two_bits(blocks[..., 16:80])),
        2,
        16,
        _rows(packed & 15),
        offset=_rows(packed >> 4),
        super_scale=_halves(blocks, 80, "d"),
        super_offset=-_halves(blocks, 82, "dmin"),
    )


def _q3_k(blocks: Tensor) -> GroupedWeight:
    high = _bit(blocks[..., :32], torch.arange(8, dtype=torch.uint8)).flatten(-2)
    codes = _two_bits(blocks[..., 32:96]) | (high << 2)
    low = _nibbles(blocks[..., 96:104])
    top = (blocks[..., None, 104:108] >> torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]) & 3
    scales = (low | (top.flatten(-2) << 4)).to(torch.int16) - 32
    return GroupedWeight(_rows(codes), 3, 16, _rows(scales.to(torch.int8)), zero=4, super_scale=_halves(blocks, 108, "d"))


def _six_bit_pairs(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and eight minima, of six bits each, in 12 bytes of Q4_K and Q5_K."""
    first, second, third = raw[..., :4], raw[..., 4:8], raw[..., 8:]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=-1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=-1)
    return scales, minima


def _with_minima(codes: Tensor, bits: int, blocks: Tensor) -> GroupedWeight:
    scales, minima = _six_bit_pairs(blocks[..., 4:16])
    d, dmin = _halves(blocks, 0, "d"), _halves(blocks, 2, "dmin")
    return GroupedWeight(_rows(codes), bits, 32, _rows(scales), offset=_rows(minima), super_scale=d, super_offset=-dmin)


def _q4_k(blocks: Tensor) -> GroupedWeight:
    return _with_minima(_nibbles(_cut(blocks[..., 16:], 4, 32)), 4, blocks)


def _q5_k(blocks: Tensor) -> GroupedWeight:
    high = _bit(blocks[..., 16:48], torch.arange(8, dtype=torch.uint8)).flatten(-2)
    codes = _nibbles(_cut(blocks[..., 48:], 4, 32)).flatten(-2) | (high << 4)
    return _with_minima(codes, 5, blocks)


def _q6_k(blocks: Tensor) -> GroupedWeight:
    low = _cut(blocks[..., :128], 2, 64)
    low = torch.cat([low & 15, low >> 4], dim=-1)
    pairs = _cut(blocks[..., None, 128:192], 2, 32).movedim(-2, -3)
    high = ((pairs >> torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]) & 3).flatten(-2)
    scales = blocks[..., 192:208].contiguous().view(torch.int8)
    return GroupedWeight(_rows(low | (high << 4)), 6, 16, _rows(scales), zero=32, super_scale=_halves(blocks, 208, "d"))


_READERS: dict[str, Callable[[Tensor], GroupedWeight]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
