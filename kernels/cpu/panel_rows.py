"""Walking rows of an output over column panels: what every linear kernel over panels shares. Knows no weights.

A panel is COLUMNS output features wide; the last one may have fewer, and then goes through a spare buffer, so that nothing is written
past a row.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
from torch import Tensor

from .address import argument, load_f32, store_f32
from .atomics import fetch_add
from .tile import COLUMNS, MAX_ROWS, specialised

ROW_BLOCK: Final = 16 * MAX_ROWS  # rows of inputs that stay in the second-level cache while panels pass

# The arguments that `make_body` reads, as int64 at 8 * index; a kernel's own begin at OWN.
Y, Y_ROW, M, N, PER_TASK, OWN = range(2, 8)

_columns = COLUMNS
_max_rows = MAX_ROWS
_row_block = ROW_BLOCK


def check(x: Tensor, out: Tensor, *, in_features: int, out_features: int) -> None:
    """Raises ValueError unless x [M, in_features] and out [M, out_features] have what kernels read by address: contiguous rows."""
    if x.shape[1] != in_features or out.shape != (x.shape[0], out_features):
        raise ValueError(f"x is {tuple(x.shape)} and out {tuple(out.shape)} for a weight of {out_features} x {in_features}")
    if (x.stride(1) != 1 and in_features > 1) or (out.stride(1) != 1 and out_features > 1):
        raise ValueError(f"rows must be contiguous; strides are {x.stride()} and {out.stride()}")


@numba.njit(nogil=True)
def copy_rows(source: int, source_row: int, target: int, target_row: int, rows: int, columns: int) -> None:
    """Copy float32 [rows, columns]; source_row and target_row are bytes from row to row."""
    for r in range(rows):
        for c in range(columns):
            store_f32(target + r * target_row + 4 * c, load_f32(source + r * source_row + 4 * c))


def make_body(multiply: Any, name: str) -> Any:
    """A Numba function body(arguments) that takes tasks of PER_TASK panels until none is left.

    `multiply(arguments, panel, row, rows, target, target_row)` writes rows row..row+rows (at most MAX_ROWS) of one whole panel.
    """

    @numba.njit(nogil=True)
    @specialised(name)
    def body(arguments: int) -> None:
        m, n, per_task = argument(arguments, M), argument(arguments, N), argument(arguments, PER_TASK)
        y, y_row = argument(arguments, Y), argument(arguments, Y_ROW)
        panels = (n + _columns - 1) // _columns
        spare_floats = np.empty(_max_rows * _columns, np.float32)
        spare = spare_floats.ctypes.data
        while True:
            first_panel = fetch_add(arguments, 1) * per_task
            if first_panel >= panels:
                break
            for start in range(0, m, _row_block):
                for panel in range(first_panel, min(first_panel + per_task, panels)):
                    valid = min(_columns, n - panel * _columns)
                    for row in range(start, min(m, start + _row_block), _max_rows):
                        rows = min(_max_rows, min(m, start + _row_block) - row)
                        place = y + row * y_row + panel * _columns * 4
                        if valid == _columns:
                            multiply(arguments, panel, row, rows, place, y_row)
                        else:
                            multiply(arguments, panel, row, rows, spare, 4 * _columns)
                            copy_rows(spare, 4 * _columns, place, y_row, rows, valid)

    return body
