"""ForwardBatch: one step as tensors, made from a Batch. An argument to the model, never a global."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..kernels.paged_attention import AttentionPlan, plan_attention
from .batch import Batch, BatchRow
from .transfer import to_device

if TYPE_CHECKING:
    from ..kernels.gpu.flashinfer_attention import FlashInfer


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
    """The row's tokens; an awaited one as ~i, where i is its place among those that are being sampled."""
    tokens = row.request.tokens[row.start : row.start + row.count]
    return tokens if len(tokens) == row.count else [*tokens, ~row.request.awaited_row]


@dataclass(frozen=True)
class StepArrays:
    """A batch laid out for the device, and not there yet: int64 but for query_start, contexts and table, which are int32.

    ids [T], an awaited token as ~i, where i is its place among those that are being sampled; positions, slots [T]; wanted [R], as
    ForwardBatch.logits_rows; query_start [B + 1], contexts [B], table [B, pages].
    """

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    wanted: np.ndarray
    query_start: np.ndarray
    contexts: np.ndarray
    table: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def is_decoding(self) -> bool:
        """Whether every row is one token whose logits are wanted."""
        return len(self.wanted) == len(self.ids) == len(self.contexts)


@dataclass(frozen=True)
class AttentionShape:
    """What a model's attention is planned by. `peer` attends in place of our kernels."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: torch.dtype
    deterministic: bool = False
    peer: FlashInfer | None = None

    def plan(self, query_start: torch.Tensor, contexts: torch.Tensor, table: torch.Tensor, *, num_tokens: int) -> AttentionPlan:
        """`plan_attention` for a step of this model."""
        return plan_attention(
            query_start,
            contexts,
            table,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            kv_dtype=self.kv_dtype,
            num_tokens=num_tokens,
            deterministic=self.deterministic,
        )

    def plan_by_peer(self, arrays: StepArrays, moved: Sequence[torch.Tensor], page_size: int) -> AttentionPlan:
        """The same for the peer, which plans from what the host has."""
        assert self.peer is not None
        on_host = (torch.from_numpy(array) for array in (arrays.query_start, arrays.contexts, arrays.table))
        none = torch.empty(0, 0, dtype=torch.int64)
        query_start, contexts, table = moved
        return AttentionPlan(
            query_start,
            contexts,
            table,
            num_tokens=arrays.num_tokens,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            work=none,
            partial_rows=0,
            threads=1,
            peer=self.peer.plan(*on_host, page_size=page_size),
        )


def lay_out(batch: Batch, page_size: int) -> StepArrays:
    """A batch as arrays."""
    rows = batch.rows
    requests = [row.request for row in rows]
    counts = np.array([row.count for row in rows], dtype=np.int64)
    starts = np.array([row.start for row in rows], dtype=np.int64)
    ends = np.cumsum(counts)
    total = int(ends[-1])
    tokens: list[int] = []
    for row in rows:
        tokens += _tokens_of(row)
    ids = np.array(tokens, dtype=np.int64)
    owner = np.repeat(np.arange(len(rows)), counts)
    positions = np.arange(total, dtype=np.int64) - (ends - counts)[owner] + starts[owner]
    lengths = np.array([len(request.pages) for request in requests])
    table = np.zeros((len(rows), lengths.max()), dtype=np.int32)
    table[np.arange(table.shape[1]) < lengths[:, None]] = np.frombuffer(b"".join([request.pages for request in requests]), dtype=np.int32)
    slots = table[owner, positions // page_size].astype(np.int64) * page_size + positions % page_size
    query_start = np.zeros(len(rows) + 1, dtype=np.int32)
    query_start[1:] = ends
    wanted: list[int] = []
    for row, end in zip(rows, ends.tolist(), strict=True):
        if row.request.wants_prompt_logprobs:
            offset = end - row.count - row.start
            wanted.extend(position + offset for position in row.request.scored_positions(row.start, row.count))
        if row.samples:
            wanted.append(end - 1)
    contexts = (starts + counts).astype(np.int32)
    return StepArrays(ids, positions, slots, np.array(wanted, dtype=np.int64), query_start, contexts, table)


def make_forward_batch(
    arrays: StepArrays, awaited: torch.Tensor | None, shape: AttentionShape, page_size: int, device: torch.device
) -> ForwardBatch:
    """The arrays as tensors on `device`. `awaited` int64 [n], there, are the tokens of the last step, which the host need not know."""
    moved = to_device(
        (arrays.ids, arrays.positions, arrays.slots, arrays.wanted, arrays.query_start, arrays.contexts, arrays.table), device
    )
    input_ids = moved[0] if awaited is None else with_awaited(moved[0], awaited)
    if shape.peer is not None:
        plan = shape.plan_by_peer(arrays, moved[4:], page_size)
    else:
        plan = shape.plan(*moved[4:], num_tokens=arrays.num_tokens)
    return ForwardBatch(input_ids, moved[1], moved[2], plan, moved[3])


def with_awaited(ids: torch.Tensor, awaited: torch.Tensor) -> torch.Tensor:
    """`ids` with each ~i replaced by awaited[i]; by token 0 where that is -1, for no answer follows from such a row."""
    return torch.where(ids < 0, awaited[(~ids).clamp_(min=0)].clamp_(min=0), ids)
