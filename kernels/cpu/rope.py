"""Rotate queries and keys and put keys and values into their pages, on the CPU. The contract stands in kernels/rope.py."""

from __future__ import annotations

import functools
import threading

import numba
import numpy as np
import torch
from torch import Tensor

from .address import load_f32, load_i64, store_i64
from .atomics import fetch_add
from .elementwise import float_bits, normalize_row
from .threads import KERNEL_SIGNATURE, Kernel, team_size
from .vector_math import load_f32_at, store_bf16_at, store_f16_at, store_f32_at

_SAFE_MATH = {"contract", "nsz"}
_SERIAL_ELEMENTS = 1 << 14
_ROWS_PER_TASK = 4
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Arguments, as int64 at 8 * index.
_ROWS, _HEADS, _KV_HEADS, _DIM, _HALF, _QKV, _QKV_ROW, _POSITIONS, _SLOTS, _TABLE = range(2, 12)
_K, _V, _PAGE_STRIDE, _HEAD_STRIDE, _KEY_STRIDE, _PAGE_SIZE, _CODE = range(12, 19)
_Q_NORM, _K_NORM, _EPS, _NUM_POSITIONS, _NUM_SLOTS, _FAULT = range(19, 25)


@numba.njit(nogil=True, error_model="numpy", fastmath=_SAFE_MATH)  # type: ignore[untyped-decorator]
def _rotate(head: int, table: int, half: int) -> None:
    """Turn the pairs (i, half + i) of one head by the angles whose cosines, then sines, stand at `table`."""
    for i in range(half):
        first, second = load_f32_at(head, i), load_f32_at(head + 4 * half, i)
        cos, sin = load_f32_at(table, i), load_f32_at(table + 4 * half, i)
        store_f32_at(head, i, first * cos - second * sin)
        store_f32_at(head + 4 * half, i, second * cos + first * sin)


@numba.njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _copy(source: int, target: int, count: int, code: int) -> None:
    if code == 1:
        for i in range(count):
            store_bf16_at(target, i, load_f32_at(source, i))
    elif code == 2:
        for i in range(count):
            store_f16_at(target, i, load_f32_at(source, i))
    else:
        for i in range(count):
            store_f32_at(target, i, load_f32_at(source, i))


@numba.njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _row(arguments: int, row: int) -> None:
    heads, kv_heads, dim = load_i64(arguments + 8 * _HEADS), load_i64(arguments + 8 * _KV_HEADS), load_i64(arguments + 8 * _DIM)
    half, code, eps = load_i64(arguments + 8 * _HALF), load_i64(arguments + 8 * _CODE), load_f32(arguments + 8 * _EPS)
    position = load_i64(load_i64(arguments + 8 * _POSITIONS) + 8 * row)
    slot = load_i64(load_i64(arguments + 8 * _SLOTS) + 8 * row)
    if position < 0 or position >= load_i64(arguments + 8 * _NUM_POSITIONS) or slot < -1 or slot >= load_i64(arguments + 8 * _NUM_SLOTS):
        store_i64(load_i64(arguments + 8 * _FAULT), row + 1)
        return
    qkv = load_i64(arguments + 8 * _QKV) + row * load_i64(arguments + 8 * _QKV_ROW)
    table = load_i64(arguments + 8 * _TABLE) + position * 8 * half
    for h in range(heads + kv_heads):
        head = qkv + h * dim * 4
        norm = load_i64(arguments + 8 * _Q_NORM) if h < heads else load_i64(arguments + 8 * _K_NORM)
        if norm != 0:
            normalize_row(head, norm, eps, head, dim)
        _rotate(head, table, half)
    if slot < 0:
        return
    page_size = load_i64(arguments + 8 * _PAGE_SIZE)
    page = slot // page_size
    place = page * load_i64(arguments + 8 * _PAGE_STRIDE) + (slot - page * page_size) * load_i64(arguments + 8 * _KEY_STRIDE)
    for h in range(kv_heads):
        target = place + h * load_i64(arguments + 8 * _HEAD_STRIDE)
        _copy(qkv + (heads + h) * dim * 4, load_i64(arguments + 8 * _K) + target, dim, code)
        _copy(qkv + (heads + kv_heads + h) * dim * 4, load_i64(arguments + 8 * _V) + target, dim, code)


@functools.cache
def _kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)  # type: ignore[untyped-decorator]
    def rope_and_store(arguments):  # type: ignore[no-untyped-def]
        rows = load_i64(arguments + 8 * _ROWS)
        while True:
            first = fetch_add(arguments, 1) * _ROWS_PER_TASK
            if first >= rows:
                break
            for row in range(first, min(first + _ROWS_PER_TASK, rows)):
                _row(arguments, row)

    return Kernel(rope_and_store)


class _Fault(threading.local):
    """Where the kernel leaves 1 + a row whose position or slot lies outside."""

    def __init__(self) -> None:
        self.row = np.zeros(1, np.int64)
        self.address = self.row.ctypes.data


_fault = _Fault()


def rope_and_store(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    num_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
) -> None:
    """Checked arguments. Raises IndexError for a position or slot outside its table, with that row left as it was."""
    pages, kv_heads, page_size, dim = k_pages.shape
    page_stride, head_stride, key_stride, _ = k_pages.stride()
    size = k_pages.element_size()
    rows, width = qkv.shape
    fault = _fault
    _kernel()(
        team_size() if rows > _ROWS_PER_TASK and rows * width >= _SERIAL_ELEMENTS else 1,
        rows,
        num_heads,
        kv_heads,
        dim,
        cos_sin.shape[2],
        qkv.data_ptr(),
        qkv.stride()[0] * 4,
        positions.data_ptr(),
        slots.data_ptr(),
        cos_sin.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        page_stride * size,
        head_stride * size,
        key_stride * size,
        page_size,
        _CODES[k_pages.dtype],
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        float_bits(norm_eps),
        cos_sin.shape[0],
        pages * page_size,
        fault.address,
    )
    row = int(fault.row[0])
    if row:
        fault.row[0] = 0
        raise IndexError(
            f"row {row - 1}: position {int(positions[row - 1])} of {cos_sin.shape[0]} or slot {int(slots[row - 1])} of {pages * page_size}"
        )
