"""The kernel's arguments, and where the keys and values of a work item lie. Knows pages and no arithmetic on what is in them."""

from __future__ import annotations

from typing import Final

import numba

from .address import argument, load_i32, load_i64, store_i64
from .attention_work import ITEM_FIELDS, KEY_BLOCK

ITEM_BYTES: Final = 8 * ITEM_FIELDS

# Arguments, as int64 at 8 * index.
SLOT, ITEMS, NUM_TASKS, KV_HEADS, GROUP, DIM, Q, Q_ROW, OUT, OUT_ROW = range(2, 12)
K, V, PAGE_STRIDE, HEAD_STRIDE, KEY_STRIDE, PAGE_SIZE, TABLE, TABLE_ROW = range(12, 20)
FACTOR, WINDOW, CAP, CAP_FACTOR, WORKSPACE, WORKSPACE_BYTES, PARTIALS, COUNTERS = range(20, 28)


@numba.njit(nogil=True, error_model="numpy")
def find_rows(arguments: int, pages: int, item: int, head: int, block: int, rows: int) -> None:
    """Addresses of the keys (or values) in `pages` that an item reads in one block; the last is repeated up to a multiple of 8."""
    sequence, first = load_i64(item), block * KEY_BLOCK
    keys = min(KEY_BLOCK, load_i64(item + 24) + load_i64(item + 16) - first)
    page_size = argument(arguments, PAGE_SIZE)
    stride, page_stride = argument(arguments, KEY_STRIDE), argument(arguments, PAGE_STRIDE)
    table = argument(arguments, TABLE) + sequence * argument(arguments, TABLE_ROW)
    base = pages + head * argument(arguments, HEAD_STRIDE)
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


@numba.njit(nogil=True, error_model="numpy")
def first_block(arguments: int, item: int) -> int:
    """The first block of an item's part that any of its queries sees."""
    window = argument(arguments, WINDOW)
    seen = max(0, load_i64(item + 24) + 1 - window) // KEY_BLOCK if window > 0 else 0
    return max(load_i64(item + 32), seen)


@numba.njit(nogil=True, error_model="numpy")
def find_next(arguments: int, item: int, head: int, block: int, rows: int) -> bool:
    """Addresses of the keys that will probably be read after this block: the item's next block, or the next task's first."""
    if block + 1 < load_i64(item + 40):
        find_rows(arguments, argument(arguments, K), item, head, block + 1, rows)
        return True
    task, heads = load_i64(arguments), argument(arguments, KV_HEADS)
    if task >= argument(arguments, NUM_TASKS):
        return False
    other = argument(arguments, ITEMS) + task // heads * ITEM_BYTES
    first = first_block(arguments, other)
    if first >= load_i64(other + 40):
        return False
    find_rows(arguments, argument(arguments, K), other, task % heads, first, rows)
    return True
