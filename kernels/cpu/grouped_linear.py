"""x @ W.T on the CPU over grouped quantized weights, packed once into column panels at their own bit width; float32 arithmetic.

Few rows: codes are widened in registers and multiplied at once, so that memory is read at the format's width. More rows: a block of a
panel is decoded to float32 in the cache once, and all rows are multiplied with it. Either way an output is the same chain of fused
multiply-adds along K with the same weights: a row's bits do not depend on how many rows there are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import numba
import numpy as np
import torch
from torch import Tensor

from ..grouped_linear import GroupedWeight
from .address import argument, load_f32, load_i64, store_f32
from .atomics import fetch_add
from .jit import make_caller
from .panel_format import TILE_ARGUMENTS, PanelFormat, ScaleKind, ZeroKind, compiled, pair_shift
from .panel_rows import check, copy_rows
from .threads import KERNEL_SIGNATURE, Kernel, team_size
from .tile import COLUMNS, MAX_ROWS, make_row_tiles

DEPTH: Final = 256  # inputs of a panel decoded at a time: 16 KiB, which stay in the first-level cache
ROW_BLOCK: Final = 32 * MAX_ROWS  # rows multiplied with them: with DEPTH inputs, 192 KiB of x, in the second-level cache

_SCALES: Final[dict[torch.dtype, ScaleKind]] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.uint8: "uint8",
    torch.int8: "int8",
}
_columns = COLUMNS
_max_rows = MAX_ROWS
_row_block = ROW_BLOCK


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A GroupedWeight in panels: `data` uint8 [panels, bytes of a panel]."""

    form: PanelFormat
    data: Tensor
    out_features: int
    in_features: int
    permutation: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.permutation is None else self.permutation.nbytes)


def panel_format(weight: GroupedWeight, *, paired: bool = False) -> PanelFormat:
    """The layout that keeps a weight's codes at their width and its scales in their dtype."""
    zero: ZeroKind = "constant"
    if weight.zeros is not None:
        zero = "nibbles" if weight.bits == 4 else "bytes"
    return PanelFormat(
        codes="fp8_e4m3" if weight.codes.dtype == torch.float8_e4m3fn else "integer",
        bits=weight.bits,
        group_size=weight.group_size,
        scale=_SCALES[weight.scale.dtype],
        zero=zero,
        constant_zero=weight.zero + ((1 << (weight.bits - 1)) if weight.codes.dtype == torch.int8 else 0),
        offset=None if weight.offset is None else _SCALES[weight.offset.dtype],
        per_super=0 if weight.super_scale is None else weight.num_groups // weight.super_scale.shape[1],
        super_scale=None if weight.super_scale is None else _SCALES[weight.super_scale.dtype],
        super_offset=None if weight.super_offset is None else _SCALES[weight.super_offset.dtype],
        paired=paired,
    )


def pack(weight: GroupedWeight, *, paired: bool = False) -> PackedWeight:
    """Pack once, at load. Peak memory beside the weight is about four bytes a weight."""
    form = panel_format(weight, paired=paired)
    n, k = weight.codes.shape
    panels, groups, size = -(-n // COLUMNS), weight.num_groups, weight.group_size

    def columns_last(tensor: Tensor) -> Tensor:
        """[N, ...] to [panels, ..., COLUMNS], missing columns zero."""
        if n % COLUMNS:
            padded = torch.zeros(panels * COLUMNS, *tensor.shape[1:], dtype=tensor.dtype)
            padded[:n] = tensor
            tensor = padded
        return tensor.view(panels, COLUMNS, *tensor.shape[1:]).movedim(1, -1)

    def as_bytes(tensor: Tensor) -> Tensor:
        """[panels, G, COLUMNS] elements to [panels, G, bytes]."""
        return columns_last(tensor).contiguous().view(torch.uint8)

    pieces = [as_bytes(weight.scale)]
    if weight.zeros is not None:
        zeros = as_bytes(weight.zeros)
        half = COLUMNS // 2
        pieces.append(zeros[..., :half] | (zeros[..., half:] << 4) if form.zero == "nibbles" else zeros)
    if weight.offset is not None:
        pieces.append(as_bytes(weight.offset))
    codes = columns_last(_stored_codes(weight, form).view(n, groups, size))  # [panels, G, g, COLUMNS]
    missing = -size % form.unit
    if missing:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, missing))
    if form.paired:
        pieces.append(_pack_pairs(codes, form.bits))
    for bits, shift in form.planes if not form.paired else ():
        plane = codes if bits == 8 else (codes >> shift) & ((1 << bits) - 1)
        pieces.append(_pack_plane(plane, bits, words=bits >= 4 and form.codes != "fp8_e4m3"))
    data = torch.cat(pieces, dim=2)
    if weight.super_scale is not None:
        above = [as_bytes(weight.super_scale)] + ([] if weight.super_offset is None else [as_bytes(weight.super_offset)])
        supers = weight.super_scale.shape[1]
        data = torch.cat([*above, data.view(panels, supers, -1)], dim=2)
    return PackedWeight(form, data.reshape(panels, -1).contiguous(), n, k, weight.permutation)


