"""Sampling on the CPU, one task a row and nothing sorted but what is reported. Knows no request and checks no argument.

Rows are compared by integer keys: a float's magnitude bits with its sign. Keys order as the floats do, 0 and -0 are equal, +inf is
INF_KEY and NaN lies beyond it on either side. A first pass takes the largest key of each block of BLOCK tokens, which then serves
three ends: the argmax; the refusal of rows without a distribution; and a bound for top-k, because the k-th largest of the block
maxima is at most the k-th largest of all, so that few blocks need a second look. A cut (the last token kept by top-k or top-p) is
found by histograms over ever narrower key ranges. Weights are float32, their sums float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .address import bits_of, float_of, load_i64, store_f32, store_i64
from .atomics import fetch_add
from .threads import KERNEL_SIGNATURE, Kernel, team_size

_Function = TypeVar("_Function", bound=Callable[..., Any])

BLOCK = 64
INF_KEY = 0x7F800000
LOWEST_EXPONENT = -87.0  # a token e^87 times less likely than the best weighs nothing
_BINS = 2048
_FEW = 1024  # tokens among which a cut is found exactly rather than by another pass over the row
_STRIP = 16  # logits looked over at once for one of these few
_MAX_PASSES = 20
_MIN_PARALLEL = 1 << 15  # logits below which a second thread costs more than it gives

_magnitude = np.int32(0x7FFFFFFF)
_lowest_key = np.int32(-(2**31))
_lowest = np.float32(LOWEST_EXPONENT)
_log2e = np.float32(1.44269504088896341)
_ln2_high = np.float32(0.693359375)
_ln2_low = np.float32(-2.12194440e-4)
_round = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, which is left in the low bits
_p0 = np.float32(1.9875691500e-4)
_p1 = np.float32(1.3981999507e-3)
_p2 = np.float32(8.3334519073e-3)
_p3 = np.float32(4.1665795894e-2)
_p4 = np.float32(1.6666665459e-1)
_p5 = np.float32(5.0000001201e-1)
_sign = np.uint32(0x80000000)
_lowest_float = np.float32(-3.4e38)
_half = np.float32(0.5)
_zero = np.float32(0.0)
_one = np.float32(1.0)
_tiny = np.float32(1.2e-38)  # below every weight but 0: exp(-87) is 1.6e-38


def _jit(*fastmath: str) -> Callable[[_Function], _Function]:
    decorator: Callable[[_Function], _Function] = numba.njit(nogil=True, error_model="numpy", fastmath=set(fastmath))
    return decorator


def _pointer_maker(element: Any, bits: Any) -> Any:
    def pointer(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], ir.PointerType(bits))

        return types.CPointer(element)(types.int64), codegen

    return intrinsic(pointer)


_f32_pointer = _pointer_maker(types.float32, ir.FloatType())
_i32_pointer = _pointer_maker(types.int32, ir.IntType(32))
_f64_pointer = _pointer_maker(types.float64, ir.DoubleType())
_i64_pointer = _pointer_maker(types.int64, ir.IntType(64))


@_jit()
def _key_of(bits: Any) -> Any:
    sign = np.int32(bits >> np.int32(31))
    return np.int32(np.int32(np.int32(bits & _magnitude) ^ sign) - sign)


@_jit("contract")
def _weight(x: Any, peak: Any, temperature: Any) -> Any:
    """exp((x - peak) / temperature) within 2 units in the last place (Cephes' expf); 0 below LOWEST_EXPONENT."""
    exact = np.float32((x - peak) / temperature)
    z = exact if exact > _lowest else _lowest
    shifted = z * _log2e + _round
    n = shifted - _round
    r = z - n * _ln2_high - n * _ln2_low
    p = ((((_p0 * r + _p1) * r + _p2) * r + _p3) * r + _p4) * r + _p5
    power = float_of(np.uint32(np.uint32(bits_of(shifted) + np.uint32(127)) << np.uint32(23)))
    w = (p * (r * r) + r + _one) * power
    return w if exact >= _lowest else _zero


@_jit()
def _block_range(x: Any, start: int, stop: int) -> tuple[Any, Any]:
    """Largest key and largest magnitude of tokens start..stop."""
    best = _lowest_key
    largest = np.int32(0)
    for i in range(start, stop):
        bits = np.int32(bits_of(x[i]))
        key = _key_of(bits)
        magnitude = np.int32(bits & _magnitude)
        best = key if key > best else best
        largest = magnitude if magnitude > largest else largest
    return best, largest


@_jit()
def _scan(x: Any, block_max: Any) -> Any:
    """Fill the block maxima; the row's largest key, or INF_KEY when nothing can be drawn (NaN, +inf, or nothing but -inf)."""
    best = _lowest_key
    largest = np.int32(0)
    for block in range(block_max.size):
        start = block * BLOCK
        if start + BLOCK <= x.size:
            key, magnitude = _block_range(x, start, start + BLOCK)
        else:
            key, magnitude = _block_range(x, start, x.size)
        block_max[block] = key
        best = max(best, key)
        largest = max(largest, magnitude)
    if largest > INF_KEY or best >= INF_KEY or best <= -INF_KEY:
        return np.int32(INF_KEY)
    return best


@_jit()
def _first_with(x: Any, block_max: Any, key: Any) -> Any:
    block = 0
    while block_max[block] != key:
        block += 1
    i = block * BLOCK
    while _key_of(np.int32(bits_of(x[i]))) != key:
        i += 1
    return i


@_jit("reassoc")
def _sum_weights(x: Any, start: int, stop: int, peak: Any, temperature: Any) -> Any:
    total = _zero
    for i in range(start, stop):
        total += _weight(x[i], peak, temperature)
    return total


@_jit()
def _fill_sums(x: Any, peak: Any, temperature: Any, sums: Any) -> float:
    """The sum of weights of each block (float32), and of all (float64)."""
    total = 0.0
    for block in range(sums.size):
        start = block * BLOCK
        if start + BLOCK <= x.size:
            sums[block] = _sum_weights(x, start, start + BLOCK, peak, temperature)
        else:
            sums[block] = _sum_weights(x, start, x.size, peak, temperature)
        total += np.float64(sums[block])
    return total


@_jit()
def _draw_plain(x: Any, peak: Any, temperature: Any, uniform: float, sums: Any) -> int:
    """Inverse CDF over the whole row: block sums first, then the one block in which the target falls."""
    target = uniform * _fill_sums(x, peak, temperature, sums)
    before = 0.0
    chosen = -1
    for block in range(sums.size):
        if before + np.float64(sums[block]) > target:
            for i in range(block * BLOCK, min(x.size, (block + 1) * BLOCK)):
                weight = np.float64(_weight(x[i], peak, temperature))
                before += weight
                if weight > 0.0:
                    chosen = i  # stays the answer if rounding keeps the running sum at or under the target
                    if before > target:
                        break
            break
        before += np.float64(sums[block])
    return chosen


@_jit("reassoc")
def _fill_weights(x: Any, n: int, peak: Any, temperature: Any, floor: Any, weights: Any) -> float:
    """The weights of n logits, those below `floor` as 0; gives their sum."""
    total = 0.0
    for i in range(n):
        weight = _weight(x[i], peak, temperature)
        weight = weight if weight >= floor else _zero
        weights[i] = weight
        total += np.float64(weight)
    return total


@_jit()
def _collect_above(x: Any, block_max: Any, bound: Any, values: Any, ids: Any) -> Any:
    """Gather logits whose key reaches `bound`, and their ids, in id order, from the blocks that have any."""
    n: Any = 0
    for block in range(block_max.size):
        if block_max[block] >= bound:
            for i in range(block * BLOCK, min(x.size, (block + 1) * BLOCK)):
                ids[n] = i
                n += np.int64(_key_of(np.int32(bits_of(x[i]))) >= bound)
    for j in range(n):
        values[j] = x[ids[j]]
    return n


@_jit()
def _count_reaching(x: Any, bound: Any) -> Any:
    count = np.int32(0)
    for i in range(x.size):
        count = np.int32(count + np.int32(x[i] >= bound))
    return count


@_jit()
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
    return _key_of(np.int32(bits_of(low)))


@_jit()
def _cut(keys: Any, ids: Any, weights: Any, n: int, target: float, histogram: Any) -> Any:
    """Where the running sum of n weights, by falling key and then rising id, first reaches `target`: that id.

    Keys, ids (rising) and weights are overwritten: histograms over ever narrower key ranges leave equal keys in the end.
    """
    low = keys[0]
    high = keys[0]
    for i in range(n):
        low = min(low, keys[i])
        high = max(high, keys[i])
    before = 0.0
    while low != high:
        shift = 0
        while ((np.int64(high) - np.int64(low)) >> shift) >= _BINS:
            shift += 1
        bins = ((np.int64(high) - np.int64(low)) >> shift) + 1
        histogram[:bins] = 0.0
        for i in range(n):
            histogram[(np.int64(high) - np.int64(keys[i])) >> shift] += np.float64(weights[i])
        chosen = 0
        while chosen < bins - 1 and before + histogram[chosen] < target:
            before += histogram[chosen]
            chosen += 1
        top = np.int64(high) - (np.int64(chosen) << shift)
        bottom = top - (np.int64(1) << shift)
        near = 0
        low = _magnitude
        high = _lowest_key
        for i in range(n):
            key = keys[i]
            keys[near] = key
            ids[near] = ids[i]
            weights[near] = weights[i]
            if key > bottom and key <= top:
                low = min(low, key)
                high = max(high, key)
                near += 1
        n = near
    for i in range(n):
        before += np.float64(weights[i])
        if before >= target:
            return ids[i]
    return ids[n - 1]


@_jit()
def _kth_bound(block_max: Any, k: int, scratch: Any) -> Any:
    """A key that at least k tokens of the row reach: the k-th largest block maximum, or the lowest key when blocks are too few."""
    if k > block_max.size:
        return _lowest_key
    histogram, keys, ids, weights = scratch
    for i in range(block_max.size):
        keys[i] = block_max[i]
        ids[i] = i
        weights[i] = _one
    return block_max[_cut(keys, ids, weights, block_max.size, np.float64(k), histogram)]


@_jit("reassoc")
def _mass_from(values: Any, weights: Any, n: int, bound: Any) -> float:
    total = 0.0
    for i in range(n):
        total += np.float64(weights[i] if values[i] >= bound else _zero)
    return total


@_jit()
def _any_between(values: Any, start: int, stop: int, low: Any, high: Any) -> Any:
    found = np.int32(0)
    for i in range(start, stop):
        found = np.int32(found | (np.int32(values[i] >= low) & np.int32(values[i] < high)))
    return found != 0


@_jit()
def _count_from(values: Any, weights: Any, n: int, bound: Any) -> Any:
    """How many logits reach `bound` and weigh anything."""
    count = np.int32(0)
    for i in range(n):
        count = np.int32(count + (np.int32(weights[i] > _zero) & np.int32(values[i] >= bound)))
    return count


@_jit()
def _least(values: Any, weights: Any, n: int) -> Any:
    """The smallest logit that weighs anything."""
    least = _magnitude
    for i in range(n):
        key = _key_of(np.int32(bits_of(values[i])))
        key = key if weights[i] > _zero else _magnitude
        least = key if key < least else least
    bits = np.uint32(least) if least >= 0 else np.uint32(np.uint32(-least) | _sign)
    return float_of(bits)


@_jit()
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
        keys[j] = _key_of(np.int32(bits_of(values[ids[j]])))
        near_weights[j] = weights[ids[j]] if by_mass else _one
    return _cut(keys, ids, near_weights, found, target - before, histogram)


@_jit()
def _enough_for_mass(n: int, peak: Any, temperature: Any, top_p: Any, total: float) -> Any:
    """A logit that all of top-p's tokens reach: n tokens that each weigh less than (1 - top_p) * total / n are not needed."""
    negligible = 0.999 * (1.0 - np.float64(top_p)) * total / n
    depth = np.float64(temperature) * math.log(negligible)
    return np.float32(np.float64(peak) + depth - 1e-6 * (abs(np.float64(peak)) + abs(depth)))


@_jit("reassoc")
def _drop_after(values: Any, weights: Any, n: int, last: int) -> float:
    """Set to 0 the weights that come after place `last`; gives the sum of the rest."""
    bound = values[last]
    total = 0.0
    for i in range(n):
        weight = weights[i] if values[i] > bound or (values[i] == bound and i <= last) else _zero
        weights[i] = weight
        total += np.float64(weight)
    return total


@_jit()
def _draw_filtered(
    x: Any, block_max: Any, peak: Any, temperature: Any, k: Any, top_p: Any, min_p: Any, uniform: float, gathered: Any, scratch: Any
) -> Any:
    """min_p, then top-k, then top-p, then the inverse CDF in token id order over what is left."""
    values, ids, weights = gathered
    floor = max(min_p, _tiny)
    gathers = k > 0
    if gathers:
        bound = _kth_bound(block_max, k, scratch) if k <= block_max.size else _bound_for_count(x, k, peak, temperature)
        n = _collect_above(x, block_max, bound, values, ids)
    else:
        n = x.size
    total = _fill_weights(values if gathers else x, n, peak, temperature, floor, weights)
    if not gathers and top_p < _one:
        low = _enough_for_mass(n, peak, temperature, top_p, total)
        if _count_reaching(x, low) < n // 2:
            gathers = True
            n = _collect_above(x, block_max, _key_of(np.int32(bits_of(low))), values, ids)
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


@_jit("reassoc")
def _sum(weights: Any, start: int, stop: int) -> float:
    total = 0.0
    for i in range(start, stop):
        total += np.float64(weights[i])
    return total


@_jit()
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


@_jit()
def _scratch(n: int) -> Any:
    return np.empty(_BINS, np.float64), np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, np.float32)


