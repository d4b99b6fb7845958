"""x @ W.T on the CPU in whole numbers: the contract of kernels/int8_linear.py over weights packed once into column panels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import numba
import torch
from torch import Tensor

from ..int8_linear import wide_limit
from .address import argument
from .atomics import fetch_add
from .int8_code import MAX_DEPTH, QUANTIZE_ARGUMENTS, TILE_ARGUMENTS, Way, code_bytes, compiled, products_per_lane, way
from .jit import make_caller
from .panel_rows import OWN, M, check, make_body
from .threads import KERNEL_SIGNATURE, Kernel, team_size
from .tile import COLUMNS, MAX_ROWS

_QUANTIZE_ROWS: Final = 8  # rows that a task quantizes

_columns = COLUMNS
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

# Arguments after panel_rows' own, as int64 at 8 * index. TILES: the addresses of tile1..6.
X, X_ROW, CODES, CODES_ROW, X_SCALE, STATIC, K, LIMIT, QUANTIZE = range(OWN, OWN + 9)
DATA, PANEL_BYTES, LANES, W_SCALE, START, BIAS, TILES = range(OWN + 9, OWN + 16)


@numba.njit(nogil=True)
def _quantize_body(arguments: int) -> None:
    m, x_row, codes_row = argument(arguments, M), argument(arguments, X_ROW), argument(arguments, CODES_ROW)
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
                argument(arguments, K),
                argument(arguments, CODES) + first * codes_row,
                codes_row,
                argument(arguments, X_SCALE) + 4 * first,
                argument(arguments, STATIC),
                argument(arguments, LIMIT),
            ),
        )


@numba.njit(nogil=True)
def _multiply(arguments: int, panel: int, row: int, rows: int, target: int, target_row: int) -> None:
    """Rows row..row+rows of one panel."""
    codes_row, bias, column = argument(arguments, CODES_ROW), argument(arguments, BIAS), panel * _columns * 4
    _call_tile(
        argument(arguments, TILES + rows - 1),
        (
            argument(arguments, CODES) + row * codes_row,
            codes_row,
            argument(arguments, DATA) + panel * argument(arguments, PANEL_BYTES),
            target,
            target_row,
            argument(arguments, LANES),
            argument(arguments, X_SCALE) + 4 * row,
            argument(arguments, W_SCALE) + column,
            argument(arguments, START) + column,
            bias + column if bias != 0 else 0,
        ),
    )


# Made here and not inside _linear_kernel: Numba's cache does not recognise functions made anew.
_linear_body = make_body(_multiply, "int8")


@functools.cache
def _quantize_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def int8_quantize(arguments):
        _quantize_body(arguments)

    return Kernel(int8_quantize)


@functools.cache
def _linear_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def int8_linear(arguments):
        _linear_body(arguments)

    return Kernel(int8_linear)


def linear(x: Tensor, weight: PackedInt8, bias: Tensor | None, out: Tensor, *, static_scale: Tensor | None = None) -> Tensor:
    """out[M, N] of x float32 [M, K]; rows contiguous; bias float32 filled up to whole panels; static_scale float32 [1].

    Raises ValueError for shapes that do not fit the weight.
    """
    check(x, out, in_features=weight.in_features, out_features=weight.out_features)
    m, k = x.shape
    depth = weight.data.shape[1] * weight.data.shape[3]
    if depth != k:
        x = torch.nn.functional.pad(x, (0, depth - k))
    size, n, panels = code_bytes(weight.kind), weight.out_features, weight.data.shape[0]
    codes, scales = torch.empty(m, depth * size, dtype=torch.int8), torch.empty(m)
    code = compiled(weight.kind)
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
        depth * size,
        scales.data_ptr(),
        0 if static_scale is None else static_scale.data_ptr(),
        depth,
        weight.limit,
        code["quantize"],
        weight.data.data_ptr(),
        weight.data.stride(0),
        weight.data.shape[1],
        weight.scale.data_ptr(),
        weight.start.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        *(code[f"tile{rows}"] for rows in range(1, MAX_ROWS + 1)),
    )
    _quantize_kernel()(team_size() if m * depth > 1 << 16 else 1, *arguments)
    _linear_kernel()(threads, *arguments)
    return out


def rows(weight: PackedInt8, indices: Tensor) -> Tensor:
    """W[indices] dequantized, float32 [R, K]. Raises IndexError for an index outside 0..N-1."""
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= weight.out_features):
        raise IndexError(f"rows {int(indices.min())} to {int(indices.max())} asked of a weight that has {weight.out_features}")
    panel, column = indices // COLUMNS, indices % COLUMNS
    codes = weight.data[panel, :, column].flatten(1)[:, : weight.in_features]
    return codes.float() * weight.scale[indices, None]
