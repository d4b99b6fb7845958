"""Attention over paged keys and values. The contract stands in kernels/paged_attention.py.

One kernel in two forms. A block holds one key-value head and BLOCK_M rows: queries times the heads that share it, so that keys are read
once for all of them. `splits`: one query, a part of the keys; parts are merged by log-sum-exp, by whoever comes last and in one order.
`tiles`: many queries, all keys before them.

Keys and values in one byte are codes with a float32 scale for each row. Codes become float16 exactly; a key's scale multiplies its
score; a value's scale multiplies its weight, as a part of the tile's greatest, so that float16 holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pages import split_rows
from .attention_plan import Items, empty_items, launch_splits, launch_tiles, most_splits, most_tiles
from .device import Device, device_of
from .launch import Launch
from .workspace import MAX_TILES, Workspace, workspace_of

_LOG2E = tl.constexpr(1.4426950408889634)
KINDS: Final[Mapping[torch.dtype | None, int]] = {torch.float8_e4m3fn: 1, torch.float8_e5m2: 2, torch.int8: 3}
_CONVERTED: Final = 4  # e4m3 that the GPU converts


@triton.jit
def _numbers(codes, KIND: tl.constexpr):
    """uint8 codes as float16 numbers, exactly: e4m3 of KIND 1 times 2 ** -8, all others as they are."""
    if KIND == 4:  # e4m3 where the GPU converts it
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    bits = codes.to(tl.uint16)
    if KIND == 1:  # e4m3: a shorter exponent in the same places
        return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    if KIND == 2:
        return (bits << 8).to(tl.float16, bitcast=True)
    return ((bits ^ 0x80) | 0x6400).to(tl.float16, bitcast=True) - 1152.0  # 1024 + unsigned code, less 1024 and 128


@triton.jit(do_not_specialize=["table_stride", "window"])
def _attend(
    q, k, v, k_scale, v_scale, out, items, chunk_of, query_start, context_len, page_table, parts, parts_stat, arrived,
    q_stride, out_stride, page_stride, head_stride, row_stride, scale_page_stride, scale_head_stride, scale_row_stride, table_stride,
    score_scale, soft_cap, window,
    SPLIT: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, KIND: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, OWN_SCALES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    item, kv_head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(items + 2 * item)
    if sequence < 0:
        return
    part = tl.load(items + 2 * item + 1)
    first_query = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - first_query
    context = tl.load(context_len + sequence)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    QUERIES: tl.constexpr = BLOCK_M // HEADS  # of a tile
    query = row // HEADS if SPLIT else part * QUERIES + row // HEADS
    is_row = (row < QUERIES * HEADS) & (query < num_queries)
    head = kv_head * HEADS + row % HEADS
    position = context - num_queries + query
    inside_d = column < DIM
    q_at = q + (first_query + query).to(tl.int64)[:, None] * q_stride + (head * DIM)[:, None] + column[None, :]
    queries = tl.load(q_at, mask=is_row[:, None] & inside_d[None, :], other=0.0)
    row_scale = tl.zeros((BLOCK_M,), tl.float32) + score_scale
    if KIND > 0:  # as float16, scaled to 1 at most
        wide = queries.to(tl.float32)
        greatest = tl.max(tl.abs(wide), 1)
        greatest = tl.where(greatest > 0.0, greatest, 1.0)
        queries = (wide / greatest[:, None]).to(tl.float16)
        row_scale *= greatest
        if KIND == 1:
            row_scale *= 256.0
    else:
        queries = queries.to(k.dtype.element_ty)
    least = 0
    if HAS_WINDOW:
        least = tl.maximum(tl.min(tl.where(is_row, position, context), 0) - window + 1, 0)
    begin, end = least // BLOCK_N * BLOCK_N, tl.minimum(tl.max(tl.where(is_row, position, 0), 0) + 1, context)
    num_parts = 1
    if SPLIT:
        chunk = tl.load(chunk_of)
        num_parts = tl.cdiv(context - begin, chunk)
        if part >= num_parts:
            return
        begin += part * chunk
        end = tl.minimum(begin + chunk, context)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    summed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    table = page_table + sequence.to(tl.int64) * table_stride
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        is_key = key < end
        page = tl.load(table + key // PAGE, mask=is_key, other=0).to(tl.int64)
        at = page * page_stride + kv_head * head_stride + (key % PAGE) * row_stride
        inside = is_key[:, None] & inside_d[None, :]
        keys = tl.load(k + at[:, None] + column[None, :], mask=inside, other=0)
        if KIND > 0:
            keys = _numbers(keys, KIND)
            scale_at = page * scale_page_stride + kv_head * scale_head_stride + (key % PAGE) * scale_row_stride
        score = tl.dot(queries, tl.trans(keys)) * row_scale[:, None]
        if KIND > 0:
            score *= tl.load(k_scale + scale_at, mask=is_key, other=0.0)[None, :]
        if HAS_CAP:  # cap * tanh(score / cap)
            score = soft_cap - 2.0 * soft_cap / (tl.exp2(score * (2.0 * _LOG2E / soft_cap)) + 1.0)
        is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
        if HAS_WINDOW:
            is_seen &= key[None, :] > position[:, None] - window
        score = tl.where(is_seen, score * _LOG2E, float("-inf"))
        now = tl.maximum(most, tl.max(score, 1))
        reached = tl.where(now == float("-inf"), 0.0, now)  # rows that have seen no key yet
        kept = tl.exp2(most - reached)
        weight = tl.exp2(score - reached[:, None])
        total = total * kept + tl.sum(weight, 1)
        values = tl.load(v + at[:, None] + column[None, :], mask=inside, other=0)
        if KIND > 0:
            scale = tl.load(v_scale + scale_at, mask=is_key, other=0.0)
            if OWN_SCALES:  # weights are rounded after the scale of no key but those that their query sees
                greatest_scale = tl.max(tl.where(is_seen, scale[None, :], 0.0), 1)
                greatest_scale = tl.where(greatest_scale > 0.0, greatest_scale, 1.0)[:, None]
                weight = tl.where(is_seen, weight * (scale[None, :] / greatest_scale), 0.0)
            else:
                greatest_scale = tl.max(scale, 0)
                weight = tl.where(is_seen, weight * (scale / greatest_scale)[None, :], 0.0)
            part_sum = tl.dot(weight.to(tl.float16), _numbers(values, KIND))
            summed = summed * kept[:, None] + part_sum * greatest_scale
        else:
            summed = tl.dot(weight.to(values.dtype), values, summed * kept[:, None])
        most = now
    if KIND == 1:
        summed *= 256.0
    if SPLIT:
        if num_parts > 1:
            # Every part leaves its sums, and counts itself; the last adds all from the first to the last.
            cells = row[:, None] * BLOCK_D + column[None, :]
            place = (item.to(tl.int64) * tl.num_programs(1) + kv_head) * (BLOCK_M * BLOCK_D)
            stat_place = (item.to(tl.int64) * tl.num_programs(1) + kv_head) * (2 * BLOCK_M)
            tl.store(parts + place + cells, summed)
            tl.store(parts_stat + stat_place + row, most)
            tl.store(parts_stat + stat_place + BLOCK_M + row, total)
            tl.debug_barrier()  # every thread has stored before one of them counts
            counter = arrived + sequence * tl.num_programs(1) + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") != num_parts - 1:
                return
            most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            summed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            first = (item - part).to(tl.int64)
            for other in range(num_parts):
                place = ((first + other) * tl.num_programs(1) + kv_head) * (BLOCK_M * BLOCK_D)
                stat_place = ((first + other) * tl.num_programs(1) + kv_head) * (2 * BLOCK_M)
                other_most = tl.load(parts_stat + stat_place + row, cache_modifier=".cg")
                other_total = tl.load(parts_stat + stat_place + BLOCK_M + row, cache_modifier=".cg")
                other_summed = tl.load(parts + place + cells, cache_modifier=".cg")
                now = tl.maximum(most, other_most)
                reached = tl.where(now == float("-inf"), 0.0, now)
                kept, added = tl.exp2(most - reached), tl.exp2(other_most - reached)
                total = total * kept + other_total * added
                summed = summed * kept[:, None] + other_summed * added[:, None]
                most = now
            tl.store(counter, 0)
    result = (summed / total[:, None]).to(out.dtype.element_ty)
    out_at = out + (first_query + query).to(tl.int64)[:, None] * out_stride + (head * DIM)[:, None] + column[None, :]
    tl.store(out_at, result, mask=is_row[:, None] & inside_d[None, :])


@dataclass(frozen=True, eq=False)
class Pages:
    """One layer's keys and values as the kernel reads them: [num_pages, Hkv, page_size, D], both with the same strides.

    bfloat16 or float16; or uint8 codes of `kind` with scales float32 [num_pages, Hkv, page_size], both with the same strides.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    kind: torch.dtype | None = None


