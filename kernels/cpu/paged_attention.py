"""Paged attention on the CPU: blocks of keys, transposed in registers' reach, against tiles of queries. Knows no plan's making.

One path serves decoding, verification and prompts. A task holds up to MAX_QUERY_ROWS rows (queries times the heads that share a
key head). For each block of KEY_BLOCK keys it transposes one panel of keys at a time into scratch (for the register tile), fills the
rows' scores, takes each row's softmax within the block, multiplies with the values where they lie, and merges the block into
the rows' running results. Blocks are cut at absolute positions and merged in order; where several tasks share a sequence's blocks
(long contexts, few sequences) each leaves its blocks' results in scratch and the last to finish merges them all in the same order.
Hence a row's bits depend on nothing but its own inputs. (They do depend on the width of the machine's vectors.)

Codes of quantized pages become numbers in registers. Their scales are multiplied where there are fewest numbers: a key's into its
scores, a value's into its softmax weights.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .address import argument, load_f32, load_i64, store_f32, store_i64
from .atomics import arrive, fetch_add
from .attention_block import MINUS_INFINITY, PANEL, SCORE_ROW, make_add_values, make_score_block, weights
from .attention_pages import (
    COUNTERS,
    DIM,
    FACTOR,
    GROUP,
    ITEM_BYTES,
    ITEMS,
    KV_HEADS,
    NUM_TASKS,
    OUT,
    OUT_ROW,
    PARTIALS,
    Q_ROW,
    SLOT,
    WINDOW,
    WORKSPACE,
    WORKSPACE_BYTES,
    K,
    Q,
    V,
    find_next,
    find_rows,
    first_block,
)
from .attention_vectors import SIZE, KVDtype, blend, gather_scales, multiply, scale_row
from .attention_work import KEY_BLOCK, MAX_QUERY_ROWS
from .elementwise import float_bits
from .threads import KERNEL_SIGNATURE, Kernel
from .tile import COLUMNS, MAX_ROWS, specialised
from .vector_math import exp2

_LOG2E = 1.4426950408889634


@numba.njit(nogil=True, error_model="numpy")
def _merge(arguments: int, running: int, state: int, part: int, greatest: float, total: float) -> None:
    """Merge one block's result of one row into the row's running result; `state` holds its greatest score and its sum."""
    if greatest == MINUS_INFINITY:
        return
    old = load_f32(state)
    new = max(old, greatest)
    factor = load_f32(arguments + 8 * FACTOR)
    keep = exp2((old - new) * factor)
    weight = exp2((greatest - new) * factor)
    store_f32(state, new)
    store_f32(state + 4, load_f32(state + 4) * keep + total * weight)
    blend(running, keep, part, weight, argument(arguments, DIM))


@numba.njit(nogil=True, error_model="numpy")
def _start_rows(running: int, state: int, rows: int, dim: int) -> None:
    for i in range(rows * dim):
        store_f32(running + 4 * i, np.float32(0.0))
    for r in range(rows):
        store_f32(state + 8 * r, MINUS_INFINITY)
        store_f32(state + 8 * r + 4, np.float32(0.0))


@numba.njit(nogil=True, error_model="numpy")
def _write_rows(arguments: int, item: int, head: int, rows: int, running: int, state: int) -> None:
    dim, group = argument(arguments, DIM), argument(arguments, GROUP)
    for r in range(rows):
        i = r // group
        target = argument(arguments, OUT) + (load_i64(item + 8) + i) * argument(arguments, OUT_ROW)
        target += (head * group + r - i * group) * dim * 4
        scale_row(running + r * dim * 4, np.float32(1.0) / load_f32(state + 8 * r + 4), target, dim)


@numba.njit(nogil=True, error_model="numpy")
def _layout(scratch: int, rows: int, dim: int) -> tuple[int, int, int, int, int, int, int, int, int]:
    """Where in a thread's scratch things lie; `_workspace_floats` gives its size."""
    k_rows = scratch
    v_rows = k_rows + 8 * KEY_BLOCK
    panel = v_rows + 12 * KEY_BLOCK  # with room for the values' scales before it, and for the keys' behind it
    tile = panel + 4 * (dim + 1) * PANEL
    tile_state = tile + 4 * MAX_ROWS * max(dim, PANEL)
    state = tile_state + 64
    q = state + 8 * rows
    running = q + 4 * rows * dim
    return k_rows, v_rows, panel, tile, tile_state, state, q, running, running + 4 * rows * dim


@numba.njit(nogil=True, error_model="numpy")
def _partials(arguments: int, item: int, head: int) -> int:
    """Where the parts of an item's query block leave their results: for each block and row `dim` sums, the greatest score, its sum."""
    queries = load_i64(item + 16)
    blocks = (load_i64(item + 24) + queries + KEY_BLOCK - 1) // KEY_BLOCK
    row = load_i64(item + 64) * argument(arguments, KV_HEADS) + head * blocks * queries * argument(arguments, GROUP)
    return argument(arguments, PARTIALS) + row * (4 * argument(arguments, DIM) + 8)


