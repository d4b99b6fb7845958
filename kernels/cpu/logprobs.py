"""Log-probabilities on the CPU, one task a row: of one token and of the k best, which alone are sorted. Checks no argument."""

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy as np
import torch

from .address import bits_of, load_i64, store_f32, store_i64
from .atomics import fetch_add
from .logit_cut import find_cut, kth_bound, make_scratch
from .logit_rows import BLOCK, INF_KEY, collect_above, f32_pointer, fill_sums, first_with, i64_pointer, jit, key_of, scan, threads_for
from .threads import KERNEL_SIGNATURE, Kernel

_one = np.float32(1.0)


@jit()
def _keep_largest(values: Any, ids: Any, n: int, k: int, scratch: Any) -> None:
    """Leave the k largest of n gathered logits in front, in id order; equal ones go by lowest id."""
    histogram, keys, places, weights = scratch
    for i in range(n):
        keys[i] = key_of(np.int32(bits_of(values[i])))
        places[i] = i
        weights[i] = _one
    last = find_cut(keys, places, weights, n, np.float64(k), histogram)
    bound = values[last]
    left = 0
    for i in range(n):
        if values[i] > bound or (values[i] == bound and i <= last):
            values[left] = values[i]
            ids[left] = ids[i]
            left += 1


@jit()
def _sort_falling(values: Any, ids: Any, n: int) -> None:
    """Shell sort by falling value, then rising id."""
    gap = 1
    while gap < n // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(gap, n):
            value = values[i]
            token = ids[i]
            j = i
            while j >= gap and (values[j - gap] < value or (values[j - gap] == value and ids[j - gap] > token)):
                values[j] = values[j - gap]
                ids[j] = ids[j - gap]
                j -= gap
            values[j] = value
            ids[j] = token
        gap //= 3


@jit()
def _logprobs_body(arguments: int) -> None:
    logits, row_bytes, rows, v = (load_i64(arguments + 16), load_i64(arguments + 24), load_i64(arguments + 32), load_i64(arguments + 40))
    tokens = numba.carray(i64_pointer(load_i64(arguments + 48)), rows)
    k = load_i64(arguments + 56)
    chosen_out = load_i64(arguments + 64)
    ids_out = load_i64(arguments + 72)
    tops_out = load_i64(arguments + 80)
    block_max = np.empty((v + BLOCK - 1) // BLOCK, np.int32)
    sums = np.empty(block_max.size, np.float32)
    room = v if k > 0 else 1
    values = np.empty(room, np.float32)
    ids = np.empty(room, np.int32)
    scratch = make_scratch(room)
    while True:
        row = fetch_add(arguments, 1)
        if row >= rows:
            break
        x = numba.carray(f32_pointer(logits + row * row_bytes), v)
        best = scan(x, block_max)
        if best == INF_KEY:
            store_f32(chosen_out + 4 * row, np.float32(np.nan))
            for j in range(k):
                store_i64(ids_out + 8 * (row * k + j), -1)
                store_f32(tops_out + 4 * (row * k + j), np.float32(np.nan))
            continue
        peak = x[first_with(x, block_max, best)]
        log_total = np.float64(peak) + math.log(fill_sums(x, peak, _one, sums))
        store_f32(chosen_out + 4 * row, np.float32(np.float64(x[tokens[row]]) - log_total))
        if k == 0:
            continue
        n = collect_above(x, block_max, kth_bound(block_max, k, scratch), values, ids)
        _keep_largest(values, ids, n, k, scratch)
        _sort_falling(values, ids, k)
        for j in range(k):
            store_i64(ids_out + 8 * (row * k + j), np.int64(ids[j]))
            store_f32(tops_out + 4 * (row * k + j), np.float32(np.float64(values[j]) - log_total))


@functools.cache
def _logprobs_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def logprobs(arguments):
        _logprobs_body(arguments)

    return Kernel(logprobs)


def top_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contract of `kernels.sampling.top_logprobs`."""
    rows, v = logits.shape
    chosen = torch.empty(rows, dtype=torch.float32)
    ids = torch.empty(rows, k, dtype=torch.int64)
    tops = torch.empty(rows, k, dtype=torch.float32)
    outputs = (chosen.data_ptr(), ids.data_ptr(), tops.data_ptr())
    if rows:
        _logprobs_kernel()(threads_for(logits), logits.data_ptr(), 4 * logits.stride(0), rows, v, token_ids.data_ptr(), k, *outputs)
    return chosen, ids, tops
