"""Normalization and activation by rows on the CPU, float32. Knows rows and strides; the contracts stand in kernels/<op>.py.

Small calls run on the calling thread: starting a team costs some microseconds.
"""

from __future__ import annotations

import functools
import math
import struct

import numba
import numpy as np
from torch import Tensor

from .address import load_f32, load_i64
from .atomics import fetch_add
from .threads import KERNEL_SIGNATURE, Kernel, team_size
from .vector_math import exp2, load_f32_at, store_f32_at

_LOG2E = np.float32(1.4426950408889634)
_HIGHEST = np.float32(127.0)
_SAFE_MATH = {"reassoc", "contract", "nsz", "arcp"}
_SERIAL_ELEMENTS = 1 << 15
_ROWS_PER_TASK = 8


@numba.njit(nogil=True, error_model="numpy", fastmath=_SAFE_MATH)
def sum_of_squares(x: int, count: int) -> float:
    """Of `count` floats at address x."""
    total = np.float32(0.0)
    for i in range(count):
        value = load_f32_at(x, i)
        total += value * value
    return total


@numba.njit(nogil=True, error_model="numpy", fastmath=_SAFE_MATH)
def normalize_row(x: int, weight: int, eps: float, target: int, count: int) -> None:
    """target[i] = x[i] / sqrt(mean(x ** 2) + eps) * weight[i]; target may be x."""
    factor = np.float32(1.0) / np.float32(math.sqrt(sum_of_squares(x, count) / np.float32(count) + eps))
    for i in range(count):
        store_f32_at(target, i, load_f32_at(x, i) * factor * load_f32_at(weight, i))


@numba.njit(nogil=True, error_model="numpy")
def _add_row(x: int, residual: int, count: int) -> None:
    for i in range(count):
        store_f32_at(residual, i, load_f32_at(residual, i) + load_f32_at(x, i))


@numba.njit(nogil=True, error_model="numpy")
def _silu_mul_row(x: int, target: int, count: int) -> None:
    for i in range(count):
        gate = load_f32_at(x, i)
        power = -gate * _LOG2E
        power = min(power, _HIGHEST)
        store_f32_at(target, i, gate / (np.float32(1.0) + exp2(power)) * load_f32_at(x + 4 * count, i))


@functools.cache
def _norm_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def rms_norm(arguments):
        rows, count = load_i64(arguments + 16), load_i64(arguments + 24)
        x, x_row = load_i64(arguments + 32), load_i64(arguments + 40)
        residual, residual_row = load_i64(arguments + 48), load_i64(arguments + 56)
        out, out_row = load_i64(arguments + 64), load_i64(arguments + 72)
        weight, eps = load_i64(arguments + 80), load_f32(arguments + 88)
        while True:
            first = fetch_add(arguments, 1) * _ROWS_PER_TASK
            if first >= rows:
                break
            for row in range(first, min(first + _ROWS_PER_TASK, rows)):
                source = x + row * x_row
                if residual != 0:
                    source = residual + row * residual_row
                    _add_row(x + row * x_row, source, count)
                normalize_row(source, weight, eps, out + row * out_row, count)

    return Kernel(rms_norm)


@functools.cache
def _silu_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def silu_mul(arguments):
        rows, count = load_i64(arguments + 16), load_i64(arguments + 24)
        x, x_row, out, out_row = load_i64(arguments + 32), load_i64(arguments + 40), load_i64(arguments + 48), load_i64(arguments + 56)
        while True:
            first = fetch_add(arguments, 1) * _ROWS_PER_TASK
            if first >= rows:
                break
            for row in range(first, min(first + _ROWS_PER_TASK, rows)):
                _silu_mul_row(x + row * x_row, out + row * out_row, count)

    return Kernel(silu_mul)


@functools.lru_cache(maxsize=256)
def float_bits(value: float) -> int:
    """The 32 bits of a float32, to pass it among int64 arguments."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _threads(elements: int, rows: int) -> int:
    return team_size() if elements >= _SERIAL_ELEMENTS and rows > _ROWS_PER_TASK else 1


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """out = rms_norm(x), or of residual += x where a residual is given. [T, H] each, weight [H]."""
    rows, count = x.shape
    _norm_kernel()(
        _threads(rows * count, rows),
        rows,
        count,
        x.data_ptr(),
        x.stride()[0] * 4,
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride()[0] * 4,
        out.data_ptr(),
        out.stride()[0] * 4,
        weight.data_ptr(),
        float_bits(eps),
    )


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """out [T, I] = silu(gate_up[:, :I]) * gate_up[:, I:]"""
    rows, count = out.shape
    threads = _threads(rows * count, rows)
    _silu_kernel()(threads, rows, count, gate_up.data_ptr(), gate_up.stride()[0] * 4, out.data_ptr(), out.stride()[0] * 4)