def _stored_codes(weight: GroupedWeight, form: PanelFormat) -> Tensor:
    """Codes as unsigned bytes of `bits` bits: two's complement around the center for 4 and 8 bits, plain for the others."""
    raw = weight.codes.view(torch.uint8)
    if form.codes == "fp8_e4m3":
        return raw
    if weight.codes.dtype == torch.int8:
        raw = raw + form.center  # signed to plain, modulo 256
    if form.bits in (4, 8) and not form.paired:
        raw = raw ^ form.center
    return raw & ((1 << form.bits) - 1) if form.bits < 8 else raw


def _pack_pairs(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [panels, G, g, COLUMNS] to the words of a paired format, as bytes."""
    panels, groups, _, columns = codes.shape
    per_word = 32 // bits
    cells = codes.reshape(panels, groups, -1, per_word, columns)
    words = torch.zeros(panels, groups, cells.shape[2], columns, dtype=torch.int32)
    for k in range(per_word):
        words |= cells[:, :, :, k].to(torch.int32) << pair_shift(k, bits)
    return words.view(torch.uint8).reshape(panels, groups, -1)


def _pack_plane(plane: Tensor, bits: int, *, words: bool) -> Tensor:
    """Codes uint8 [panels, G, g, COLUMNS] below 2**bits to bytes [panels, G, g * bits / 8 * COLUMNS]."""
    panels, groups, _, columns = plane.shape
    per_byte = 8 // bits
    cells = plane.reshape(panels, groups, -1, per_byte, columns)
    packed = cells[..., 0, :]
    for j in range(1, per_byte):
        packed = packed | (cells[..., j, :] << (j * bits))
    if words:  # the four bytes of a column's word lie side by side
        packed = packed.reshape(panels, groups, -1, 4, columns).transpose(3, 4)
    return packed.reshape(panels, groups, -1)


_call_decode = make_caller(5)
_call_tile = make_caller(TILE_ARGUMENTS)
_tiles = make_row_tiles(vectors=2, dtype="float32")

# Arguments, as int64 at 8 * index. TILES: the addresses of direct1..6.
X, X_ROW, DATA, PANEL_BYTES, Y, Y_ROW, M, N, K, BIAS, PER_TASK, GROUPS, GROUP_SIZE = range(2, 15)
PER_SUPER, GROUP_BYTES, SUPER_BYTES, DECODE, PAIR, DIRECT, STEP, TILES = range(15, 23)


@numba.njit(nogil=True)
def _group_address(arguments: int, panel: int, group: int) -> tuple[int, int]:
    """Addresses of a group's super-group and of the group."""
    data = argument(arguments, DATA) + panel * argument(arguments, PANEL_BYTES)
    per_super, group_bytes = argument(arguments, PER_SUPER), argument(arguments, GROUP_BYTES)
    if per_super == 0:
        return data, data + group * group_bytes
    super_bytes = argument(arguments, SUPER_BYTES)
    above = data + group // per_super * (super_bytes + per_super * group_bytes)
    return above, above + super_bytes + group % per_super * group_bytes


@numba.njit(nogil=True)
def _decode(arguments: int, panel: int, depth: int, steps: int, target: int) -> None:
    """Inputs depth..depth+steps of one panel to float32 [steps, COLUMNS]."""
    size = argument(arguments, GROUP_SIZE)
    while steps > 0:
        group = depth // size
        first = depth - group * size
        count = min(steps, size - first)
        above, address = _group_address(arguments, panel, group)
        _call_decode(argument(arguments, DECODE), (above, address, first, count, target))
        depth += count
        steps -= count
        target += count * _columns * 4


@numba.njit(nogil=True)
def _direct(arguments: int, first_panel: int, last_panel: int, spare: int) -> None:
    """All rows, at most _max_rows, of some panels, codes widened in registers. What has no whole panel goes through `spare`."""
    m, n, groups = argument(arguments, M), argument(arguments, N), argument(arguments, GROUPS)
    y_row, bias, panel_bytes = argument(arguments, Y_ROW), argument(arguments, BIAS), argument(arguments, PANEL_BYTES)
    panel = first_panel
    while panel < last_panel:
        panels = 2 if m == 1 and panel + 2 <= last_panel else 1
        tile = argument(arguments, PAIR if panels == 2 else TILES + m - 1)
        valid = min(panels * _columns, n - panel * _columns)
        place = argument(arguments, Y) + panel * _columns * 4
        target, target_row = place, y_row
        if valid < panels * _columns:
            target, target_row = spare, panels * _columns * 4
        data = argument(arguments, DATA) + panel * panel_bytes
        panel_bias = bias + panel * _columns * 4 if bias != 0 else 0
        x, x_row = argument(arguments, X), argument(arguments, X_ROW)
        _call_tile(tile, (x, x_row, data, panel_bytes, target, target_row, groups, panel_bias))
        if valid < panels * _columns:
            copy_rows(target, target_row, place, y_row, m, valid)
        panel += panels


@numba.njit(nogil=True)
def _decoded(arguments: int, first_panel: int, last_panel: int, spare: int, scratch: int) -> None:
    """All rows of some panels: decode a block of inputs into `scratch`, multiply many rows with it, take the next block."""
    m, n, k, bias = argument(arguments, M), argument(arguments, N), argument(arguments, K), argument(arguments, BIAS)
    x, x_row, y_row = argument(arguments, X), argument(arguments, X_ROW), argument(arguments, Y_ROW)
    step = argument(arguments, STEP)
    for start in range(0, m, _row_block):
        stop = min(m, start + _row_block)
        for panel in range(first_panel, last_panel):
            valid = min(_columns, n - panel * _columns)
            for depth in range(0, k, step):
                steps = min(step, k - depth)
                _decode(arguments, panel, depth, steps, scratch)
                for row in range(start, stop, _max_rows):
                    rows = min(_max_rows, stop - row)
                    place = argument(arguments, Y) + row * y_row + panel * _columns * 4
                    target, target_row = place, y_row
                    if valid < _columns:
                        target, target_row = spare, _columns * 4
                        if depth > 0:
                            copy_rows(place, y_row, target, target_row, rows, valid)
                    if depth == 0 and bias != 0:
                        copy_rows(bias + panel * _columns * 4, 0, target, target_row, rows, valid)
                    adds = 1 if depth > 0 or bias != 0 else 0
                    _tiles(rows, x + row * x_row + 4 * depth, x_row, scratch, _columns * 4, target, target_row, steps, adds)
                    if valid < _columns:
                        copy_rows(target, target_row, place, y_row, rows, valid)


@numba.njit(nogil=True)
def _body(arguments: int) -> None:
    n, per_task, direct = argument(arguments, N), argument(arguments, PER_TASK), argument(arguments, DIRECT)
    panels = (n + _columns - 1) // _columns
    spare_floats = np.empty(_max_rows * 2 * _columns, np.float32)
    scratch_floats = np.empty(_columns if direct != 0 else (argument(arguments, STEP) + 8) * _columns, np.float32)
    while True:
        first_panel = fetch_add(arguments, 1) * per_task
        if first_panel >= panels:
            break
        last_panel = min(first_panel + per_task, panels)
        if direct != 0:
            _direct(arguments, first_panel, last_panel, spare_floats.ctypes.data)
        else:
            _decoded(arguments, first_panel, last_panel, spare_floats.ctypes.data, scratch_floats.ctypes.data)


@functools.cache
def _kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def grouped_linear(arguments):
        _body(arguments)

    return Kernel(grouped_linear)


def _step(form: PanelFormat, groups: int) -> int:
    """Inputs decoded at a time: within a group they begin at whole units."""
    if form.group_size % form.unit == 0 or groups == 1:
        return DEPTH
    return max(1, DEPTH // form.group_size) * form.group_size


def pad_bias(bias: Tensor | None) -> Tensor | None:
    """A bias as `linear` takes it: float32, its end filled up to whole panels."""
    if bias is None:
        return None
    return torch.nn.functional.pad(bias.float(), (0, -bias.shape[0] % (2 * COLUMNS))).contiguous()


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
    """out[M, N] = x[M, K] @ W.T + bias; x and out float32 with contiguous rows, bias from `pad_bias`.

    Raises ValueError for shapes that do not fit the weight.
    """
    check(x, out, in_features=weight.in_features, out_features=weight.out_features)
    m, k = x.shape
    if m == 0:
        return out
    if weight.permutation is not None:
        x = x.index_select(1, weight.permutation)
    form, n = weight.form, weight.out_features
    code = compiled(form)
    panels, groups = weight.data.shape[0], k // form.group_size
    threads = team_size() if m * n * k > 1 << 16 else 1
    direct = form.direct and m <= MAX_ROWS
    per_task = max(1, panels // (threads * 4))
    if m == 1:
        per_task += per_task & 1
    tiles = [code[f"direct{rows}"] if direct else 0 for rows in range(1, MAX_ROWS + 1)]
    _kernel()(
        threads,
        x.data_ptr(),
        x.stride(0) * 4,
        weight.data.data_ptr(),
        weight.data.shape[1],
        out.data_ptr(),
        out.stride(0) * 4,
        m,
        n,
        k,
        0 if bias is None else bias.data_ptr(),
        per_task,
        groups,
        form.group_size,
        form.per_super,
        form.group_bytes,
        form.super_bytes,
        code["decode"],
        code["pair1"] if direct else 0,
        1 if direct else 0,
        _step(form, groups),
        *tiles,
    )
    return out


@numba.njit(nogil=True)
def _rows_body(arguments: int) -> None:
    y, y_row, k = argument(arguments, Y), argument(arguments, Y_ROW), argument(arguments, K)
    indices, count = argument(arguments, X), argument(arguments, M)
    step = argument(arguments, STEP)
    scratch_floats = np.empty((step + 8) * _columns, np.float32)
    scratch = scratch_floats.ctypes.data
    while True:
        i = fetch_add(arguments, 1)
        if i >= count:
            break
        index = load_i64(indices + 8 * i)
        panel = index // _columns
        column = index - panel * _columns
        for depth in range(0, k, step):
            steps = min(step, k - depth)
            _decode(arguments, panel, depth, steps, scratch)
            for j in range(steps):
                store_f32(y + i * y_row + 4 * (depth + j), load_f32(scratch + 4 * (j * _columns + column)))


@functools.cache
def _rows_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def grouped_rows(arguments):
        _rows_body(arguments)

    return Kernel(grouped_rows)


def rows(weight: PackedWeight, indices: Tensor) -> Tensor:
    """W[indices], float32 [R, K], for int64 indices [R]: lets an embedding share its weight with the head.

    Raises IndexError for an index outside 0..N-1.
    """
    form, count = weight.form, indices.shape[0]
    out = torch.empty(count, weight.in_features)
    if count == 0:
        return out
    if int(indices.min()) < 0 or int(indices.max()) >= weight.out_features:
        raise IndexError(f"rows {int(indices.min())} to {int(indices.max())} asked of a weight that has {weight.out_features}")
    indices = indices.contiguous()
    arguments = {
        X: indices.data_ptr(),
        DATA: weight.data.data_ptr(),
        PANEL_BYTES: weight.data.shape[1],
        Y: out.data_ptr(),
        Y_ROW: out.stride(0) * 4,
        M: count,
        K: weight.in_features,
        GROUP_SIZE: form.group_size,
        PER_SUPER: form.per_super,
        GROUP_BYTES: form.group_bytes,
        SUPER_BYTES: form.super_bytes,
        DECODE: compiled(form)["decode"],
        STEP: _step(form, weight.in_features // form.group_size),
    }
    _rows_kernel()(team_size() if count > 4 else 1, *(arguments.get(index, 0) for index in range(X, TILES)))
    if weight.permutation is None:
        return out
    return torch.empty_like(out).index_copy_(1, weight.permutation, out)
