"""Paged attention on the CPU: blocks of keys, transposed in registers' reach, against tiles of queries. Knows no plan's making.

One path serves decoding, verification and prompts. A task holds up to MAX_QUERY_ROWS rows (queries times the heads that share a
key head). For each block of KEY_BLOCK keys it transposes one panel of keys at a time into scratch (for the register tile), fills the
rows' scores, takes each row's softmax within the block, multiplies with the values where they lie, and merges the block into
the rows' running results. Blocks are cut at absolute positions and merged in order; where several tasks share a sequence's blocks
(long contexts, few sequences) each leaves its blocks' results in scratch and the last to finish merges them all in the same order.
Hence a row's bits depend on nothing but its own inputs. (They do depend on the width of the machine's vectors.)
"""

from __future__ import annotations

import functools
import struct
import threading
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from .address import load_f32, load_i32, load_i64, store_f32, store_i64
from .atomics import fetch_add
from .attention_vectors import FEW_ROWS, blend, cap_scores, make_few_row_tiles, make_gather_tile, make_gather_tiles, make_transpose, scale_row, softmax_row
from .attention_work import ITEM_FIELDS, KEY_BLOCK, MAX_QUERY_ROWS
from .threads import KERNEL_SIGNATURE, Kernel
from .tile import COLUMNS, MAX_ROWS, BDtype, make_row_tiles
from .vector_math import exp2

_LOG2E = 1.4426950408889634
_KEY_BLOCK, _MAX_QUERY_ROWS, _ITEM_BYTES = KEY_BLOCK, MAX_QUERY_ROWS, 8 * ITEM_FIELDS
_COLUMNS, _MAX_ROWS, _FEW_ROWS = COLUMNS, MAX_ROWS, FEW_ROWS
_PANEL = COLUMNS  # keys transposed at a time
_SCORE_ROW = 4 * KEY_BLOCK + 64  # bytes; not a power of two, so that a column of rows spreads over the cache's sets
_MINUS_INFINITY = np.float32(-np.inf)

# Arguments, as int64 at 8 * index.
_SLOT, _ITEMS, _NUM_TASKS, _KV_HEADS, _GROUP, _DIM, _Q, _Q_ROW, _OUT, _OUT_ROW = range(2, 12)
_K, _V, _PAGE_STRIDE, _HEAD_STRIDE, _KEY_STRIDE, _PAGE_SIZE, _TABLE, _TABLE_ROW = range(12, 20)
_SCALE, _WINDOW, _CAP, _CAP_INVERSE, _CAP_SCALE, _WORKSPACE, _WORKSPACE_BYTES, _PARTIALS, _COUNTERS = range(20, 29)


