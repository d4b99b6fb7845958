"""Drawing tokens on the CPU, one task a row and nothing sorted. Knows no request and checks no argument."""

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy as np
import torch

from .address import bits_of, float_of, load_i64
from .atomics import fetch_add
from .logit_cut import find_cut, kth_bound, make_scratch
from .logit_rows import (
    BLOCK,
    INF_KEY,
    LOWEST_EXPONENT,
    MAGNITUDE,
    collect_above,
    f32_pointer,
    f64_pointer,
    fill_sums,
    first_with,
    i32_pointer,
    i64_pointer,
    jit,
    key_of,
    scan,
    threads_for,
    weight_of,
)
from .threads import KERNEL_SIGNATURE, Kernel

_FEW = 1024  # tokens among which a cut is found exactly rather than by another pass over the row
_STRIP = 16  # logits looked over at once for one of these few
_MAX_PASSES = 20

_lowest = np.float32(LOWEST_EXPONENT)
_sign = np.uint32(0x80000000)
_lowest_float = np.float32(-3.4e38)
_half = np.float32(0.5)
_zero = np.float32(0.0)
_one = np.float32(1.0)
_tiny = np.float32(1.2e-38)  # below every weight but 0: exp(-87) is 1.6e-38


@jit()
def _draw_plain(x: Any, peak: Any, temperature: Any, uniform: float, sums: Any) -> int:
    """Inverse CDF over the whole row: block sums first, then the one block in which the target falls."""
    target = uniform * fill_sums(x, peak, temperature, sums)
    before = 0.0
    chosen = -1
    for block in range(sums.size):
        if before + np.float64(sums[block]) > target:
            for i in range(block * BLOCK, min(x.size, (block + 1) * BLOCK)):
                weight = np.float64(weight_of(x[i], peak, temperature))
                before += weight
                if weight > 0.0:
                    chosen = i  # stays the answer if rounding keeps the running sum at or under the target
                    if before > target:
                        break
            break
        before += np.float64(sums[block])
    return chosen


@jit("reassoc")
def _fill_weights(x: Any, n: int, peak: Any, temperature: Any, floor: Any, weights: Any) -> float:
    """The weights of n logits, those below `floor` as 0; gives their sum."""
    total = 0.0
    for i in range(n):
        weight = weight_of(x[i], peak, temperature)
        weight = weight if weight >= floor else _zero
        weights[i] = weight
        total += np.float64(weight)
    return total


@jit()
def _count_reaching(x: Any, bound: Any) -> Any:
    count = np.int32(0)
    for i in range(x.size):
        count = np.int32(count + np.int32(x[i] >= bound))
    return count


@jit()
def _bound_for_count(x: Any, k: int, peak: Any, temperature: Any) -> Any:
    """A key that holds at least k logits above it and few more, or all that weigh anything."""
    depth = np.float64(_lowest) * np.float64(temperature)
    low = np.float32(np.float64(peak) + depth - 1e-6 * (abs(np.float64(peak)) - depth))
    low = max(low, _lowest_float)
    high = peak
    for _ in range(_MAX_PASSES):
        middle = np.float32(_half * low + _half * high)
        count = _count_reaching(x, middle)
        if count < k:
            high = middle
        else:
            low = middle
            if count <= k + k // 2 + _FEW:
                break
    return key_of(np.int32(bits_of(low)))


@jit("reassoc")
def _mass_from(values: Any, weights: Any, n: int, bound: Any) -> float:
    total = 0.0
    for i in range(n):
        total += np.float64(weights[i] if values[i] >= bound else _zero)
    return total


@jit()
def _any_between(values: Any, start: int, stop: int, low: Any, high: Any) -> Any:
    found = np.int32(0)
    for i in range(start, stop):
        found = np.int32(found | (np.int32(values[i] >= low) & np.int32(values[i] < high)))
    return found != 0


@jit()
def _count_from(values: Any, weights: Any, n: int, bound: Any) -> Any:
    """How many logits reach `bound` and weigh anything."""
    count = np.int32(0)
    for i in range(n):
        count = np.int32(count + (np.int32(weights[i] > _zero) & np.int32(values[i] >= bound)))
    return count


