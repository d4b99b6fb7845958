"""x @ W.T on the CPU with quantized weights of 2, 4 or 8 bits at their width, and inputs as 16-bit integers with a scale for each group.

Inputs lose about what bfloat16 loses: half of 1 / 32767 of the greatest of a group. Whole-number products cost half of float32's, and
codes are ready for them with a shift and a mask, so that few rows run at the speed of memory and many faster than dense weights.
"""

from __future__ import annotations

import functools
from typing import Final

import numba
import torch
from torch import Tensor

from ..grouped_linear import GroupedWeight
from . import grouped_linear
from .address import argument
from .atomics import fetch_add
from .grouped_linear import PackedWeight
from .jit import make_caller
from .panel_rows import OWN, M, check, make_body
from .threads import KERNEL_SIGNATURE, Kernel, team_size
from .tile import COLUMNS, MAX_ROWS
from .wide_code import QUANTIZE_ARGUMENTS, TILE_ARGUMENTS, compiled, greatest_input

BITS: Final = (2, 4, 8)
LEAST_GROUP: Final = 32  # below, what is done once a group costs more than whole numbers save
LEAST_LIMIT: Final = 1 << 14
_QUANTIZE_ROWS: Final = 8

_columns = COLUMNS
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

# Arguments after panel_rows' own, as int64 at 8 * index. TILES: the addresses of tile1..6.
X, X_ROW, CODES, CODES_ROW, SCALES, SUMS, GROUPS, QUANTIZE, DATA, PANEL_BYTES, BIAS, TILES = range(OWN, OWN + 12)


@numba.njit(nogil=True)
def _quantize_body(arguments: int) -> None:
    m, x_row, codes_row = argument(arguments, M), argument(arguments, X_ROW), argument(arguments, CODES_ROW)
    groups = argument(arguments, GROUPS)
    while True:
        first = fetch_add(arguments, _quantize_rows)
        if first >= m:
            break
        _call_quantize(
            argument(arguments, QUANTIZE),
            (
                argument(arguments, X) + first * x_row,
                x_row,
                min(_quantize_rows, m - first),
                groups,
                argument(arguments, CODES) + first * codes_row,
                codes_row,
                argument(arguments, SCALES) + 4 * first * groups,
                argument(arguments, SUMS) + 4 * first * groups,
            ),
        )


@numba.njit(nogil=True)
def _multiply(arguments: int, panel: int, row: int, rows: int, target: int, target_row: int) -> None:
    """Rows row..row+rows of one panel."""
    codes_row, groups, bias = argument(arguments, CODES_ROW), argument(arguments, GROUPS), argument(arguments, BIAS)
    _call_tile(
        argument(arguments, TILES + rows - 1),
        (
            argument(arguments, CODES) + row * codes_row,
            codes_row,
            argument(arguments, DATA) + panel * argument(arguments, PANEL_BYTES),
            target,
            target_row,
            argument(arguments, SCALES) + 4 * row * groups,
            argument(arguments, SUMS) + 4 * row * groups,
            4 * groups,
            groups,
            bias + panel * _columns * 4 if bias != 0 else 0,
        ),
    )


# Made here and not inside _linear_kernel: Numba's cache does not recognise functions made anew.
_linear_body = make_body(_multiply, "wide")


@functools.cache
def _quantize_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def wide_quantize(arguments):
        _quantize_body(arguments)

    return Kernel(wide_quantize)


@functools.cache
def _linear_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def wide_linear(arguments):
        _linear_body(arguments)

    return Kernel(wide_linear)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
    """out[M, N] = x[M, K] @ W.T + bias; x and out float32 with contiguous rows, bias from grouped_linear.pad_bias.

    Raises ValueError for shapes that do not fit the weight.
    """
    check(x, out, in_features=weight.in_features, out_features=weight.out_features)
    m, k = x.shape
    if m == 0:
        return out
    if weight.permutation is not None:
        x = x.index_select(1, weight.permutation)
    groups, n, panels = k // weight.form.group_size, weight.out_features, weight.data.shape[0]
    codes = torch.empty(m, k, dtype=torch.int16)
    small = torch.empty(2, m, groups)
    code = compiled(weight.form)
    threads = team_size() if m * n * k > 1 << 16 else 1
    arguments = (
        out.data_ptr(),
        out.stride(0) * 4,
        m,
        n,
        max(1, panels // (threads * 4)),
        x.data_ptr(),
        x.stride(0) * 4,
        codes.data_ptr(),
        2 * k,
        small.data_ptr(),
        small.data_ptr() + 4 * m * groups,
        groups,
        code["quantize"],
        weight.data.data_ptr(),
        weight.data.shape[1],
        0 if bias is None else bias.data_ptr(),
        *(code[f"tile{rows}"] for rows in range(1, MAX_ROWS + 1)),
    )
    _quantize_kernel()(team_size() if m * k > 1 << 16 else 1, *arguments)
    _linear_kernel()(threads, *arguments)
    return out


rows = grouped_linear.rows
