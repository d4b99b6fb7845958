"""Penalties for repeated tokens on the CPU, in place, one task a penalised row. Knows no request and checks no argument."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch

from .address import load_i64
from .atomics import fetch_add
from .logit_rows import MIN_PARALLEL, f32_pointer, i32_pointer, i64_pointer, jit
from .threads import KERNEL_SIGNATURE, Kernel, team_size

_zero = np.float32(0.0)


@jit()
def _penalties_body(arguments: int) -> None:
    logits, row_bytes, v, rows = (load_i64(arguments + 16), load_i64(arguments + 24), load_i64(arguments + 32), load_i64(arguments + 40))
    table = numba.carray(i64_pointer(load_i64(arguments + 48)), 4 * rows)
    factors = numba.carray(f32_pointer(load_i64(arguments + 56)), 3 * rows)
    while True:
        r = fetch_add(arguments, 1)
        if r >= rows:
            break
        x = numba.carray(f32_pointer(logits + table[4 * r] * row_bytes), v)
        n = table[4 * r + 3]
        ids = numba.carray(i32_pointer(table[4 * r + 1]), n)
        counts = numba.carray(i32_pointer(table[4 * r + 2]), n)
        repetition, frequency, presence = factors[3 * r], factors[3 * r + 1], factors[3 * r + 2]
        for i in range(n):
            token = ids[i]
            if token < 0 or token >= v:
                continue
            value = x[token]
            value = value / repetition if value > _zero else value * repetition
            if counts[i] > 0:
                value = value - frequency * np.float32(counts[i]) - presence
            x[token] = value


@functools.cache
def _penalties_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def penalties(arguments):
        _penalties_body(arguments)

    return Kernel(penalties)


def apply_penalties(
    logits: torch.Tensor, table: np.ndarray[Any, np.dtype[np.int64]], factors: np.ndarray[Any, np.dtype[np.float32]]
) -> None:
    """Contract of `kernels.sampling.apply_penalties`.

    table int64 [R, 4]: row, address of the token ids (int32), address of the generated counts (int32), how many there are.
    factors float32 [R, 3]: repetition, frequency, presence.
    """
    rows = table.shape[0]
    threads = team_size() if int(table[:, 3].sum()) >= MIN_PARALLEL else 1
    if rows:
        addresses = (table.ctypes.data, factors.ctypes.data)
        _penalties_kernel()(threads, logits.data_ptr(), 4 * logits.stride(0), logits.shape[1], rows, *addresses)