@jit()
def _least(values: Any, weights: Any, n: int) -> Any:
    """The smallest logit that weighs anything."""
    least = MAGNITUDE
    for i in range(n):
        key = key_of(np.int32(bits_of(values[i])))
        key = key if weights[i] > _zero else MAGNITUDE
        least = key if key < least else least
    bits = np.uint32(least) if least >= 0 else np.uint32(np.uint32(-least) | _sign)
    return float_of(bits)


@jit()
def _last_kept(values: Any, weights: Any, n: int, low: Any, peak: Any, by_mass: bool, target: float, scratch: Any) -> Any:
    """The place, by falling logit and then rising place, where the running sum of weights (or, not by_mass, of ones) reaches `target`.

    Bisection by logit, between `low` (known to be enough) and the peak, until few are left, then an exact cut among these.
    """
    histogram, keys, ids, near_weights = scratch
    high = np.float32(np.inf)
    count_low = _count_from(values, weights, n, low)
    count_high = np.int32(0)
    before = 0.0  # what reaches `high`, always short of the target
    for _ in range(_MAX_PASSES):
        middle = np.float32(_half * low + _half * min(high, peak))
        if count_low - count_high <= _FEW or middle <= low:
            break
        count = _count_from(values, weights, n, middle)
        reached = _mass_from(values, weights, n, middle) if by_mass else np.float64(count)
        if reached >= target:
            low = middle
            count_low = count
        else:
            high = middle
            count_high = count
            before = reached
    found: Any = 0
    for start in range(0, n, _STRIP):
        stop = min(n, start + _STRIP)
        if stop < n and not _any_between(values, start, start + _STRIP, low, high):
            continue
        for i in range(start, stop):
            ids[found] = i
            found += np.int64(values[i] >= low) & np.int64(values[i] < high) & np.int64(weights[i] > _zero)
    for j in range(found):
        keys[j] = key_of(np.int32(bits_of(values[ids[j]])))
        near_weights[j] = weights[ids[j]] if by_mass else _one
    return find_cut(keys, ids, near_weights, found, target - before, histogram)


@jit()
def _enough_for_mass(n: int, peak: Any, temperature: Any, top_p: Any, total: float) -> Any:
    """A logit that all of top-p's tokens reach: n tokens that each weigh less than (1 - top_p) * total / n are not needed."""
    negligible = 0.999 * (1.0 - np.float64(top_p)) * total / n
    depth = np.float64(temperature) * math.log(negligible)
    return np.float32(np.float64(peak) + depth - 1e-6 * (abs(np.float64(peak)) + abs(depth)))


@jit("reassoc")
def _drop_after(values: Any, weights: Any, n: int, last: int) -> float:
    """Set to 0 the weights that come after place `last`; gives the sum of the rest."""
    bound = values[last]
    total = 0.0
    for i in range(n):
        weight = weights[i] if values[i] > bound or (values[i] == bound and i <= last) else _zero
        weights[i] = weight
        total += np.float64(weight)
    return total


@jit()
def _draw_filtered(
    x: Any, block_max: Any, peak: Any, temperature: Any, k: Any, top_p: Any, min_p: Any, uniform: float, gathered: Any, scratch: Any
) -> Any:
    """min_p, then top-k, then top-p, then the inverse CDF in token id order over what is left."""
    values, ids, weights = gathered
    floor = max(min_p, _tiny)
    gathers = k > 0
    if gathers:
        bound = kth_bound(block_max, k, scratch) if k <= block_max.size else _bound_for_count(x, k, peak, temperature)
        n = collect_above(x, block_max, bound, values, ids)
    else:
        n = x.size
    total = _fill_weights(values if gathers else x, n, peak, temperature, floor, weights)
    if not gathers and top_p < _one:
        low = _enough_for_mass(n, peak, temperature, top_p, total)
        if _count_reaching(x, low) < n // 2:
            gathers = True
            n = collect_above(x, block_max, key_of(np.int32(bits_of(low))), values, ids)
            for j in range(n):
                weights[j] = weights[ids[j]]
    if not gathers:
        values = x
    if 0 < k < n and _count_from(values, weights, n, _lowest_float) > k:
        last = _last_kept(values, weights, n, _least(values, weights, n), peak, False, np.float64(k), scratch)
        total = _drop_after(values, weights, n, last)
    if top_p < _one:
        low = _enough_for_mass(n if k > 0 else x.size, peak, temperature, top_p, total)
        last = _last_kept(values, weights, n, low, peak, True, np.float64(top_p) * total, scratch)
        total = _drop_after(values, weights, n, last)
    place = _draw_weights(weights, n, uniform * total)
    return np.int64(ids[place]) if gathers else place


