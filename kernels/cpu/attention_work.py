"""Cut a step's attention into tasks of like size for a thread team. Knows lengths alone: no tensor of queries, keys or values.

A task is one work item for one key head: a run of queries of one sequence against a run of key blocks. Key blocks are cut at
absolute positions (multiples of KEY_BLOCK), each block's softmax stands alone, and blocks are merged in order of position whether
one task walks them all or several tasks leave partial results. So how work is cut never changes a bit of the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .threads import team_size

KEY_BLOCK: Final = 256
MAX_QUERY_ROWS: Final = 96  # queries times heads of a group that one task holds in the second-level cache
ITEM_FIELDS: Final = 9  # sequence, first row of q, queries, position of the first, first block, end block, group, parts, first partial row
_TASKS_PER_THREAD: Final = 4
_ROW_COST: Final = 0.12  # one row's arithmetic for a key, against reading that key and its value
_SERIAL_COST: Final = 256.0  # keys read by all heads: below this a team costs more than it gains

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Work:
    """`items` int64 [n, ITEM_FIELDS], dearest first; `partial_rows` rows of scratch for one key head's partial results."""

    items: _Ints
    partial_rows: int
    threads: int


def divide(query_start: npt.NDArray[Any], context_len: npt.NDArray[Any], *, num_heads: int, num_kv_heads: int, head_dim: int) -> Work:
    """The task list for one step. Sequences without queries get none."""
    group = num_heads // num_kv_heads
    start = query_start.astype(np.int64)
    context = context_len.astype(np.int64)
    count = start[1:] - start[:-1]
    if count.size and (int(np.min(count)) < 0 or int(np.min(context - count)) < 0):
        raise ValueError("query_start must not fall, and a context holds at least its own new tokens")
    # query blocks
    limit = max(1, MAX_QUERY_ROWS // group)
    blocks = -(-count // limit)
    sequence = np.repeat(np.arange(count.size), blocks)
    nth = np.arange(sequence.size) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    first = nth * limit
    queries = np.minimum(limit, count[sequence] - first)
    position = (context - count)[sequence] + first
    key_blocks = (position + queries + KEY_BLOCK - 1) // KEY_BLOCK
    cost = (position + queries) * (1 + _ROW_COST * group * queries)
    # split where one task would hold the others up
    threads = team_size()
    total = float(cost.sum()) * num_kv_heads
    if total * head_dim < _SERIAL_COST * 64:
        threads = 1
    parts = np.ones_like(key_blocks)
    if threads > 1:
        parts = np.clip(np.ceil(cost * (_TASKS_PER_THREAD * threads / total)).astype(np.int64), 1, key_blocks)
    items = np.zeros((sequence.size, ITEM_FIELDS), np.int64)
    for i, column in enumerate((sequence, start[sequence] + first, queries, position)):
        items[:, i] = column
    items[:, 5], items[:, 6], items[:, 7] = key_blocks, np.arange(sequence.size), parts
    if int(parts.sum()) > parts.size:
        return _split(items, cost / parts, np.where(parts > 1, key_blocks * queries * group, 0), threads)
    return Work(items[np.argsort(-cost, kind="stable")], 0, threads)


def _split(items: _Ints, cost: npt.NDArray[np.float64], rows: _Ints, threads: int) -> Work:
    """Give each part of an item its own row; `cost` is that of one part, `rows` what an item leaves in scratch."""
    items[:, 8] = np.cumsum(rows) - rows
    parts = items[:, 7]
    whole = np.repeat(np.arange(len(items)), parts)
    piece = np.arange(whole.size) - (np.cumsum(parts) - parts)[whole]
    split = items[whole]
    split[:, 4], split[:, 5] = piece * split[:, 5] // split[:, 7], (piece + 1) * split[:, 5] // split[:, 7]
    return Work(split[np.argsort(-cost[whole], kind="stable")], int(rows.sum()), threads)