@intrinsic
def _arrive(typingctx: Any, address: Any) -> Any:
    """Add 1 to the int64 at `address` and give what was there; what other threads wrote before they arrived is visible after."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.PointerType(ir.IntType(64)))
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(types.int64), codegen


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _argument(arguments: int, index: int) -> int:
    return load_i64(arguments + 8 * index)  # type: ignore[no-any-return]


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _find_rows(arguments: int, pages: int, item: int, head: int, block: int, rows: int) -> None:
    """Addresses of the keys (or values) in `pages` that an item reads in one block; the last is repeated up to a multiple of 8."""
    sequence, first = load_i64(item), block * _KEY_BLOCK
    keys = min(_KEY_BLOCK, load_i64(item + 24) + load_i64(item + 16) - first)
    page_size = _argument(arguments, _PAGE_SIZE)
    stride, page_stride = _argument(arguments, _KEY_STRIDE), _argument(arguments, _PAGE_STRIDE)
    table = _argument(arguments, _TABLE) + sequence * _argument(arguments, _TABLE_ROW)
    base = pages + head * _argument(arguments, _HEAD_STRIDE)
    page = first // page_size
    within = first - page * page_size
    address = base
    i = 0
    while i < keys:
        address = base + load_i32(table + 4 * page) * page_stride + within * stride
        count = min(page_size - within, keys - i)
        for _ in range(count):
            store_i64(rows + 8 * i, address)
            address += stride
            i += 1
        page += 1
        within = 0
    address -= stride
    while i % 8 != 0:
        store_i64(rows + 8 * i, address)
        i += 1


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _first_block(arguments: int, item: int) -> int:
    """The first block of an item's part that any of its queries sees."""
    window = _argument(arguments, _WINDOW)
    seen = max(0, load_i64(item + 24) + 1 - window) // _KEY_BLOCK if window > 0 else 0
    return max(load_i64(item + 32), seen)


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _find_next(arguments: int, item: int, head: int, block: int, rows: int) -> bool:
    """Addresses of the keys that will probably be read after this block: the item's next block, or the next task's first."""
    if block + 1 < load_i64(item + 40):
        _find_rows(arguments, _argument(arguments, _K), item, head, block + 1, rows)
        return True
    task, heads = load_i64(arguments), _argument(arguments, _KV_HEADS)
    if task >= _argument(arguments, _NUM_TASKS):
        return False
    other = _argument(arguments, _ITEMS) + task // heads * _ITEM_BYTES
    first = _first_block(arguments, other)
    if first >= load_i64(other + 40):
        return False
    _find_rows(arguments, _argument(arguments, _K), other, task % heads, first, rows)
    return True


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _weights(arguments: int, scores: int, rows: int, first_row: int, ahead: int, keys: int, begin: int, end: int, result: int) -> None:
    """Turn `rows` rows of scores, columns begin..end, into softmax weights; greatest and sum of each row go to `result`.

    `ahead` is how many of the block's keys the task's first query may see; each further query may see one more.
    """
    group = _argument(arguments, _GROUP)
    window = _argument(arguments, _WINDOW)
    capped = _argument(arguments, _CAP) != 0
    for r in range(rows):
        row = scores + r * _SCORE_ROW
        visible = ahead + (first_row + r) // group
        stop = max(begin, min(visible, keys))
        start = begin
        if window > 0:
            start = min(end, max(begin, visible - window))
        if capped:
            inverse, scale = load_f32(arguments + 8 * _CAP_INVERSE), load_f32(arguments + 8 * _CAP_SCALE)
            cap_scores(row + 4 * begin, end - begin, inverse, scale)
        for c in range(begin, start):
            store_f32(row + 4 * c, _MINUS_INFINITY)
        for c in range(stop, end):
            store_f32(row + 4 * c, _MINUS_INFINITY)
        softmax_row(row + 4 * begin, end - begin, result + 8 * r)


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _merge(running: int, state: int, part: int, greatest: float, total: float, dim: int) -> None:
    """Merge one block's result of one row into the row's running result; `state` holds its greatest score and its sum."""
    if greatest == _MINUS_INFINITY:
        return
    old = load_f32(state)
    new = max(old, greatest)
    keep = exp2(old - new)
    weight = exp2(greatest - new)
    store_f32(state, new)
    store_f32(state + 4, load_f32(state + 4) * keep + total * weight)
    blend(running, keep, part, weight, dim)


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _start_rows(running: int, state: int, rows: int, dim: int) -> None:
    for i in range(rows * dim):
        store_f32(running + 4 * i, np.float32(0.0))
    for r in range(rows):
        store_f32(state + 8 * r, _MINUS_INFINITY)
        store_f32(state + 8 * r + 4, np.float32(0.0))


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _write_rows(arguments: int, item: int, head: int, rows: int, running: int, state: int) -> None:
    dim, group = _argument(arguments, _DIM), _argument(arguments, _GROUP)
    for r in range(rows):
        i = r // group
        target = _argument(arguments, _OUT) + (load_i64(item + 8) + i) * _argument(arguments, _OUT_ROW)
        target += (head * group + r - i * group) * dim * 4
        scale_row(running + r * dim * 4, np.float32(1.0) / load_f32(state + 8 * r + 4), target, dim)


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _merge_parts(arguments: int, item: int, head: int, rows: int, first_block: int, blocks: int, partials: int, scratch: int) -> None:
    """Merge what all tasks of one query block left, in order, and write the rows."""
    dim = _argument(arguments, _DIM)
    part_row = 4 * dim + 8
    running, state = scratch, scratch + rows * dim * 4
    _start_rows(running, state, rows, dim)
    for block in range(first_block, blocks):
        for r in range(rows):
            part = partials + (block * rows + r) * part_row
            _merge(running + r * dim * 4, state + 8 * r, part, load_f32(part + 4 * dim), load_f32(part + 4 * dim + 4), dim)
    _write_rows(arguments, item, head, rows, running, state)