@_jit()
def _sample_body(arguments: int) -> None:
    logits, row_bytes, rows, v = (load_i64(arguments + 16), load_i64(arguments + 24), load_i64(arguments + 32), load_i64(arguments + 40))
    greedy = load_i64(arguments + 48) == 0
    has_top_k = load_i64(arguments + 56) != 0
    has_top_p = load_i64(arguments + 64) != 0
    has_min_p = load_i64(arguments + 72) != 0
    temperatures = numba.carray(_f32_pointer(load_i64(arguments + 48)), rows)
    top_ks = numba.carray(_i32_pointer(load_i64(arguments + 56)), rows)
    top_ps = numba.carray(_f32_pointer(load_i64(arguments + 64)), rows)
    min_ps = numba.carray(_f32_pointer(load_i64(arguments + 72)), rows)
    uniforms = numba.carray(_f64_pointer(load_i64(arguments + 80)), rows)
    tokens = numba.carray(_i64_pointer(load_i64(arguments + 88)), rows)
    blocks = (v + BLOCK - 1) // BLOCK
    block_max = np.empty(blocks, np.int32)
    sums = np.empty(blocks, np.float32)
    room = v if has_top_k or has_top_p or has_min_p else 1
    gathered = (np.empty(room, np.float32), np.empty(room, np.int32), np.empty(room, np.float32))
    scratch = _scratch(room)
    while True:
        row = fetch_add(arguments, 1)
        if row >= rows:
            break
        x = numba.carray(_f32_pointer(logits + row * row_bytes), v)
        best = _scan(x, block_max)
        if best == INF_KEY:
            tokens[row] = -1
            continue
        first = _first_with(x, block_max, best)
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


