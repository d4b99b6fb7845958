"""Sums of parts of K computed by different blocks, added in one order whoever comes last. Knows no operation.

Each block of a tile leaves its float32 partial sums in a workspace and counts itself; the last to arrive adds all of them from the
first part to the last, so that the same inputs give the same bits. It also sets the counter back, for the next launch or replay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import Tile
from .device import Device
from .workspace import MAX_TILES


@triton.jit
def add_parts(total, parts, arrived, tile, part, num_parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This block's `total` [ROWS, COLUMNS] is one of `num_parts`: gives (the sum of all, whether this block is the last to arrive)."""
    cells = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    place = parts + tile.to(tl.int64) * num_parts * (ROWS * COLUMNS)
    tl.store(place + part * (ROWS * COLUMNS) + cells, total)
    tl.debug_barrier()  # every thread has stored before one of them counts
    is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == num_parts - 1
    if is_last:
        total = tl.zeros_like(total)
        for other in range(num_parts):
            total += tl.load(place + other * (ROWS * COLUMNS) + cells, cache_modifier=".cg")
        tl.store(arrived + tile, 0)
    return total, is_last


def workspace_bytes(*, tiles: int, num_parts: int, block_m: int, block_n: int) -> int:
    """Bytes of partial sums of one launch; nothing where K is not split."""
    return tiles * num_parts * block_m * block_n * 4 if num_parts > 1 else 0


def parts_of(tile: Tile, device: Device, m: int, n: int, k: int, *, steps: int) -> tuple[int, int]:
    """Parts that K, of `steps` steps, is cut into, none of them empty, and tiles of the output [m, n].

    Raises ValueError where rows are fixed and there are more tiles than counters: another number of parts would give other bits.
    """
    tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
    wanted = tile.splits(device, m, n, k)
    if tiles > MAX_TILES and wanted > 1:
        if device.fixed_rows:
            raise ValueError(f"{m} rows at once are too many to sum in fixed parts: lower --chunked-prefill-size")
        wanted = 1
    return -(-steps // -(-steps // wanted)), tiles
