"""One block of keys against one task's rows: scores, softmax weights within the block, weighted sums of values.

Knows row addresses and scratch; what blocks there are and how they are merged is the caller's business.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np

from .address import argument, load_f32, store_f32
from .attention_pages import CAP, CAP_FACTOR, DIM, FACTOR, GROUP, WINDOW
from .attention_vectors import (
    FEW_ROWS,
    SIZE,
    KVDtype,
    blend,
    cap_scores,
    gather_scales,
    make_few_row_tiles,
    make_gather_tile,
    make_gather_tiles,
    make_transpose,
    multiply,
    softmax_row,
)
from .attention_work import KEY_BLOCK
from .tile import COLUMNS, MAX_ROWS, make_row_tiles, specialised

SCORE_ROW: Final = 4 * KEY_BLOCK + 64  # bytes; not a power of two, so that a column of rows spreads over the cache's sets
PANEL: Final = COLUMNS  # keys transposed at a time
DEPTH: Final = 64  # longest chain of sums in a score: longer dot products are summed in pieces, which halves their error at 256
ONE: Final = np.float32(1.0)
MINUS_INFINITY: Final = np.float32(-np.inf)


@numba.njit(nogil=True, error_model="numpy")
def weights(arguments: int, scores: int, rows: int, first_row: int, ahead: int, keys: int, begin: int, end: int, result: int) -> None:
    """Turn `rows` rows of scores, columns begin..end, into softmax weights; greatest and sum of each row go to `result`.

    `ahead` is how many of the block's keys the task's first query may see; each further query may see one more.
    """
    group = argument(arguments, GROUP)
    window = argument(arguments, WINDOW)
    capped = argument(arguments, CAP) != 0
    for r in range(rows):
        row = scores + r * SCORE_ROW
        visible = ahead + (first_row + r) // group
        stop = max(begin, min(visible, keys))
        start = begin
        if window > 0:
            start = min(end, max(begin, visible - window))
        if capped:
            cap_scores(row + 4 * begin, end - begin, load_f32(arguments + 8 * CAP_FACTOR), load_f32(arguments + 8 * CAP))
        for c in range(begin, start):
            store_f32(row + 4 * c, MINUS_INFINITY)
        for c in range(stop, end):
            store_f32(row + 4 * c, MINUS_INFINITY)
        softmax_row(row + 4 * begin, end - begin, load_f32(arguments + 8 * FACTOR), result + 8 * r)


def make_score_block(dtype: KVDtype) -> Any:
    """A Numba function that fills the scores of one block. The panel has a row more than `dim`: the scales of quantized keys."""
    quantized = SIZE[dtype] == 1
    tiles = make_row_tiles(vectors=2, dtype="float32")
    transpose = make_transpose(dtype)

    @numba.njit(nogil=True, error_model="numpy")
    @specialised(dtype)
    def score_block(
        arguments: int, scores: int, q: int, rows: int, k_rows: int, v_rows: int, keys: int, ahead: int, panel: int, spare: int
    ) -> None:
        """scores[rows, keys] = q @ k.T, a panel of keys at a time; tiles of which no row sees a key are left out."""
        dim, group = argument(arguments, DIM), argument(arguments, GROUP)
        window = argument(arguments, WINDOW) if argument(arguments, WINDOW) > 0 else 1 << 40
        for first in range(max(0, ahead - window) // PANEL * PANEL, keys, PANEL):
            for c in range(0, min(PANEL, keys - first), 8):
                transpose(k_rows + 8 * (first + c), v_rows + 8 * (first + c), dim, panel + 4 * c, 4 * PANEL)
                if quantized:
                    gather_scales(k_rows + 8 * (first + c), 8, dim, panel + 4 * PANEL * dim + 4 * c)
            for r in range(0, rows, MAX_ROWS):
                count = min(MAX_ROWS, rows - r)
                stop = min(keys, ahead + (r + count - 1) // group)
                start = ahead + r // group - window
                if first < stop and start < first + PANEL:
                    target = scores + r * SCORE_ROW + 4 * first
                    a = q + r * dim * 4
                    tiles(count, a, 4 * dim, panel, 4 * PANEL, target, SCORE_ROW, min(dim, DEPTH), 0)
                    for d in range(DEPTH, dim, DEPTH):
                        tiles(count, a + 4 * d, 4 * dim, panel + 4 * PANEL * d, 4 * PANEL, spare, 4 * PANEL, min(dim - d, DEPTH), 0)
                        for i in range(count):
                            blend(target + i * SCORE_ROW, ONE, spare + i * 4 * PANEL, ONE, PANEL)
                    if quantized:
                        for i in range(count):
                            multiply(target + i * SCORE_ROW, panel + 4 * PANEL * dim, PANEL)

    return score_block


def make_add_values(dtype: KVDtype) -> Any:
    """A Numba function that multiplies one tile of softmax weights with one block's values."""
    few_tiles = make_few_row_tiles(dtype)
    tiles = make_gather_tiles(vectors=2, dtype=dtype)
    narrow_tile = make_gather_tile(rows=1, vectors=1, dtype=dtype, width=8)
    size = SIZE[dtype]

    @numba.njit(nogil=True, error_model="numpy")
    @specialised(dtype)
    def add_values(rows: int, weights: int, v_rows: int, ahead: int, depth: int, target: int, target_row: int, dim: int) -> None:
        """target[rows, dim] = weights[rows, depth] @ v"""
        column = 0
        while rows <= FEW_ROWS and column + 2 * COLUMNS <= dim:
            few_tiles(rows, weights, SCORE_ROW, v_rows, ahead, column * size, target + 4 * column, target_row, depth)
            column += 2 * COLUMNS
        while column + COLUMNS <= dim:
            tiles(rows, weights, SCORE_ROW, v_rows, ahead, column * size, target + 4 * column, target_row, depth)
            column += COLUMNS
        while column < dim:
            for r in range(rows):  # only where dim is no multiple of a tile's columns
                place = target + r * target_row + 4 * column
                narrow_tile(weights + r * SCORE_ROW, 0, v_rows, v_rows, column * size, place, 0, depth)
            column += 8

    return add_values