@_jit()
def _keep_largest(values: Any, ids: Any, n: int, k: int, scratch: Any) -> None:
    """Leave the k largest of n gathered logits in front, in id order; equal ones go by lowest id."""
    histogram, keys, places, weights = scratch
    for i in range(n):
        keys[i] = _key_of(np.int32(bits_of(values[i])))
        places[i] = i
        weights[i] = _one
    last = _cut(keys, places, weights, n, np.float64(k), histogram)
    bound = values[last]
    left = 0
    for i in range(n):
        if values[i] > bound or (values[i] == bound and i <= last):
            values[left] = values[i]
            ids[left] = ids[i]
            left += 1


@_jit()
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


@_jit()
def _logprobs_body(arguments: int) -> None:
    logits, row_bytes, rows, v = (load_i64(arguments + 16), load_i64(arguments + 24), load_i64(arguments + 32), load_i64(arguments + 40))
    tokens = numba.carray(_i64_pointer(load_i64(arguments + 48)), rows)
    k = load_i64(arguments + 56)
    chosen_out = load_i64(arguments + 64)
    ids_out = load_i64(arguments + 72)
    tops_out = load_i64(arguments + 80)
    block_max = np.empty((v + BLOCK - 1) // BLOCK, np.int32)
    sums = np.empty(block_max.size, np.float32)
    room = v if k > 0 else 1
    values = np.empty(room, np.float32)
    ids = np.empty(room, np.int32)
    scratch = _scratch(room)
    while True:
        row = fetch_add(arguments, 1)
        if row >= rows:
            break
        x = numba.carray(_f32_pointer(logits + row * row_bytes), v)
        best = _scan(x, block_max)
        if best == INF_KEY:
            store_f32(chosen_out + 4 * row, np.float32(np.nan))
            for j in range(k):
                store_i64(ids_out + 8 * (row * k + j), -1)
                store_f32(tops_out + 4 * (row * k + j), np.float32(np.nan))
            continue
        peak = x[_first_with(x, block_max, best)]
        log_total = np.float64(peak) + math.log(_fill_sums(x, peak, _one, sums))
        store_f32(chosen_out + 4 * row, np.float32(np.float64(x[tokens[row]]) - log_total))
        if k == 0:
            continue
        n = _collect_above(x, block_max, _kth_bound(block_max, k, scratch), values, ids)
        _keep_largest(values, ids, n, k, scratch)
        _sort_falling(values, ids, k)
        for j in range(k):
            store_i64(ids_out + 8 * (row * k + j), np.int64(ids[j]))
            store_f32(tops_out + 4 * (row * k + j), np.float32(np.float64(values[j]) - log_total))


@_jit()
def _penalties_body(arguments: int) -> None:
    logits, row_bytes, v, rows = (load_i64(arguments + 16), load_i64(arguments + 24), load_i64(arguments + 32), load_i64(arguments + 40))
    table = numba.carray(_i64_pointer(load_i64(arguments + 48)), 4 * rows)
    factors = numba.carray(_f32_pointer(load_i64(arguments + 56)), 3 * rows)
    while True:
        r = fetch_add(arguments, 1)
        if r >= rows:
            break
        x = numba.carray(_f32_pointer(logits + table[4 * r] * row_bytes), v)
        n = table[4 * r + 3]
        ids = numba.carray(_i32_pointer(table[4 * r + 1]), n)
        counts = numba.carray(_i32_pointer(table[4 * r + 2]), n)
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
def _sample_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def sample(arguments):  # type: ignore[no-untyped-def]
        _sample_body(arguments)

    return Kernel(sample)


@functools.cache
def _logprobs_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def logprobs(arguments):  # type: ignore[no-untyped-def]
        _logprobs_body(arguments)

    return Kernel(logprobs)


@functools.cache
def _penalties_kernel() -> Kernel:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True)
    def penalties(arguments):  # type: ignore[no-untyped-def]
        _penalties_body(arguments)

    return Kernel(penalties)


