"""Rounding rows of float32 to the fp8 (e4m3) grid of their scales, kept as floats. The contract: kernels/quantize_activations.py."""

from __future__ import annotations

import functools

import numba
import numpy as np
from torch import Tensor

from .address import bits_of, float_of, load_f32, load_i64
from .atomics import fetch_add
from .elementwise import float_bits
from .threads import KERNEL_SIGNATURE, Kernel, team_size
from .vector_math import load_f32_at, store_f32_at

_GREATEST = np.float32(448.0)
_LEAST_NORMAL = np.float32(2.0**-6)
_TO_STEPS = np.float32(1.5 * 2.0**14)  # added and taken away again, it leaves whole steps of 2 ** -9, the subnormals
_MAGNITUDE, _HALF, _KEPT, _ONE = np.uint32(0x7FFFFFFF), np.uint32(0x7FFFF), np.uint32(0xFFF00000), np.uint32(1)
_MANTISSA = np.uint32(20)  # bits of a float32's mantissa that e4m3 has not
_SERIAL_ELEMENTS = 1 << 14
_ROWS_PER_TASK = 4


@numba.njit(nogil=True, error_model="numpy")
def _greatest(x: int, count: int) -> float:
    """max|x|, NaN where there is one: as whole numbers, its bits are above all others."""
    most = np.uint32(0)
    for i in range(count):
        most = max(most, np.uint32(bits_of(load_f32_at(x, i)) & _MAGNITUDE))
    return float_of(most)


@numba.njit(nogil=True, error_model="numpy")
def _round_run(x: int, target: int, count: int, scale: float) -> None:
    for i in range(count):
        value = load_f32_at(x, i) / scale
        value = _GREATEST if value > _GREATEST else value
        value = -_GREATEST if value < -_GREATEST else value
        bits = bits_of(value)
        normal = float_of(np.uint32((bits + _HALF + ((bits >> _MANTISSA) & _ONE)) & _KEPT))
        subnormal = (value + _TO_STEPS) - _TO_STEPS
        rounded = normal if abs(value) >= _LEAST_NORMAL else subnormal  # NaN is not: its sum stays NaN
        store_f32_at(target, i, rounded * scale)


@numba.njit(nogil=True, error_model="numpy")
def _body(arguments: int) -> None:
    rows, count, size = load_i64(arguments + 16), load_i64(arguments + 24), load_i64(arguments + 32)
    x, x_row, out = load_i64(arguments + 40), load_i64(arguments + 48), load_i64(arguments + 56)
    static = load_f32(arguments + 64)
    while True:
        first = fetch_add(arguments, 1) * _ROWS_PER_TASK
        if first >= rows:
            break
        for row in range(first, min(first + _ROWS_PER_TASK, rows)):
            for start in range(0, count, size):
                steps = min(size, count - start)
                source = x + row * x_row + 4 * start
                scale = static
                if scale == np.float32(0.0):
                    scale = _greatest(source, steps) / _GREATEST
                    scale = np.float32(1.0) if scale == np.float32(0.0) else scale
                _round_run(source, out + 4 * (row * count + start), steps, scale)


@functools.cache
def _kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def round_fp8(arguments):
        _body(arguments)

    return Kernel(round_fp8)


def round_fp8(x: Tensor, group_size: int, static_scale: float, out: Tensor) -> None:
    """out = x [M, K] rounded in groups of `group_size` inputs, or with `static_scale` where it is not 0. Rows of x may be strided."""
    rows, count = x.shape
    threads = team_size() if rows * count >= _SERIAL_ELEMENTS and rows > _ROWS_PER_TASK else 1
    _kernel()(threads, rows, count, group_size, x.data_ptr(), x.stride(0) * 4, out.data_ptr(), float_bits(static_scale))