def _make_body(dtype: BDtype) -> Any:
    score_tiles = make_row_tiles(vectors=2, dtype="float32")
    wide_tiles = make_gather_tiles(vectors=2, dtype=dtype)
    narrow_tile = make_gather_tile(rows=1, vectors=1, dtype=dtype, width=8)
    few_tiles = make_few_row_tiles(dtype)
    transpose = make_transpose(dtype)
    size = 4 if dtype == "float32" else 2

    @numba.njit(inline="always")  # type: ignore[untyped-decorator]
    def score_block(arguments: int, scores: int, q: int, rows: int, k_rows: int, v_rows: int, keys: int, ahead: int, panel: int) -> None:
        """scores[rows, keys] = q @ k.T, a panel of keys at a time; tiles of which no row sees a key are left out."""
        dim, group = _argument(arguments, _DIM), _argument(arguments, _GROUP)
        window = _argument(arguments, _WINDOW) if _argument(arguments, _WINDOW) > 0 else 1 << 40
        for first in range(max(0, ahead - window) // _PANEL * _PANEL, keys, _PANEL):
            for c in range(0, min(_PANEL, keys - first), 8):
                transpose(k_rows + 8 * (first + c), v_rows + 8 * (first + c), dim, panel + 4 * c, 4 * _PANEL)
            for r in range(0, rows, _MAX_ROWS):
                count = min(_MAX_ROWS, rows - r)
                stop = min(keys, ahead + (r + count - 1) // group)
                start = ahead + r // group - window
                if first < stop and start < first + _PANEL:
                    target = scores + r * _SCORE_ROW + 4 * first
                    score_tiles(count, q + r * dim * 4, 4 * dim, panel, 4 * _PANEL, target, _SCORE_ROW, dim, 0)

    @numba.njit(inline="always")  # type: ignore[untyped-decorator]
    def add_values(rows: int, weights: int, v_rows: int, ahead: int, depth: int, target: int, target_row: int, dim: int) -> None:
        """target[rows, dim] = weights[rows, depth] @ v"""
        column = 0
        while rows <= _FEW_ROWS and column + 2 * _COLUMNS <= dim:
            few_tiles(rows, weights, _SCORE_ROW, v_rows, ahead, column * size, target + 4 * column, target_row, depth)
            column += 2 * _COLUMNS
        while column + _COLUMNS <= dim:
            wide_tiles(rows, weights, _SCORE_ROW, v_rows, ahead, column * size, target + 4 * column, target_row, depth)
            column += _COLUMNS
        while column < dim:
            for r in range(rows):  # only where dim is no multiple of a tile's columns
                place = target + r * target_row + 4 * column
                narrow_tile(weights + r * _SCORE_ROW, 0, v_rows, v_rows, column * size, place, 0, depth)
            column += 8

    @numba.njit(inline="always")  # type: ignore[untyped-decorator]
    def run_task(arguments: int, item: int, head: int, scratch: int) -> None:
        dim, group = _argument(arguments, _DIM), _argument(arguments, _GROUP)
        window = _argument(arguments, _WINDOW)
        first_token, queries, position = load_i64(item + 8), load_i64(item + 16), load_i64(item + 24)
        end_block, parts = load_i64(item + 40), load_i64(item + 56)
        rows = queries * group
        blocks = (position + queries + _KEY_BLOCK - 1) // _KEY_BLOCK
        part_row = 4 * dim + 8
        partials = (
            _argument(arguments, _PARTIALS) + (load_i64(item + 64) * _argument(arguments, _KV_HEADS) + head * blocks * rows) * part_row
        )
        # scratch
        k_rows = scratch
        v_rows = k_rows + 8 * _KEY_BLOCK
        panel = v_rows + 8 * _KEY_BLOCK
        tile = panel + 4 * dim * _PANEL
        tile_state = tile + 4 * _MAX_ROWS * dim
        state = tile_state + 64
        q = state + 8 * rows
        running = q + 4 * rows * dim
        scores = running + 4 * rows * dim
        for r in range(rows):
            i = r // group
            source = _argument(arguments, _Q) + (first_token + i) * _argument(arguments, _Q_ROW) + (head * group + r - i * group) * dim * 4
            scale_row(source, load_f32(arguments + 8 * _SCALE), q + r * dim * 4, dim)
        _start_rows(running, state, rows, dim)
        first_block = _first_block(arguments, item)
        if first_block < end_block:
            _find_rows(arguments, _argument(arguments, _K), item, head, first_block, k_rows)
        for block in range(first_block, end_block):
            first = block * _KEY_BLOCK
            keys = min(_KEY_BLOCK, position + queries - first)
            ahead = position + 1 - first
            _find_rows(arguments, _argument(arguments, _V), item, head, block, v_rows)
            score_block(arguments, scores, q, rows, k_rows, v_rows, keys, ahead, panel)
            following = k_rows if _find_next(arguments, item, head, block, k_rows) else v_rows
            for r in range(0, rows, _MAX_ROWS):
                count = min(_MAX_ROWS, rows - r)
                stop = min(keys, ahead + (r + count - 1) // group)
                begin = max(0, ahead + r // group - window) if window > 0 else 0
                part = partials + (block * rows + r) * part_row
                if stop <= begin:
                    if parts > 1:
                        for i in range(count):
                            store_f32(part + i * part_row + 4 * dim, _MINUS_INFINITY)
                    continue
                begin = begin // _COLUMNS * _COLUMNS
                end = (stop + _COLUMNS - 1) // _COLUMNS * _COLUMNS
                tile_scores = scores + r * _SCORE_ROW
                _weights(arguments, tile_scores, count, r, ahead, keys, begin, end, tile_state)
                target, target_row = (part, part_row) if parts > 1 else (tile, 4 * dim)
                add_values(count, tile_scores + 4 * begin, v_rows + 8 * begin, following, stop - begin, target, target_row, dim)
                for i in range(count):
                    greatest, total = load_f32(tile_state + 8 * i), load_f32(tile_state + 8 * i + 4)
                    if parts > 1:
                        store_f32(part + i * part_row + 4 * dim, greatest)
                        store_f32(part + i * part_row + 4 * dim + 4, total)
                    else:
                        _merge(running + (r + i) * dim * 4, state + 8 * (r + i), tile + i * dim * 4, greatest, total, dim)
        if parts == 1:
            _write_rows(arguments, item, head, rows, running, state)
            return
        counter = _argument(arguments, _COUNTERS) + 8 * (load_i64(item + 48) * _argument(arguments, _KV_HEADS) + head)
        if _arrive(counter) == parts - 1:
            store_i64(counter, 0)  # for the next call
            seen = max(0, position + 1 - window) // _KEY_BLOCK if window > 0 else 0
            _merge_parts(arguments, item, head, rows, seen, blocks, partials, scratch)

    @numba.njit(inline="always")  # type: ignore[untyped-decorator]
    def body(arguments: int) -> None:
        slot = fetch_add(arguments + 8 * _SLOT, 1)
        scratch = _argument(arguments, _WORKSPACE) + slot * _argument(arguments, _WORKSPACE_BYTES)
        heads, tasks = _argument(arguments, _KV_HEADS), _argument(arguments, _NUM_TASKS)
        while True:
            task = fetch_add(arguments, 1)
            if task >= tasks:
                break
            run_task(arguments, _argument(arguments, _ITEMS) + task // heads * _ITEM_BYTES, task % heads, scratch)

    return body


_bf16_body = _make_body("bfloat16")  # not made inside _kernel: Numba's cache does not recognise a function made anew
_f16_body = _make_body("float16")
_f32_body = _make_body("float32")


@functools.cache
def _kernel(dtype: torch.dtype) -> Kernel:
    if dtype == torch.bfloat16:

        @numba.cfunc(KERNEL_SIGNATURE, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
        def attention_bf16(arguments):  # type: ignore[no-untyped-def]
            _bf16_body(arguments)

        return Kernel(attention_bf16)
    if dtype == torch.float16:

        @numba.cfunc(KERNEL_SIGNATURE, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
        def attention_f16(arguments):  # type: ignore[no-untyped-def]
            _f16_body(arguments)

        return Kernel(attention_f16)

    @numba.cfunc(KERNEL_SIGNATURE, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def attention_f32(arguments):  # type: ignore[no-untyped-def]
        _f32_body(arguments)

    return Kernel(attention_f32)


class _Scratch(threading.local):
    """Each calling thread's scratch, kept between calls and grown when a call needs more."""

    def __init__(self) -> None:
        self.workspace = torch.empty(0)
        self.partials = torch.empty(0)
        self.counters = torch.empty(0, dtype=torch.int64)


_scratch = _Scratch()


@functools.lru_cache(maxsize=256)
def _workspace_floats(group: int, dim: int) -> int:
    """Scratch of one thread (see run_task), or of the merge."""
    rows = max(1, MAX_QUERY_ROWS // group) * group
    floats = 4 * KEY_BLOCK + dim * _PANEL + MAX_ROWS * dim + 16 + 2 * rows + 2 * rows * dim + rows * _SCORE_ROW // 4
    return -(-floats // 64) * 64 + 64


@functools.lru_cache(maxsize=256)
def _float_bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    work: Tensor,
    partial_rows: int,
    threads: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    out: Tensor,
) -> None:
    """The contract of kernels/paged_attention.py, checked there; `work` and `partial_rows` as attention_work.divide made them."""
    _, kv_heads, page_size, dim = k_pages.shape
    page_stride, head_stride, key_stride, _ = k_pages.stride()
    size = k_pages.element_size()
    group = q.shape[1] // kv_heads
    floats = _workspace_floats(group, dim)
    scratch = _scratch
    if scratch.workspace.numel() < floats * threads:
        scratch.workspace = torch.empty(floats * threads)
    if partial_rows:
        if scratch.partials.numel() < partial_rows * kv_heads * (dim + 2):
            scratch.partials = torch.empty(partial_rows * kv_heads * (dim + 2))
        if scratch.counters.numel() < work.shape[0] * kv_heads:
            scratch.counters = torch.zeros(work.shape[0] * kv_heads, dtype=torch.int64)
    _kernel(k_pages.dtype)(
        threads,
        0,
        work.data_ptr(),
        work.shape[0] * kv_heads,
        kv_heads,
        group,
        dim,
        q.data_ptr(),
        q.stride(0) * 4,
        out.data_ptr(),
        out.stride(0) * 4,
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        page_stride * size,
        head_stride * size,
        key_stride * size,
        page_size,
        page_table.data_ptr(),
        page_table.stride(0) * 4,
        _float_bits(scale * _LOG2E if soft_cap is None else scale),
        sliding_window or 0,
        0 if soft_cap is None else 1,
        0 if soft_cap is None else _float_bits(1.0 / soft_cap),
        0 if soft_cap is None else _float_bits(soft_cap * _LOG2E),
        scratch.workspace.data_ptr(),
        floats * 4,
        scratch.partials.data_ptr(),
        scratch.counters.data_ptr(),
    )
