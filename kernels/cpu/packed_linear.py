"""x @ W.T on the CPU over weights packed once into column panels: 16-bit or float32 weights, float32 arithmetic.

Packed layout: W [N, K] becomes [ceil(N / COLUMNS), K, COLUMNS], the last panel padded with zeros, so that one step along K
reads one contiguous run. bfloat16 weights stay bfloat16 in memory and widen in registers: half the bytes of float32 where
memory bounds (few rows), and the full float32 rate where arithmetic does (many rows), also on CPUs without bfloat16 units.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch

from .address import load_f32, load_i64, store_f32
from .atomics import fetch_add
from .threads import KERNEL_SIGNATURE, Kernel, team_size
from .tile import COLUMNS, MAX_ROWS, BDtype, make_row_tiles, specialised

ROW_BLOCK = 16 * MAX_ROWS  # rows of x that stay in the second-level cache while panels pass
DEPTH_BLOCK = 2048
DTYPES: dict[torch.dtype, BDtype] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_columns = COLUMNS
_max_rows = MAX_ROWS
_row_block = ROW_BLOCK
_depth_block = DEPTH_BLOCK


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] (float32, bfloat16 or float16) to the packed [ceil(N / COLUMNS), K, COLUMNS] of the same dtype."""
    n, k = weight.shape
    panels = -(-n // COLUMNS)
    packed = torch.empty(panels, k, COLUMNS, dtype=weight.dtype)
    whole = n // COLUMNS
    packed[:whole] = weight[: whole * COLUMNS].view(whole, COLUMNS, k).transpose(1, 2)
    if whole < panels:
        packed[whole].zero_()
        packed[whole, :, : n - whole * COLUMNS] = weight[whole * COLUMNS :].t()
    return packed


def _make_body(dtype: BDtype) -> Any:
    tiles = make_row_tiles(vectors=2, dtype=dtype)
    size = 4 if dtype == "float32" else 2

    @numba.njit(nogil=True)
    @specialised(dtype)
    def panel_rows(
        x: int, x_row: int, panel: int, y: int, y_row: int, bias: int, start: int, stop: int, k: int, valid: int, scratch: int
    ) -> None:
        """Rows start..stop of one panel; `valid` < COLUMNS goes through scratch, so that nothing is written past a row."""
        for first in range(start, stop, _max_rows):
            rows = min(_max_rows, stop - first)
            target = y + first * y_row
            target_row = y_row
            if valid < _columns:
                target = scratch
                target_row = _columns * 4
            if bias != 0:
                for r in range(rows):
                    for c in range(valid):
                        store_f32(target + r * target_row + 4 * c, load_f32(bias + 4 * c))
            for depth in range(0, k, _depth_block):
                steps = min(_depth_block, k - depth)
                adds = 1 if depth > 0 or bias != 0 else 0
                tiles(
                    rows,
                    x + first * x_row + 4 * depth,
                    x_row,
                    panel + depth * _columns * size,
                    _columns * size,
                    target,
                    target_row,
                    steps,
                    adds,
                )
            if valid < _columns:
                for r in range(rows):
                    for c in range(valid):
                        store_f32(y + (first + r) * y_row + 4 * c, load_f32(scratch + r * target_row + 4 * c))

    @numba.njit(nogil=True)
    @specialised(dtype)
    def linear(arguments: int) -> None:
        x = load_i64(arguments + 16)
        x_row = load_i64(arguments + 24)
        w = load_i64(arguments + 32)
        y = load_i64(arguments + 40)
        y_row = load_i64(arguments + 48)
        m = load_i64(arguments + 56)
        n = load_i64(arguments + 64)
        k = load_i64(arguments + 72)
        bias = load_i64(arguments + 80)
        per_task = load_i64(arguments + 88)
        panels = (n + _columns - 1) // _columns
        spare = np.empty(_max_rows * _columns, np.float32)
        scratch = spare.ctypes.data
        while True:
            task = fetch_add(arguments, 1)
            first_panel = task * per_task
            if first_panel >= panels:
                break
            last_panel = min(first_panel + per_task, panels)
            for start in range(0, m, _row_block):
                stop = min(start + _row_block, m)
                for p in range(first_panel, last_panel):
                    valid = min(_columns, n - p * _columns)
                    panel_bias = bias + p * _columns * 4 if bias != 0 else 0
                    panel_rows(
                        x, x_row, w + p * k * _columns * size, y + p * _columns * 4, y_row, panel_bias, start, stop, k, valid, scratch
                    )

    return linear


_f32_body = _make_body("float32")
_bf16_body = _make_body("bfloat16")
_f16_body = _make_body("float16")


@functools.cache
def _kernel(dtype: torch.dtype) -> Kernel:
    if dtype == torch.bfloat16:

        @numba.cfunc(KERNEL_SIGNATURE, cache=True)
        def linear_bf16(arguments):
            _bf16_body(arguments)

        return Kernel(linear_bf16)
    if dtype == torch.float16:

        @numba.cfunc(KERNEL_SIGNATURE, cache=True)
        def linear_f16(arguments):
            _f16_body(arguments)

        return Kernel(linear_f16)

    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def linear_f32(arguments):
        _f32_body(arguments)

    return Kernel(linear_f32)


def linear(x: torch.Tensor, packed: torch.Tensor, n: int, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """out[M, N] = x[M, K] @ W.T + bias; x, bias, out float32 with contiguous rows, `packed` from `pack`, n = N."""
    m, k = x.shape
    panels = packed.shape[0]
    threads = team_size() if m * n * k > 1 << 16 else 1
    per_task = max(1, panels // (threads * 4)) if m <= ROW_BLOCK else max(1, min(8, panels // (threads * 4)))
    _kernel(packed.dtype)(
        threads,
        x.data_ptr(),
        x.stride(0) * 4,
        packed.data_ptr(),
        out.data_ptr(),
        out.stride(0) * 4,
        m,
        n,
        k,
        0 if bias is None else bias.data_ptr(),
        per_task,
    )
    return out
