"""Rotate queries and keys and put keys and values into their pages, on the CPU. The contract stands in kernels/rope.py."""

from __future__ import annotations

import functools
import threading

import numba
import numpy as np
import torch
from torch import Tensor

from .address import bits_of, float_of, load_f32, load_i64, store_f32, store_i64
from .atomics import fetch_add
from .elementwise import float_bits, normalize_row
from .threads import KERNEL_SIGNATURE, Kernel, team_size
from .vector_math import load_f32_at, store_bf16_at, store_e4m3_at, store_e5m2_at, store_f16_at, store_f32_at, store_int8_at

_SAFE_MATH = {"contract", "nsz"}
_SERIAL_ELEMENTS = 1 << 14
_ROWS_PER_TASK = 4
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4, torch.float8_e5m2: 5}
_QUANTIZED = 3  # the first code whose rows are quantized
_GREATEST = (np.float32(127.0), np.float32(448.0), np.float32(57344.0))
_SMALLEST_SCALE = np.float32(2.0**-126)
_ONE, _NAN = np.float32(1.0), np.float32(np.nan)

# Arguments, as int64 at 8 * index.
_ROWS, _HEADS, _KV_HEADS, _DIM, _HALF, _QKV, _QKV_ROW, _POSITIONS, _SLOTS, _TABLE = range(2, 12)
_K, _V, _PAGE_STRIDE, _HEAD_STRIDE, _KEY_STRIDE, _PAGE_SIZE, _CODE = range(12, 19)
_Q_NORM, _K_NORM, _EPS, _NUM_POSITIONS, _NUM_SLOTS, _FAULT, _K_SCALES, _V_SCALES = range(19, 27)


@numba.njit(nogil=True, error_model="numpy", fastmath=_SAFE_MATH)
def _rotate(head: int, table: int, half: int) -> None:
    """Turn the pairs (i, half + i) of one head by the angles whose cosines, then sines, stand at `table`."""
    for i in range(half):
        first, second = load_f32_at(head, i), load_f32_at(head + 4 * half, i)
        cos, sin = load_f32_at(table, i), load_f32_at(table + 4 * half, i)
        store_f32_at(head, i, first * cos - second * sin)
        store_f32_at(head + 4 * half, i, second * cos + first * sin)


@numba.njit(nogil=True, error_model="numpy")
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


@numba.njit(nogil=True, error_model="numpy")
def _dynamic_scale(source: int, count: int, code: int) -> float:
    """Maps the greatest magnitude of `count` floats to the code's greatest number; NaN is passed over, zeros have scale 1."""
    greatest = np.int32(0)
    for i in range(count):
        bits = np.int32(bits_of(load_f32_at(source, i)) & np.uint32(0x7FFFFFFF))  # magnitudes order as their bits do
        if bits > np.int32(0x7F800000):
            bits = np.int32(0)
        greatest = max(greatest, bits)
    if greatest == 0:
        return _ONE
    scale = float_of(np.uint32(greatest)) / _GREATEST[code - _QUANTIZED]
    return max(scale, _SMALLEST_SCALE)


@numba.njit(nogil=True, error_model="numpy")
def _quantize(source: int, target: int, count: int, code: int, scale: float) -> None:
    """One row of a quantized page: codes of source / scale, then the scale, or NaN where a number was none."""
    lost = np.int32(0)
    for i in range(count):
        wanted = load_f32_at(source, i) / scale
        lost |= np.int32(wanted != wanted)  # noqa: PLR0124
    if code == 3:
        for i in range(count):
            store_int8_at(target, i, load_f32_at(source, i) / scale)
    elif code == 4:
        for i in range(count):
            store_e4m3_at(target, i, load_f32_at(source, i) / scale)
    else:
        for i in range(count):
            store_e5m2_at(target, i, load_f32_at(source, i) / scale)
    store_f32(target + count, _NAN if lost != 0 else scale)


@numba.njit(nogil=True, error_model="numpy")
def _store(source: int, target: int, count: int, code: int, static_scale: int) -> None:
    """One head's key or value into its row; `static_scale` is a scale's address, or 0."""
    if code < _QUANTIZED:
        _copy(source, target, count, code)
    elif static_scale != 0:
        _quantize(source, target, count, code, load_f32(static_scale))
    else:
        _quantize(source, target, count, code, _dynamic_scale(source, count, code))


@numba.njit(nogil=True, error_model="numpy")
def _scale_of(arguments: int, which: int, head: int) -> int:
    """The address of a head's static scale, or 0."""
    scales = load_i64(arguments + 8 * which)
    return scales + 4 * head if scales != 0 else 0


@numba.njit(nogil=True, error_model="numpy")
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
        key, value = qkv + (heads + h) * dim * 4, qkv + (heads + kv_heads + h) * dim * 4
        _store(key, load_i64(arguments + 8 * _K) + target, dim, code, _scale_of(arguments, _K_SCALES, h))
        _store(value, load_i64(arguments + 8 * _V) + target, dim, code, _scale_of(arguments, _V_SCALES, h))


@functools.cache
def _kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def rope_and_store(arguments):
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
    head_dim: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
    kv_dtype: torch.dtype,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    """Checked arguments. Raises IndexError for a position or slot outside its table, with that row left as it was."""
    pages, kv_heads, page_size, _ = k_pages.shape
    page_stride, head_stride, key_stride, _ = k_pages.stride()
    size = k_pages.element_size()
    rows, width = qkv.shape
    fault = _fault
    _kernel()(
        team_size() if rows > _ROWS_PER_TASK and rows * width >= _SERIAL_ELEMENTS else 1,
        rows,
        num_heads,
        kv_heads,
        head_dim,
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
        _CODES[kv_dtype],
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        float_bits(norm_eps),
        cos_sin.shape[0],
        pages * page_size,
        fault.address,
        0 if k_scales is None else k_scales.data_ptr(),
        0 if v_scales is None else v_scales.data_ptr(),
    )
    row = int(fault.row[0])
    if row:
        fault.row[0] = 0
        raise IndexError(
            f"row {row - 1}: position {int(positions[row - 1])} of {cos_sin.shape[0]} or slot {int(slots[row - 1])} of {pages * page_size}"
        )
