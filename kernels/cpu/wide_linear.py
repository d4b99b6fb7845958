"""x @ W.T on the CPU with quantized weights of 2, 4 or 8 bits at their width, and inputs as 16-bit integers with a scale for each group.

Inputs lose about what bfloat16 loses: half of 1 / 32767 of the greatest of a group. Whole-number products cost half of float32's, and
codes are ready for them with a shift and a mask, so that few rows run at the speed of memory and many faster than dense weights.
"""

from __future__ import annotations

import functools
from typing import Final

import numba
import numpy as np
import torch
from torch import Tensor

from ..grouped_linear import GroupedWeight
from . import grouped_linear
from .address import load_f32, load_i64, store_f32
from .atomics import fetch_add
from .grouped_linear import PackedWeight
from .jit import make_caller
from .threads import KERNEL_SIGNATURE, Kernel, team_size
from .tile import COLUMNS, MAX_ROWS
from .wide_code import QUANTIZE_ARGUMENTS, TILE_ARGUMENTS, compiled, greatest_input

BITS: Final = (2, 4, 8)
LEAST_GROUP: Final = 32  # below, what is done once a group costs more than whole numbers save
LEAST_LIMIT: Final = 1 << 14
ROW_BLOCK: Final = 16 * MAX_ROWS
_QUANTIZE_ROWS: Final = 8

_columns = COLUMNS
_max_rows = MAX_ROWS
_row_block = ROW_BLOCK
_quantize_rows = _QUANTIZE_ROWS


def takes(*, bits: int, group_size: int) -> bool:
    """Whether groups of that size and width can be multiplied so, with inputs of at least 15 bits."""
    whole = bits in BITS and group_size >= LEAST_GROUP and group_size % (32 // bits) == 0 and group_size % 8 == 0
    return whole and greatest_input(group_size, bits) >= LEAST_LIMIT


def pack(weight: GroupedWeight) -> PackedWeight:
    """Pack once, at load. Raises ValueError for a weight that `takes` would not."""
    if not takes(bits=weight.bits, group_size=weight.group_size) or weight.codes.dtype == torch.float8_e4m3fn:
        raise ValueError(f"{weight.bits} bits in groups of {weight.group_size} cannot be multiplied by 16-bit integers")
    return grouped_linear.pack(weight, paired=True)


_call_tile = make_caller(TILE_ARGUMENTS)
_call_quantize = make_caller(QUANTIZE_ARGUMENTS)

# Arguments, as int64 at 8 * index. TILES: the addresses of tile1..6.
X, X_ROW, CODES, CODES_ROW, SCALES, SUMS, M, GROUPS, QUANTIZE = range(2, 11)
DATA, PANEL_BYTES, BIAS, Y, Y_ROW, N, PER_TASK, TILES = range(11, 19)


@numba.njit(nogil=True)
def _argument(arguments: int, index: int) -> int:
    return load_i64(arguments + 8 * index)


@numba.njit(nogil=True)
def _quantize_body(arguments: int) -> None:
    m, x_row, codes_row = _argument(arguments, M), _argument(arguments, X_ROW), _argument(arguments, CODES_ROW)
    groups = _argument(arguments, GROUPS)
    while True:
        first = fetch_add(arguments, _quantize_rows)
        if first >= m:
            break
        _call_quantize(
            _argument(arguments, QUANTIZE),
            (
                _argument(arguments, X) + first * x_row,
                x_row,
                min(_quantize_rows, m - first),
                groups,
                _argument(arguments, CODES) + first * codes_row,
                codes_row,
                _argument(arguments, SCALES) + 4 * first * groups,
                _argument(arguments, SUMS) + 4 * first * groups,
            ),
        )


@numba.njit(nogil=True)
def _panel(arguments: int, panel: int, first: int, last: int, spare: int) -> None:
    """Rows first..last of one panel. A panel that is not whole goes through `spare`."""
    bias, y_row, codes_row = _argument(arguments, BIAS), _argument(arguments, Y_ROW), _argument(arguments, CODES_ROW)
    groups = _argument(arguments, GROUPS)
    valid = min(_columns, _argument(arguments, N) - panel * _columns)
    column = panel * _columns * 4
    for row in range(first, last, _max_rows):
        rows = min(_max_rows, last - row)
        place = _argument(arguments, Y) + row * y_row + column
        whole = valid == _columns
        _call_tile(
            _argument(arguments, TILES + rows - 1),
            (
                _argument(arguments, CODES) + row * codes_row,
                codes_row,
                _argument(arguments, DATA) + panel * _argument(arguments, PANEL_BYTES),
                place if whole else spare,
                y_row if whole else 4 * _columns,
                _argument(arguments, SCALES) + 4 * row * groups,
                _argument(arguments, SUMS) + 4 * row * groups,
                4 * groups,
                groups,
                bias + column if bias != 0 else 0,
            ),
        )
        if not whole:
            for r in range(rows):
                for c in range(valid):
                    store_f32(place + r * y_row + 4 * c, load_f32(spare + r * 4 * _columns + 4 * c))


@numba.njit(nogil=True)
def _linear_body(arguments: int) -> None:
    m, per_task = _argument(arguments, M), _argument(arguments, PER_TASK)
    panels = (_argument(arguments, N) + _columns - 1) // _columns
    spare_floats = np.empty(_max_rows * _columns, np.float32)
    spare = spare_floats.ctypes.data
    while True:
        first_panel = fetch_add(arguments, 1) * per_task
        if first_panel >= panels:
            break
        for start in range(0, m, _row_block):
            for panel in range(first_panel, min(first_panel + per_task, panels)):
                _panel(arguments, panel, start, min(m, start + _row_block), spare)


@functools.cache
def _quantize_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def wide_quantize(arguments):  # type: ignore[no-untyped-def]
        _quantize_body(arguments)

    return Kernel(wide_quantize)


@functools.cache
def _linear_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def wide_linear(arguments):  # type: ignore[no-untyped-def]
        _linear_body(arguments)

    return Kernel(wide_linear)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
    """out[M, N] = x[M, K] @ W.T + bias; x and out float32 with contiguous rows, bias from grouped_linear.pad_bias."""
    if weight.permutation is not None:
        x = x.index_select(1, weight.permutation)
    m, k = x.shape
    if m == 0:
        return out
    groups, n, panels = k // weight.form.group_size, weight.out_features, weight.data.shape[0]
    codes = torch.empty(m, k, dtype=torch.int16)
    small = torch.empty(2, m, groups)
    code = compiled(weight.form)
    shared = (x.data_ptr(), x.stride(0) * 4, codes.data_ptr(), 2 * k, small.data_ptr(), small.data_ptr() + 4 * m * groups, m, groups)
    _quantize_kernel()(team_size() if m * k > 1 << 16 else 1, *shared, code["quantize"])
    threads = team_size() if m * n * k > 1 << 16 else 1
    _linear_kernel()(
        threads,
        *shared,
        0,
        weight.data.data_ptr(),
        weight.data.shape[1],
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0) * 4,
        n,
        max(1, panels // (threads * 4)),
        *(code[f"tile{rows}"] for rows in range(1, MAX_ROWS + 1)),
    )
    return out


rows = grouped_linear.rows
