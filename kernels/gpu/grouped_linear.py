"""x @ W.T of grouped quantized weights and 16-bit inputs on tensor cores: 2 to 6 bits, 8, and fp8 for GPUs that multiply none.

The contract stands in kernels/grouped_linear.py, the layout in grouped_format.py. Codes become exact small numbers of the inputs' dtype
in registers, zero points taken away; products are summed in float32 and each group's sum is scaled. Weights are on the side of the
matrix units that wants 64 rows, tokens on the other; K is cut into parts where tokens are few. With fp8 inputs (W4A8) codes of up to 4
bits become fp8, which holds -15 to 15 exactly.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Tile, tile_for
from .device import Device
from .grouped_format import LOWER_BITS, ROWS, Packed
from .launch import Launch
from .split_k import add_parts, parts_of, workspace_bytes
from .workspace import Workspace


@triton.constexpr_function
def _lower_bits(bits: int) -> int:
    """Bits of a code in the first words of a row (grouped_format.py)."""
    return LOWER_BITS[bits]


@triton.constexpr_function
def _integer_ptx(bits: int, slot: int, exponent: int) -> str:
    """Of two neighbouring words the codes of one slot, set under an exponent: shift, mask and merge, one instruction for two codes.

    Elements stay in their places, so that whatever layout the compiler chose is right.
    """
    lower = _lower_bits(bits)
    upper = bits - lower
    words = f"shr.u32 a, $1, {lower * (slot % (16 // lower))}; lop3.b32 {{}}, a, {_pair((1 << lower) - 1)}, {_pair(exponent)}, 0xEA;"
    if not upper:
        return f"{{ .reg .b32 a; {words.format('$0')} }}"
    shift = upper * slot - lower
    move = f"shr.u32 b, $2, {shift}" if shift >= 0 else f"shl.b32 b, $2, {-shift}"
    return f"{{ .reg .b32 a, b; {words.format('a')} {move}; lop3.b32 $0, b, {_pair(((1 << upper) - 1) << lower)}, a, 0xEA; }}"


@triton.constexpr_function
def _pair(half: int) -> str:
    """16 bits twice."""
    return f"{half * 0x10001:#010x}"


@triton.constexpr_function
def _fp8_ptx(slot: int, fraction_bits: int) -> str:
    """Of two neighbouring words the fp8 codes of one slot: exponent and fraction moved down to where a 16-bit float has its own."""
    upper = "shl.b32 a, $1, 8;" if slot == 0 else "mov.b32 a, $1;"
    move = f"shr.u32 b, a, {11 - fraction_bits}; and.b32 b, b, {_pair(0x7F << (fraction_bits - 3))};"
    return f"{{ .reg .b32 a, b; {upper} {move} lop3.b32 $0, a, {_pair(0x8000)}, b, 0xEA; }}"


@triton.jit
def _load(data, row, inside):
    """Words of rows. Weights are read once, so they need not stay in the cache."""
    return tl.load(data + row, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def _raised_slot(data, row, inside, SLOT: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, DEPTH: tl.constexpr):
    """One slot's codes as floats, a power of two more than they are: they stand in its low bits. The unit that converts is slow."""
    LOWER: tl.constexpr = _lower_bits(BITS)
    PTX: tl.constexpr = _integer_ptx(BITS, SLOT, 0x4300 if KIND == tl.bfloat16 else 0x6400)
    low = _load(data, row + SLOT // (16 // LOWER) * DEPTH, inside)
    if BITS == 8 and KIND == tl.bfloat16:  # which has no room for 8 bits above a power of two
        return (((low.to(tl.int32) >> (8 * SLOT)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)
    elif LOWER < BITS:
        high = _load(data, row + LOWER // (BITS - LOWER) * DEPTH, inside)
        return _as_halves(PTX, "=r,r,r", [low, high], KIND)
    else:
        return _as_halves(PTX, "=r,r", [low], KIND)


@triton.jit
def _as_halves(PTX: tl.constexpr, REGISTERS: tl.constexpr, words, KIND: tl.constexpr):
    """What PTX makes of two words at a time."""
    if KIND == tl.bfloat16:
        return tl.inline_asm_elementwise(PTX, REGISTERS, words, dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(PTX, REGISTERS, words, dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _raised(zeros, KIND: tl.constexpr, BITS: tl.constexpr):
    """Zero points as `_raised_slot` gives codes."""
    if KIND == tl.float16:
        return (zeros.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
    elif BITS < 8:
        return (zeros.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        return (zeros.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _fp8_slot(data, row, inside, SLOT: tl.constexpr, KIND: tl.constexpr):
    """One slot's fp8 codes: times 2 ** -8 as float16, whose exponents have another bias; as they are in bfloat16."""
    PTX: tl.constexpr = _fp8_ptx(SLOT, 10 if KIND == tl.float16 else 7)
    moved = _as_halves(PTX, "=r,r", [_load(data, row, inside)], KIND)
    return moved if KIND == tl.float16 else moved * tl.full((1, 1), 2.0**120, tl.bfloat16)


@triton.jit
def _less_zero(
    data, row, inside, taken, SLOT: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, IS_FP8: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """One slot's codes without the zero points `taken`, exact: KIND, or float32 where 8 bits meet bfloat16."""
    if IS_FP8:
        return _fp8_slot(data, row, inside, SLOT, KIND)
    else:
        return _raised_slot(data, row, inside, SLOT, KIND, BITS, DEPTH) - _raised(taken, KIND, BITS)


@triton.jit
def _weights(
    data, row, inside, zeros, scale, offset, at, zero,
    SLOT: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, IS_FP8: tl.constexpr, DEPTH: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """One slot's weights in float32; `at` leads to each one's scale."""
    taken = tl.load(zeros + at) if HAS_ZEROS else tl.full((1, 1), zero, tl.int32)
    values = _less_zero(data, row, inside, taken, SLOT, KIND, BITS, IS_FP8, DEPTH).to(tl.float32)
    values *= tl.load(scale + at).to(tl.float32)
    if IS_FP8 and KIND == tl.float16:
        values *= 256.0
    if HAS_OFFSET:
        values += tl.load(offset + at).to(tl.float32)
    return values


@triton.jit
def _multiply(
    x, x_scale, data, scale, zeros, offset, bias, y, parts, arrived,
    m, n, k, x_stride, x_scale_stride, y_stride, num_steps, num_parts, steps_each, zero,
    GROUP: tl.constexpr, RULE: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr, IS_FP8: tl.constexpr, DEPTH: tl.constexpr,
    SLOTS: tl.constexpr, ROW_WORDS: tl.constexpr, BAND: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr, FP8_INPUTS: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the edge the last row is read again: no mask in the loop, and nothing of it is stored.
    rows_read, features_read = tl.minimum(rows, m - 1).to(tl.int64), tl.minimum(features, n - 1)
    x_rows = x + rows_read[:, None] * x_stride
    within = tl.arange(0, DEPTH)
    bands = (features // BAND).to(tl.int64)
    data_at = (bands * num_steps * BAND + features % BAND) * ROW_WORDS
    inside = (bands * BAND < n)[:, None]
    begin = part * steps_each
    end = tl.minimum(begin + steps_each, num_steps)
    KIND: tl.constexpr = tl.float16 if FP8_INPUTS else x.dtype.element_ty
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(begin, end):
        row = (data_at + step * (BAND * ROW_WORDS))[:, None] + within[None, :]
        first = step * (SLOTS * DEPTH)
        whole = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)  # of the slots that share a scale, and of their inputs
        sums = tl.zeros((BLOCK_M,), tl.float32)
        for slot in tl.static_range(SLOTS):
            inputs = first + slot * DEPTH + within
            if EVEN_K:
                x_tile = tl.load(x_rows + inputs[None, :])
            else:
                x_tile = tl.load(x_rows + inputs[None, :], mask=(inputs < k)[None, :], other=0.0)
            if RULE == "column":
                at = (tl.minimum(inputs, k - 1) // GROUP)[None, :] * n + features_read[:, None]
                values = _weights(data, row, inside, zeros, scale, offset, at, zero, slot, KIND, BITS, IS_FP8, DEPTH, HAS_ZEROS, HAS_OFFSET)
                total = tl.dot(values.to(KIND), tl.trans(x_tile), total)
            else:
                group = 0 if RULE == "channel" else tl.minimum(first + slot * DEPTH, k - 1) // GROUP
                at = group * n + features_read
                taken = tl.load(zeros + at)[:, None] if HAS_ZEROS else tl.full((1, 1), zero, tl.int32)
                values = _less_zero(data, row, inside, taken, slot, KIND, BITS, IS_FP8, DEPTH)
                values = values.to(tl.float8e4nv if FP8_INPUTS else KIND)
                whole = tl.dot(values, tl.trans(x_tile), total if RULE == "channel" else whole)
                if HAS_OFFSET:
                    sums += tl.sum(x_tile.to(tl.float32), 1)
                if RULE == "channel":
                    total = whole
                elif slot % RUN == RUN - 1:
                    total += whole * tl.load(scale + at).to(tl.float32)[:, None]
                    whole = tl.zeros_like(whole)
                    if HAS_OFFSET:
                        total += tl.load(offset + at).to(tl.float32)[:, None] * sums[None, :]
                        sums = tl.zeros_like(sums)
    if SPLIT:
        tile = tile_n * tl.num_programs(0) + tile_m
        total, is_last = add_parts(total, parts, arrived, tile, part, num_parts, BLOCK_N, BLOCK_M)
        if not is_last:
            return
    if RULE == "channel":
        total *= tl.load(scale + features_read).to(tl.float32)[:, None]
    if IS_FP8 and KIND == tl.float16 and RULE != "column":
        total *= 256.0
    if FP8_INPUTS:
        total *= tl.load(x_scale + rows_read * x_scale_stride)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + features_read).to(tl.float32)[:, None]
    out = tl.trans(total).to(y.dtype.element_ty)
    tl.store(y + rows.to(tl.int64)[:, None] * y_stride + features[None, :], out, mask=(rows < m)[:, None] & (features < n)[None, :])


@triton.jit
def _dequantize(
    data, scale, zeros, offset, permutation, out, n, k, out_stride, num_steps, zero,
    GROUP: tl.constexpr, BITS: tl.constexpr, IS_FP8: tl.constexpr, DEPTH: tl.constexpr, SLOTS: tl.constexpr, ROW_WORDS: tl.constexpr,
    BAND: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    step, band = tl.program_id(0), tl.program_id(1)
    features = band * BAND + tl.arange(0, BAND)
    within = tl.arange(0, DEPTH)
    place = (band.to(tl.int64) * num_steps + step) * (BAND * ROW_WORDS)
    row = place + (tl.arange(0, BAND) * ROW_WORDS)[:, None] + within[None, :]
    out_rows = out + features.to(tl.int64)[:, None] * out_stride
    for slot in tl.static_range(SLOTS):
        inputs = step * (SLOTS * DEPTH) + slot * DEPTH + within
        inside = (features < n)[:, None] & (inputs < k)[None, :]
        at = (tl.minimum(inputs, k - 1) // GROUP)[None, :] * n + tl.minimum(features, n - 1)[:, None]
        values = _weights(data, row, inside, zeros, scale, offset, at, zero, slot, tl.float16, BITS, IS_FP8, DEPTH, HAS_ZEROS, HAS_OFFSET)
        columns = tl.load(permutation + inputs, mask=inputs < k, other=0) if HAS_ORDER else inputs
        tl.store(out_rows + columns[None, :], values.to(out.dtype.element_ty), mask=inside)


def op_of(weight: Packed, dtype: torch.dtype) -> str:
    """The operation's name in the tables of tiles, for inputs of a dtype: "w4a16", "w4a8", "w8a16_fp8".

    Small groups and offsets take more registers, and tiles of their own: "w4a16_fine".
    """
    if weight.kind == "fp8":
        return "w8a16_fp8"
    if dtype == torch.float8_e4m3fn:
        return f"w{weight.bits}a8"
    is_fine = weight.offset is not None or weight.scale_rule == "column" or (weight.scale_rule == "slots" and weight.group_size < 64)
    return f"w{weight.bits}a16{'_fine' if is_fine else ''}"


def launch(
    x: Tensor, weight: Packed, bias: Tensor | None, out: Tensor, *, device: Device, workspace: Workspace, x_scale: Tensor | None = None
) -> Launch:
    """The launch that fills `out` [M, N].

    x [M, K] bfloat16 or float16, or fp8 codes with x_scale float32 [M, 1] and weights of 4 bits or less; rows may be strided; inputs in
    the order of the weight's permutation, where it has one. out bfloat16, float16 or float32. M is at least 1.
    """
    tile = tile_for(device, op_of(weight, x.dtype), x.shape[0])
    return _launch(tile, x, weight, bias, out, device=device, workspace=workspace, x_scale=x_scale)


def _launch(
    tile: Tile, x: Tensor, weight: Packed, bias: Tensor | None, out: Tensor, *, device: Device, workspace: Workspace,
    x_scale: Tensor | None = None,
) -> Launch:  # fmt: skip
    (m, k), n = x.shape, weight.out_features
    num_parts, tiles = parts_of(tile, device, m, n, weight.in_features, steps=weight.num_steps)
    scratch = workspace.take("parts", workspace_bytes(tiles=tiles, num_parts=num_parts, block_m=tile.block_m, block_n=tile.block_n))
    args = (
        x, x_scale, weight.data, weight.scale, weight.zeros, weight.offset, bias, out, scratch.view(torch.float32),
        workspace.arrived, m, n, k, x.stride(0), 0 if x_scale is None else x_scale.stride(0), out.stride(0), weight.num_steps, num_parts,
        -(-weight.num_steps // num_parts), weight.zero,
    )  # fmt: skip
    options = {
        **_layout(weight), "RULE": weight.scale_rule, "RUN": weight.run, "HAS_BIAS": bias is not None,
        "FP8_INPUTS": x.dtype == torch.float8_e4m3fn, "SPLIT": num_parts > 1, "EVEN_K": k % weight.step == 0,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    if weight.scale_rule == "channel":
        options["GROUP"] = 0  # the kernel is the same for any K
    return Launch(_multiply, (-(-m // tile.block_m), -(-n // tile.block_n), num_parts), args, options)


def dequantize(weight: Packed, out: Tensor) -> Launch:
    """The launch that fills `out` [N, K] with the weight, bfloat16, float16 or float32, inputs in their own order."""
    args = (
        weight.data, weight.scale, weight.zeros, weight.offset, weight.permutation, out, weight.out_features, weight.in_features,
        out.stride(0), weight.num_steps, weight.zero,
    )  # fmt: skip
    options = {**_layout(weight), "HAS_ORDER": weight.permutation is not None, "num_warps": 4, "num_stages": 1}
    return Launch(_dequantize, (weight.num_steps, weight.data.shape[0]), args, options)


def _layout(weight: Packed) -> dict[str, Any]:
    return {
        "GROUP": weight.group_size, "BITS": weight.bits, "IS_FP8": weight.kind == "fp8", "DEPTH": weight.depth, "SLOTS": weight.slots,
        "ROW_WORDS": weight.data.shape[3], "BAND": ROWS, "HAS_ZEROS": weight.zeros is not None, "HAS_OFFSET": weight.offset is not None,
    }  # fmt: skip
