"""Cuts: the last token that top-k or top-p keeps, found by histograms over ever narrower key ranges. Nothing is sorted."""

from __future__ import annotations

from typing import Any

import numpy as np

from .logit_rows import LOWEST_KEY, MAGNITUDE, jit

_BINS = 2048

_one = np.float32(1.0)


@jit()
def make_scratch(n: int) -> Any:
    return np.empty(_BINS, np.float64), np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, np.float32)


@jit()
def find_cut(keys: Any, ids: Any, weights: Any, n: int, target: float, histogram: Any) -> Any:
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
        low = MAGNITUDE
        high = LOWEST_KEY
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


@jit()
def kth_bound(block_max: Any, k: int, scratch: Any) -> Any:
    """A key that at least k tokens of the row reach: the k-th largest block maximum, or the lowest key when blocks are too few."""
    if k > block_max.size:
        return LOWEST_KEY
    histogram, keys, ids, weights = scratch
    for i in range(block_max.size):
        keys[i] = block_max[i]
        ids[i] = i
        weights[i] = _one
    return block_max[find_cut(keys, ids, weights, block_max.size, np.float64(k), histogram)]
