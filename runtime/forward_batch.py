"""ForwardBatch: one step as tensors, made from a Batch. An argument to the model, never a global."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..kernels.paged_attention import AttentionPlan, plan_attention
from .batch import Batch, BatchRow

_ALIGNMENT = 16
_TORCH_DTYPES: dict[type[Any], torch.dtype] = {np.int64: torch.int64, np.int32: torch.int32}


@dataclass(frozen=True)
class ForwardBatch:
    """Tokens of all rows, one row after the other. A row may hold any number of new tokens, decoding or not.

    input_ids, positions, slots: int64 [T]; `plan` tells attention which queries read which pages; `logits_rows` int64 [R]
    are the token rows whose logits are wanted: row by row, those of `Request.scored_positions`, then the last one where the row samples.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    plan: AttentionPlan
    logits_rows: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]


def _tokens_of(row: BatchRow) -> list[int]:
    return row.request.tokens[row.start : row.start + row.count]


def make_forward_batch(
    batch: Batch, *, page_size: int, num_heads: int, num_kv_heads: int, head_dim: int, kv_dtype: torch.dtype, device: torch.device
) -> ForwardBatch:
    """Lay a batch out as tensors on `device`."""
    rows = batch.rows
    counts = np.array([row.count for row in rows], dtype=np.int64)
    starts = np.array([row.start for row in rows], dtype=np.int64)
    ends = np.cumsum(counts)
    total = int(ends[-1])
    ids = np.fromiter((token for row in rows for token in _tokens_of(row)), dtype=np.int64, count=total)
    owner = np.repeat(np.arange(len(rows)), counts)
    positions = np.arange(total, dtype=np.int64) - (ends - counts)[owner] + starts[owner]
    table = np.zeros((len(rows), max(len(row.request.pages) for row in rows)), dtype=np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row.request.pages)] = np.frombuffer(row.request.pages, dtype=np.int32)
    slots = table[owner, positions // page_size].astype(np.int64) * page_size + positions % page_size
    query_start = np.zeros(len(rows) + 1, dtype=np.int32)
    query_start[1:] = ends
    wanted: list[int] = []
    for row, end in zip(rows, ends.tolist(), strict=True):
        offset = end - row.count - row.start
        wanted.extend(position + offset for position in row.request.scored_positions(row.start, row.count))
        if row.samples:
            wanted.append(end - 1)

    contexts, wanted_rows = (starts + counts).astype(np.int32), np.array(wanted, dtype=np.int64)
    moved = to_device((ids, positions, slots, wanted_rows, query_start, contexts, table), device)
    plan = plan_attention(
        *moved[4:],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        kv_dtype=kv_dtype,
        num_tokens=total,
    )
    return ForwardBatch(moved[0], moved[1], moved[2], plan, moved[3])


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors on a device, in one copy; to CUDA from pinned memory, so that the host does not wait for it."""
    starts = [0]
    for array in arrays:
        starts.append(-(-(starts[-1] + array.nbytes) // _ALIGNMENT) * _ALIGNMENT)
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = packed.numpy()
    for start, array in zip(starts, arrays, strict=False):
        host[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    moved = packed.to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes].view(_TORCH_DTYPES[array.dtype.type]).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]