def _threads(logits: torch.Tensor) -> int:
    return 1 if logits.numel() < _MIN_PARALLEL else min(team_size(), logits.shape[0])


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
        _sample_kernel()(_threads(logits), logits.data_ptr(), 4 * logits.stride(0), rows, v, *parameters, tokens.data_ptr())
    return tokens


def top_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contract of `kernels.sampling.top_logprobs`."""
    rows, v = logits.shape
    chosen = torch.empty(rows, dtype=torch.float32)
    ids = torch.empty(rows, k, dtype=torch.int64)
    tops = torch.empty(rows, k, dtype=torch.float32)
    outputs = (chosen.data_ptr(), ids.data_ptr(), tops.data_ptr())
    if rows:
        _logprobs_kernel()(_threads(logits), logits.data_ptr(), 4 * logits.stride(0), rows, v, token_ids.data_ptr(), k, *outputs)
    return chosen, ids, tops


def apply_penalties(
    logits: torch.Tensor, table: np.ndarray[Any, np.dtype[np.int64]], factors: np.ndarray[Any, np.dtype[np.float32]]
) -> None:
    """Contract of `kernels.sampling.apply_penalties`.

    table int64 [R, 4]: row, address of the token ids (int32), address of the generated counts (int32), how many there are.
    factors float32 [R, 3]: repetition, frequency, presence.
    """
    rows = table.shape[0]
    threads = team_size() if int(table[:, 3].sum()) >= _MIN_PARALLEL else 1
    if rows:
        addresses = (table.ctypes.data, factors.ctypes.data)
        _penalties_kernel()(threads, logits.data_ptr(), 4 * logits.stride(0), logits.shape[1], rows, *addresses)