@numba.njit(nogil=True, error_model="numpy")
def _load_queries(arguments: int, item: int, head: int, q: int) -> None:
    dim, group = argument(arguments, DIM), argument(arguments, GROUP)
    for r in range(load_i64(item + 16) * group):
        i = r // group
        source = argument(arguments, Q) + (load_i64(item + 8) + i) * argument(arguments, Q_ROW)
        source += (head * group + r - i * group) * dim * 4
        scale_row(source, np.float32(1.0), q + r * dim * 4, dim)


@numba.njit(nogil=True, error_model="numpy")
def _merge_parts(arguments: int, item: int, head: int, scratch: int) -> None:
    """Merge what all parts of one query block left, in order, and write the rows."""
    dim, window = argument(arguments, DIM), argument(arguments, WINDOW)
    queries, position = load_i64(item + 16), load_i64(item + 24)
    rows = queries * argument(arguments, GROUP)
    part_row = 4 * dim + 8
    partials = _partials(arguments, item, head)
    running, state = scratch, scratch + rows * dim * 4
    _start_rows(running, state, rows, dim)
    first = max(0, position + 1 - window) // KEY_BLOCK if window > 0 else 0
    for block in range(first, (position + queries + KEY_BLOCK - 1) // KEY_BLOCK):
        for r in range(rows):
            part = partials + (block * rows + r) * part_row
            _merge(arguments, running + r * dim * 4, state + 8 * r, part, load_f32(part + 4 * dim), load_f32(part + 4 * dim + 4))
    _write_rows(arguments, item, head, rows, running, state)


@numba.njit(nogil=True, error_model="numpy")
def _finish(arguments: int, item: int, head: int, scratch: int) -> None:
    """Write the rows of an item that has no other part; else count the part, and let the last one merge them."""
    dim, parts = argument(arguments, DIM), load_i64(item + 56)
    rows = load_i64(item + 16) * argument(arguments, GROUP)
    if parts == 1:
        _, _, _, _, _, state, _, running, _ = _layout(scratch, rows, dim)
        _write_rows(arguments, item, head, rows, running, state)
        return
    counter = argument(arguments, COUNTERS) + 8 * (load_i64(item + 48) * argument(arguments, KV_HEADS) + head)
    if arrive(counter) == parts - 1:
        store_i64(counter, 0)  # for the next call
        _merge_parts(arguments, item, head, scratch)


def _make_attend_block(dtype: KVDtype) -> Any:
    score_block = make_score_block(dtype)
    add_values = make_add_values(dtype)
    quantized = SIZE[dtype] == 1

    @numba.njit(inline="always")
    @specialised(dtype)
    def attend_block(arguments: int, item: int, head: int, block: int, scratch: int) -> None:
        """One block for all rows of an item; k_rows in scratch already holds the block's keys, and will hold the next one's."""
        dim, group, window = argument(arguments, DIM), argument(arguments, GROUP), argument(arguments, WINDOW)
        queries, position, parts = load_i64(item + 16), load_i64(item + 24), load_i64(item + 56)
        rows = queries * group
        k_rows, v_rows, panel, tile, tile_state, state, q, running, scores = _layout(scratch, rows, dim)
        keys = min(KEY_BLOCK, position + queries - block * KEY_BLOCK)
        ahead = position + 1 - block * KEY_BLOCK
        find_rows(arguments, argument(arguments, V), item, head, block, v_rows)
        score_block(arguments, scores, q, rows, k_rows, v_rows, keys, ahead, panel, tile)
        v_scales = v_rows + 8 * KEY_BLOCK
        if quantized:
            gather_scales(v_rows, keys, dim, v_scales)
        following = k_rows if find_next(arguments, item, head, block, k_rows) else v_rows
        target, target_row = tile, 4 * dim
        partials = _partials(arguments, item, head)
        for r in range(0, rows, MAX_ROWS):
            count = min(MAX_ROWS, rows - r)
            stop = min(keys, ahead + (r + count - 1) // group)
            begin = max(0, ahead + r // group - window) // COLUMNS * COLUMNS if window > 0 else 0
            if parts > 1:
                target_row = 4 * dim + 8
                target = partials + (block * rows + r) * target_row
            if stop > begin:
                row = scores + r * SCORE_ROW
                end = (stop + COLUMNS - 1) // COLUMNS * COLUMNS
                weights(arguments, row, count, r, ahead, keys, begin, end, tile_state)
                if quantized:
                    for i in range(count):
                        multiply(row + i * SCORE_ROW + 4 * begin, v_scales + 4 * begin, end - begin)
                add_values(count, row + 4 * begin, v_rows + 8 * begin, following, stop - begin, target, target_row, dim)
            for i in range(count):
                greatest, total = load_f32(tile_state + 8 * i), load_f32(tile_state + 8 * i + 4)
                if stop <= begin:
                    greatest = MINUS_INFINITY
                if parts > 1:
                    store_f32(target + i * target_row + 4 * dim, greatest)
                    store_f32(target + i * target_row + 4 * dim + 4, total)
                else:
                    _merge(arguments, running + (r + i) * dim * 4, state + 8 * (r + i), tile + i * dim * 4, greatest, total)

    return attend_block


def _make_body(dtype: KVDtype) -> Any:
    attend_block = _make_attend_block(dtype)

    @numba.njit(inline="always")
    @specialised(dtype)
    def run_task(arguments: int, item: int, head: int, scratch: int) -> None:
        dim, rows = argument(arguments, DIM), load_i64(item + 16) * argument(arguments, GROUP)
        k_rows, _, _, _, _, state, q, running, _ = _layout(scratch, rows, dim)
        _load_queries(arguments, item, head, q)
        _start_rows(running, state, rows, dim)
        first, end = first_block(arguments, item), load_i64(item + 40)
        if first < end:
            find_rows(arguments, argument(arguments, K), item, head, first, k_rows)
        for block in range(first, end):
            attend_block(arguments, item, head, block, scratch)
        _finish(arguments, item, head, scratch)

    @numba.njit(inline="always")
    @specialised(dtype)
    def body(arguments: int) -> None:
        slot = fetch_add(arguments + 8 * SLOT, 1)
        scratch = argument(arguments, WORKSPACE) + slot * argument(arguments, WORKSPACE_BYTES)
        heads, tasks = argument(arguments, KV_HEADS), argument(arguments, NUM_TASKS)
        while True:
            task = fetch_add(arguments, 1)
            if task >= tasks:
                break
            run_task(arguments, argument(arguments, ITEMS) + task // heads * ITEM_BYTES, task % heads, scratch)

    return body


# Made here and not inside _kernel: Numba's cache does not recognise functions made anew.
_bf16_body = _make_body("bfloat16")
_f16_body = _make_body("float16")
_f32_body = _make_body("float32")
_int8_body = _make_body("int8")
_e4m3_body = _make_body("float8_e4m3fn")
_e5m2_body = _make_body("float8_e5m2")


@functools.cache
def _kernel(dtype: torch.dtype) -> Kernel:
    """The kernel for pages of plain numbers, or of codes of `dtype`."""
    return Kernel(_COMPILERS[dtype]())


def _compile_bf16() -> Any:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True, error_model="numpy")
    def attention_bf16(arguments):
        _bf16_body(arguments)

    return attention_bf16


def _compile_f16() -> Any:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True, error_model="numpy")
    def attention_f16(arguments):
        _f16_body(arguments)

    return attention_f16


def _compile_f32() -> Any:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True, error_model="numpy")
    def attention_f32(arguments):
        _f32_body(arguments)

    return attention_f32


def _compile_int8() -> Any:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True, error_model="numpy")
    def attention_int8(arguments):
        _int8_body(arguments)

    return attention_int8


