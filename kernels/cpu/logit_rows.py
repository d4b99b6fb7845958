"""Rows of logits on the CPU: keys, blocks, weights, and how a kernel gets at them. Draws nothing and knows no request.

Rows are compared by integer keys: a float's magnitude bits with its sign. Keys order as the floats do, 0 and -0 are equal, +inf is
INF_KEY and NaN lies beyond it on either side. A first pass takes the largest key of each block of BLOCK tokens, which then serves
three ends: the argmax; the refusal of rows without a distribution; and a bound for top-k, because the k-th largest of the block
maxima is at most the k-th largest of all, so that few blocks need a second look. Weights are float32, their sums float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .address import bits_of, float_of
from .threads import team_size

_Function = TypeVar("_Function", bound=Callable[..., Any])

BLOCK = 64
INF_KEY = 0x7F800000
LOWEST_EXPONENT = -87.0  # a token e^87 times less likely than the best weighs nothing
MAGNITUDE = np.int32(0x7FFFFFFF)
LOWEST_KEY = np.int32(-(2**31))
MIN_PARALLEL = 1 << 15  # logits below which a second thread costs more than it gives

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
_zero = np.float32(0.0)
_one = np.float32(1.0)


def jit(*fastmath: str) -> Callable[[_Function], _Function]:
    decorator: Callable[[_Function], _Function] = numba.njit(nogil=True, error_model="numpy", fastmath=set(fastmath))
    return decorator


def _pointer_maker(element: Any, bits: Any) -> Any:
    def pointer(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], ir.PointerType(bits))

        return types.CPointer(element)(types.int64), codegen

    return intrinsic(pointer)


f32_pointer = _pointer_maker(types.float32, ir.FloatType())
i32_pointer = _pointer_maker(types.int32, ir.IntType(32))
f64_pointer = _pointer_maker(types.float64, ir.DoubleType())
i64_pointer = _pointer_maker(types.int64, ir.IntType(64))


@jit()
def key_of(bits: Any) -> Any:
    sign = np.int32(bits >> np.int32(31))
    return np.int32(np.int32(np.int32(bits & MAGNITUDE) ^ sign) - sign)


@jit("contract")
def weight_of(x: Any, peak: Any, temperature: Any) -> Any:
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


@jit()
def _block_range(x: Any, start: int, stop: int) -> tuple[Any, Any]:
    """Largest key and largest magnitude of tokens start..stop."""
    best = LOWEST_KEY
    largest = np.int32(0)
    for i in range(start, stop):
        bits = np.int32(bits_of(x[i]))
        key = key_of(bits)
        magnitude = np.int32(bits & MAGNITUDE)
        best = key if key > best else best
        largest = magnitude if magnitude > largest else largest
    return best, largest


@jit()
def scan(x: Any, block_max: Any) -> Any:
    """Fill the block maxima; the row's largest key, or INF_KEY when nothing can be drawn (NaN, +inf, or nothing but -inf)."""
    best = LOWEST_KEY
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


@jit()
def first_with(x: Any, block_max: Any, key: Any) -> Any:
    block = 0
    while block_max[block] != key:
        block += 1
    i = block * BLOCK
    while key_of(np.int32(bits_of(x[i]))) != key:
        i += 1
    return i


@jit("reassoc")
def _sum_weights(x: Any, start: int, stop: int, peak: Any, temperature: Any) -> Any:
    total = _zero
    for i in range(start, stop):
        total += weight_of(x[i], peak, temperature)
    return total


@jit()
def fill_sums(x: Any, peak: Any, temperature: Any, sums: Any) -> float:
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


@jit()
def collect_above(x: Any, block_max: Any, bound: Any, values: Any, ids: Any) -> Any:
    """Gather logits whose key reaches `bound`, and their ids, in id order, from the blocks that have any."""
    n: Any = 0
    for block in range(block_max.size):
        if block_max[block] >= bound:
            for i in range(block * BLOCK, min(x.size, (block + 1) * BLOCK)):
                ids[n] = i
                n += np.int64(key_of(np.int32(bits_of(x[i]))) >= bound)
    for j in range(n):
        values[j] = x[ids[j]]
    return n


def threads_for(logits: torch.Tensor) -> int:
    return 1 if logits.numel() < MIN_PARALLEL else min(team_size(), logits.shape[0])