@dataclass(frozen=True)
class Shape:
    """A block's rows, keys a step, warps and stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def split_shape(heads_per_kv: int, head_dim: int, *, quantized: bool) -> Shape:
    """For one query: the heads that share keys, padded to what matrix units take."""
    rows = max(16, triton.next_power_of_2(heads_per_kv))
    is_heavy = head_dim > 128 or (quantized and head_dim > 64)  # many registers: over twice the warps
    return Shape(rows, 64, 8 if is_heavy else 4, 2 if is_heavy or quantized else 3)


def tile_shape(heads_per_kv: int, head_dim: int, device: Device, *, quantized: bool) -> Shape:
    """For many queries."""
    has_groups = device.arch in (90, 100)  # warp groups' and tensor memory's units: rows by 64, and few registers
    rows, keys, num_warps = 128, 32 if quantized else 64, 8
    if head_dim > 128:
        rows, keys = (64 if quantized else 128, 32) if has_groups else (32 if quantized else 64, 32)
        num_warps = 4 if rows < 64 else 8
    elif quantized and head_dim > 64 and not has_groups:
        rows = 64
    return Shape(max(rows, triton.next_power_of_2(heads_per_kv)), keys, num_warps, 2)


def queries_per_tile(shape: Shape, heads_per_kv: int) -> int:
    """Queries of one tile."""
    return shape.block_m // heads_per_kv


def launch(
    q: Tensor, pages: Pages, query_start: Tensor, context_len: Tensor, page_table: Tensor, items: Items, shape: Shape, *, scale: float,
    out: Tensor, device: Device, workspace: Workspace, sliding_window: int | None = None, soft_cap: float | None = None,
    deterministic: bool = False,
) -> Launch:  # fmt: skip
    """The launch that fills the rows of `out` whose sequences `items` has.

    q and out [T, Hq, D] bfloat16 or float16, heads contiguous within a row; the rest as kernels/paged_attention.py says. `deterministic`:
    nothing of a key that a query does not see touches its bits. Raises ValueError for more sequences than there are counters of parts.
    """
    num_kv_heads, page_size, dim = pages.k.shape[1:]
    heads = q.shape[1] // num_kv_heads
    is_split = items.queries == 0
    block_d = max(16, triton.next_power_of_2(dim))
    floats = items.most * num_kv_heads * shape.block_m if is_split else 0
    if is_split and context_len.shape[0] * num_kv_heads > MAX_TILES:
        raise ValueError(f"{context_len.shape[0]} sequences of {num_kv_heads} key-value heads are more than {MAX_TILES} sums at a time")
    scratch = workspace.take("parts", 4 * floats * (block_d + 2)).view(torch.float32)
    scales = pages.k_scale
    args = (
        q, pages.k, pages.v, pages.k_scale, pages.v_scale, out, items.items, items.chunk, query_start, context_len, page_table,
        scratch[: floats * block_d], scratch[floats * block_d :], workspace.arrived, q.stride(0), out.stride(0), *pages.k.stride()[:3],
        *(scales.stride() if scales is not None else (0, 0, 0)), page_table.stride(0), scale, soft_cap or 0.0, sliding_window or 0,
    )  # fmt: skip
    options: dict[str, Any] = {
        "SPLIT": is_split, "HEADS": heads, "DIM": dim, "PAGE": page_size, "KIND": _kind(pages, device),
        "HAS_CAP": soft_cap is not None, "HAS_WINDOW": sliding_window is not None, "OWN_SCALES": deterministic, "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n, "BLOCK_D": block_d, "num_warps": shape.num_warps, "num_stages": shape.num_stages,
    }  # fmt: skip
    return Launch(_attend, (items.most, num_kv_heads), args, options)


def _kind(pages: Pages, device: Device) -> int:
    if pages.kind == torch.float8_e4m3fn and device.has_fp8:
        return _CONVERTED
    return KINDS.get(pages.kind, 0)


def pages_of(k_pages: Tensor, v_pages: Tensor, kind: torch.dtype) -> Pages:
    """One layer's pages as kernels/pages.py describes them, for this kernel."""
    if kind not in KINDS:
        return Pages(k_pages, v_pages)
    (k, k_scale), (v, v_scale) = (split_rows(pages, kind) for pages in (k_pages, v_pages))
    return Pages(k, v, k_scale, v_scale, kind)


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One step's attention: what decoding sequences take, and others, where there are any."""

    splits: Items | None
    split_shape: Shape
    tiles: Items | None
    tile_shape: Shape


