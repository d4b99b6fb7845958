"""Which parts of which sequences the blocks of an attention kernel take, decided on the device. Knows no keys and no values.

One small launch a step, used by every layer. Its sizes depend on numbers that the host knows anyway (sequences, tokens), and its
contents on lengths that only the device need have: so a captured graph is right for any lengths.

Decoding sequences (one query) are cut into splits of `chunk` keys, as many as fill the multiprocessors, whatever the lengths;
others into tiles of queries. An item is (sequence, its split or tile), sequence -1 where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import Device
from .launch import Launch

KEYS: Final = 64  # splits are multiples of so many keys
_LEAST_CHUNK: Final = 256  # keys that are worth a block of their own
_BLOCKS_PER_SM: Final = 4
_ITEMS: Final = 64  # items that a program of the plan's own kernel makes at most
_CELLS: Final = 1 << 15  # items times sequences that it holds: more would spill
MAX_SEQUENCES: Final = 4096


@dataclass(frozen=True, eq=False)
class Items:
    """items int32 [most, 2]; chunk int32 [1], keys of a split, 0 where items are tiles of `queries` queries."""

    items: Tensor
    chunk: Tensor
    queries: int

    @property
    def most(self) -> int:
        return self.items.shape[0]


@triton.jit(do_not_specialize=["num_sequences", "most", "wanted", "fixed_chunk", "least_queries"])
def _plan(
    query_start, context_len, items, chunk, num_sequences, most, wanted, fixed_chunk, least_queries,
    QUERIES: tl.constexpr, LEAST: tl.constexpr, KEYS: tl.constexpr, SEQUENCES: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    sequence = tl.arange(0, SEQUENCES)
    is_there = sequence < num_sequences
    start = tl.load(query_start + sequence, mask=is_there, other=0)
    num_queries = tl.load(query_start + sequence + 1, mask=is_there, other=0) - start
    context = tl.load(context_len + sequence, mask=is_there, other=0)
    if QUERIES == 0:
        context = tl.where(num_queries == 1, context, 0)
        size = tl.cdiv(tl.cdiv(tl.sum(context), wanted), KEYS) * KEYS
        size = tl.where(fixed_chunk > 0, fixed_chunk, tl.maximum(size, LEAST))
        count = tl.cdiv(context, size)
        if tl.program_id(0) == 0:
            tl.store(chunk, size)
    else:
        count = tl.where(num_queries >= least_queries, tl.cdiv(num_queries, QUERIES), 0)
    ends = tl.cumsum(count, 0)
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    is_past = ends[None, :] <= item[:, None]
    owner = tl.sum(is_past.to(tl.int32), 1)
    before = tl.max(tl.where(is_past, ends[None, :], 0), 1)
    is_item = item < tl.sum(count)
    tl.store(items + 2 * item, tl.where(is_item, owner, -1), mask=item < most)
    tl.store(items + 2 * item + 1, item - before, mask=item < most)


def most_splits(num_sequences: int, *, num_kv_heads: int, device: Device) -> int:
    """Items that decoding sequences have at most."""
    return num_sequences + _wanted(num_kv_heads, device)


def most_tiles(num_sequences: int, num_tokens: int, queries: int, *, least_queries: int = 2) -> int:
    """Tiles of `queries` queries that sequences of at least `least_queries` have at most, `num_tokens` in all."""
    return num_tokens // queries + min(num_sequences, num_tokens // least_queries)


def launch_splits(
    query_start: Tensor, context_len: Tensor, out: Items, *, num_kv_heads: int, device: Device, fixed_chunk: int = 0
) -> Launch:
    """The launch that fills `out` for the sequences with one query.

    query_start int32 [B + 1], context_len int32 [B]. `fixed_chunk` above 0: splits of so many keys whatever else is in the batch; then
    `out` must have room for all.
    """
    wanted = _wanted(num_kv_heads, device)
    return _launch(query_start, context_len, out, wanted, fixed_chunk, 0)


def launch_tiles(query_start: Tensor, context_len: Tensor, out: Items, *, least_queries: int = 2) -> Launch:
    """The launch that fills `out` for the sequences with at least `least_queries` queries."""
    return _launch(query_start, context_len, out, 1, 0, least_queries)


def _launch(query_start: Tensor, context_len: Tensor, out: Items, wanted: int, fixed_chunk: int, least_queries: int) -> Launch:
    num_sequences = context_len.shape[0]
    if num_sequences > MAX_SEQUENCES:
        raise ValueError(f"a step has at most {MAX_SEQUENCES} sequences, not {num_sequences}")
    args = (query_start, context_len, out.items, out.chunk, num_sequences, out.most, wanted, fixed_chunk, least_queries)
    sequences = max(16, triton.next_power_of_2(num_sequences))
    items = min(_ITEMS, _CELLS // sequences)
    options = {
        "QUERIES": out.queries, "LEAST": _LEAST_CHUNK, "KEYS": KEYS, "SEQUENCES": sequences, "ITEMS": items, "num_warps": 4,
        "num_stages": 1,
    }  # fmt: skip
    return Launch(_plan, (-(-out.most // items),), args, options)


def _wanted(num_kv_heads: int, device: Device) -> int:
    """Splits that fill the multiprocessors, over all sequences."""
    return -(-_BLOCKS_PER_SM * device.num_sms // num_kv_heads)


def empty_items(most: int, queries: int, device: torch.device) -> Items:
    """Room for a plan."""
    return Items(torch.empty(most, 2, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int32, device=device), queries)