def _compile_e4m3() -> Any:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True, error_model="numpy")
    def attention_e4m3(arguments):
        _e4m3_body(arguments)

    return attention_e4m3


def _compile_e5m2() -> Any:
    @numba.cfunc(KERNEL_SIGNATURE, cache=True, error_model="numpy")
    def attention_e5m2(arguments):
        _e5m2_body(arguments)

    return attention_e5m2


_COMPILERS = {
    torch.bfloat16: _compile_bf16,
    torch.float16: _compile_f16,
    torch.float32: _compile_f32,
    torch.int8: _compile_int8,
    torch.float8_e4m3fn: _compile_e4m3,
    torch.float8_e5m2: _compile_e5m2,
}


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
    floats = 5 * KEY_BLOCK + (dim + 1) * PANEL + MAX_ROWS * max(dim, PANEL) + 16 + 2 * rows + 2 * rows * dim + rows * SCORE_ROW // 4
    return -(-floats // 64) * 64 + 64


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    kv_dtype: torch.dtype,
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
    _, kv_heads, page_size, _ = k_pages.shape
    dim = q.shape[2]
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
    _kernel(kv_dtype)(
        threads,
        0,
        work.data_ptr(),
        work.shape[0] * kv_heads,
        kv_heads,
        group,
        dim,
        q.data_ptr(),
        q.stride()[0] * 4,
        out.data_ptr(),
        out.stride()[0] * 4,
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        page_stride * size,
        head_stride * size,
        key_stride * size,
        page_size,
        page_table.data_ptr(),
        page_table.stride()[0] * 4,
        float_bits(scale * _LOG2E if soft_cap is None else _LOG2E),
        sliding_window or 0,
        0 if soft_cap is None else float_bits(soft_cap),
        0 if soft_cap is None else float_bits(scale / soft_cap),
        scratch.workspace.data_ptr(),
        floats * 4,
        scratch.partials.data_ptr(),
        scratch.counters.data_ptr(),
    )