@jit("reassoc")
def _sum(weights: Any, start: int, stop: int) -> float:
    total = 0.0
    for i in range(start, stop):
        total += np.float64(weights[i])
    return total


@jit()
def _draw_weights(weights: Any, n: int, target: float) -> int:
    """The first place at which the running sum of weights exceeds `target`; if rounding keeps it under, the last that weighs anything."""
    before = 0.0
    for start in range(0, n, BLOCK):
        stop = min(n, start + BLOCK)
        after = before + _sum(weights, start, stop)
        if after > target:
            for i in range(start, stop):
                before += np.float64(weights[i])
                if before > target and weights[i] > _zero:
                    return i
        before = after
    last = n - 1
    while last > 0 and weights[last] <= _zero:
        last -= 1
    return last


@jit()
def _sample_body(arguments: int) -> None:
    logits, row_bytes, rows, v = (load_i64(arguments + 16), load_i64(arguments + 24), load_i64(arguments + 32), load_i64(arguments + 40))
    greedy = load_i64(arguments + 48) == 0
    has_top_k = load_i64(arguments + 56) != 0
    has_top_p = load_i64(arguments + 64) != 0
    has_min_p = load_i64(arguments + 72) != 0
    temperatures = numba.carray(f32_pointer(load_i64(arguments + 48)), rows)
    top_ks = numba.carray(i32_pointer(load_i64(arguments + 56)), rows)
    top_ps = numba.carray(f32_pointer(load_i64(arguments + 64)), rows)
    min_ps = numba.carray(f32_pointer(load_i64(arguments + 72)), rows)
    uniforms = numba.carray(f64_pointer(load_i64(arguments + 80)), rows)
    tokens = numba.carray(i64_pointer(load_i64(arguments + 88)), rows)
    blocks = (v + BLOCK - 1) // BLOCK
    block_max = np.empty(blocks, np.int32)
    sums = np.empty(blocks, np.float32)
    room = v if has_top_k or has_top_p or has_min_p else 1
    gathered = (np.empty(room, np.float32), np.empty(room, np.int32), np.empty(room, np.float32))
    scratch = make_scratch(room)
    while True:
        row = fetch_add(arguments, 1)
        if row >= rows:
            break
        x = numba.carray(f32_pointer(logits + row * row_bytes), v)
        best = scan(x, block_max)
        if best == INF_KEY:
            tokens[row] = -1
            continue
        first = first_with(x, block_max, best)
        if greedy or temperatures[row] <= _zero:
            tokens[row] = first
            continue
        k = np.int64(top_ks[row]) if has_top_k else 0
        k = k if k < v else 0
        top_p = top_ps[row] if has_top_p else _one
        min_p = min_ps[row] if has_min_p else _zero
        if k > 0 or top_p < _one or min_p > _zero:
            tokens[row] = _draw_filtered(x, block_max, x[first], temperatures[row], k, top_p, min_p, uniforms[row], gathered, scratch)
        else:
            tokens[row] = _draw_plain(x, x[first], temperatures[row], uniforms[row], sums)


@functools.cache
def _sample_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def sample(arguments):
        _sample_body(arguments)

    return Kernel(sample)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def sample_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    uniform: torch.Tensor | None,
) -> torch.Tensor:
    """Contract of `kernels.sampling.sample_tokens`; `temperature` None makes every row greedy."""
    rows, v = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    parameters = [_address(tensor) for tensor in (temperature, top_k, top_p, min_p, uniform)]
    if rows:
        _sample_kernel()(threads_for(logits), logits.data_ptr(), 4 * logits.stride(0), rows, v, *parameters, tokens.data_ptr())
    return tokens
