"""x @ W.T on the CPU in whole numbers: the contract of kernels/int8_linear.py over weights packed once into column panels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import numba
import numpy as np
import torch
from torch import Tensor

from ..int8_linear import wide_limit
from .address import load_f32, load_i64, store_f32
from .atomics import fetch_add
from .int8_code import MAX_DEPTH, QUANTIZE_ARGUMENTS, TILE_ARGUMENTS, Way, code_bytes, compiled, products_per_lane, way
from .jit import make_caller
from .threads import KERNEL_SIGNATURE, Kernel, team_size
from .tile import COLUMNS, MAX_ROWS

ROW_BLOCK: Final = 16 * MAX_ROWS
_QUANTIZE_ROWS: Final = 8  # rows that a task quantizes

_columns = COLUMNS
_max_rows = MAX_ROWS
_row_block = ROW_BLOCK
_quantize_rows = _QUANTIZE_ROWS


@dataclass(frozen=True, eq=False)
class PackedInt8:
    """int8 W [N, K] in panels: `data` int8 [panels, K / p, COLUMNS, p], with K filled up to a multiple of 8.

    `limit` is the greatest code of an input: 127, or more for inputs as 16-bit integers.
    """

    kind: Way
    limit: int
    data: Tensor
    scale: Tensor  # float32 [panels * COLUMNS]
    start: Tensor  # int32 [panels * COLUMNS]: what sums begin with
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + self.start.nbytes


def pack(codes: Tensor, scale: Tensor, *, wide: bool = False) -> PackedInt8:
    """Pack codes int8 [N, K] with scale [N], once, at load; `wide` for inputs as 16-bit integers.

    Raises ValueError for a K whose sums could overflow.
    """
    n, k = codes.shape
    if k > MAX_DEPTH:
        raise ValueError(f"sums of {k} products of int8 can overflow: at most {MAX_DEPTH}")
    kind = way()
    if wide and kind == "vnni":
        kind = "madd"  # vpdpbusd takes bytes
    panels, depth, step = -(-n // COLUMNS), -(-k // 8) * 8, products_per_lane(kind)
    full = torch.zeros(panels * COLUMNS, depth, dtype=torch.int8)
    full[:n, :k] = codes
    data = full.view(panels, COLUMNS, depth // step, step).transpose(1, 2).contiguous()
    start = torch.zeros(panels * COLUMNS, dtype=torch.int32)
    if kind == "vnni":
        start = -128 * full.sum(1, dtype=torch.int32)
    scales = torch.zeros(panels * COLUMNS)
    scales[:n] = scale.float()
    return PackedInt8(kind, wide_limit(k) if wide else 127, data, scales, start, n, k)


_call_tile = make_caller(TILE_ARGUMENTS)
_call_quantize = make_caller(QUANTIZE_ARGUMENTS)

# Arguments, as int64 at 8 * index. TILES: the addresses of tile1..6.
X, X_ROW, CODES, CODES_ROW, X_SCALE, STATIC, M, K, LIMIT, QUANTIZE = range(2, 12)
DATA, PANEL_BYTES, LANES, W_SCALE, START, BIAS, Y, Y_ROW, N, PER_TASK, TILES = range(12, 23)


@numba.njit(nogil=True)
def _argument(arguments: int, index: int) -> int:
    return load_i64(arguments + 8 * index)


@numba.njit(nogil=True)
def _quantize_body(arguments: int) -> None:
    m, x_row, codes_row = _argument(arguments, M), _argument(arguments, X_ROW), _argument(arguments, CODES_ROW)
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
                _argument(arguments, K),
                _argument(arguments, CODES) + first * codes_row,
                codes_row,
                _argument(arguments, X_SCALE) + 4 * first,
                _argument(arguments, STATIC),
                _argument(arguments, LIMIT),
            ),
        )


@numba.njit(nogil=True)
def _panel(arguments: int, panel: int, first: int, last: int, spare: int) -> None:
    """Rows first..last of one panel. A panel that is not whole goes through `spare`."""
    bias, y_row, codes_row = _argument(arguments, BIAS), _argument(arguments, Y_ROW), _argument(arguments, CODES_ROW)
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
                _argument(arguments, LANES),
                _argument(arguments, X_SCALE) + 4 * row,
                _argument(arguments, W_SCALE) + column,
                _argument(arguments, START) + column,
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
    def int8_quantize(arguments):  # type: ignore[no-untyped-def]
        _quantize_body(arguments)

    return Kernel(int8_quantize)


@functools.cache
def _linear_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def int8_linear(arguments):  # type: ignore[no-untyped-def]
        _linear_body(arguments)

    return Kernel(int8_linear)


def linear(x: Tensor, weight: PackedInt8, bias: Tensor | None, out: Tensor, *, static_scale: Tensor | None = None) -> Tensor:
    """out[M, N] of x float32 [M, K]; rows contiguous; bias float32 filled up to whole panels; static_scale float32 [1]."""
    m, k = x.shape
    depth = weight.data.shape[1] * weight.data.shape[3]
    if depth != k:
        x = torch.nn.functional.pad(x, (0, depth - k))
    size = code_bytes(weight.kind)
    codes = torch.empty(m, depth * size, dtype=torch.int8)
    scales = torch.empty(m)
    code = compiled(weight.kind)
    static = 0 if static_scale is None else static_scale.data_ptr()
    shared = (x.data_ptr(), x.stride(0) * 4, codes.data_ptr(), depth * size, scales.data_ptr(), static, m, depth, weight.limit)
    _quantize_kernel()(team_size() if m * depth > 1 << 16 else 1, *shared, code["quantize"])
    n, panels = weight.out_features, weight.data.shape[0]
    threads = team_size() if m * n * k > 1 << 16 else 1
    _linear_kernel()(
        threads,
        *shared,
        0,
        weight.data.data_ptr(),
        weight.data.stride(0),
        weight.data.shape[1],
        weight.scale.data_ptr(),
        weight.start.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0) * 4,
        n,
        max(1, panels // (threads * 4)),
        *(code[f"tile{rows}"] for rows in range(1, MAX_ROWS + 1)),
    )
    return out


def rows(weight: PackedInt8, indices: Tensor) -> Tensor:
    """W[indices] dequantized, float32 [R, K]. Raises IndexError for an index outside 0..N-1."""
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= weight.out_features):
        raise IndexError(f"rows {int(indices.min())} to {int(indices.max())} asked of a weight that has {weight.out_features}")
    panel, column = indices // COLUMNS, indices % COLUMNS
    codes = weight.data[panel, :, column].flatten(1)[:, : weight.in_features]
    return codes.float() * weight.scale[indices, None]