def plan_step(
    query_start: Tensor, context_len: Tensor, *, num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int,
    kv_dtype: torch.dtype, deterministic: bool = False,
) -> StepPlan:  # fmt: skip
    """Launch what decides on the device which block takes what. The host needs to know the numbers of sequences and tokens alone.

    `deterministic`: every query is computed in tiles, so that a token's bits are the same whether it came in a prompt or was generated.
    """
    torch_device, device = query_start.device, device_of(query_start.device)
    num_sequences, heads, quantized = context_len.shape[0], num_heads // num_kv_heads, kv_dtype in KINDS
    shape, tiles = tile_shape(heads, head_dim, device, quantized=quantized), None
    queries = queries_per_tile(shape, heads)
    if deterministic:
        tiles = empty_items(most_tiles(num_sequences, num_tokens, queries, least_queries=1), queries, torch_device)
        launch_tiles(query_start, context_len, tiles, least_queries=1)()
        return StepPlan(None, split_shape(heads, head_dim, quantized=quantized), tiles, shape)
    splits = empty_items(most_splits(num_sequences, num_kv_heads=num_kv_heads, device=device), 0, torch_device)
    launch_splits(query_start, context_len, splits, num_kv_heads=num_kv_heads, device=device)()
    if num_tokens > num_sequences:
        tiles = empty_items(most_tiles(num_sequences, num_tokens, queries), queries, torch_device)
        launch_tiles(query_start, context_len, tiles)()
    return StepPlan(splits, split_shape(heads, head_dim, quantized=quantized), tiles, shape)


def attend(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, kind: torch.dtype, plan: StepPlan, query_start: Tensor, context_len: Tensor,
    page_table: Tensor, *, scale: float, sliding_window: int | None, soft_cap: float | None, out: Tensor,
) -> None:  # fmt: skip
    """kernels/paged_attention.py's operation, whose arguments it has checked."""
    pages, device, workspace = pages_of(k_pages, v_pages, kind), device_of(q.device), workspace_of(q.device)
    for items, shape in ((plan.splits, plan.split_shape), (plan.tiles, plan.tile_shape)):
        if items is not None:
            launch(
                q, pages, query_start, context_len, page_table, items, shape, scale=scale, out=out, device=device, workspace=workspace,
                sliding_window=sliding_window, soft_cap=soft_cap, deterministic=plan.splits is None,
            )()  # fmt: skip
