"""Attention of new queries over keys and values that lie in pages, read in place. Knows no model, no request and no allocator.

Contract (all tensors on one device):

- q           [T, Hq, D]   new queries of all sequences, one sequence after the other. Rows may be strided (a view into a fused
                           qkv buffer); each row's [Hq, D] is contiguous.
- k/v_pages   [num_pages, Hkv, page_size, D], one layer's pages; float32, bfloat16 or float16; last dimension contiguous,
                           both with the same strides. They already hold the new tokens.
- out         [T, Hq, D]   written in place; rows may be strided like q's.

Query i of sequence b stands at position `context_len[b] - q_len[b] + i` and attends to the positions at or before its own, and
within a sliding window w only to those after `own - w`. With a soft cap c, scores become `c * tanh(score / c)`. Query head h reads
key head `h // (Hq // Hkv)`. What lies in a page beyond a sequence's context is never looked at.

A step makes one `AttentionPlan` and every layer uses it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .gpu.device import is_gpu
from .pages import CODE_RANGE, PLAIN_DTYPES, check_pages, split_rows


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Which queries read which pages in one step; made by `plan_attention`.

    `work` is the CPU kernel's task list (empty on other devices), `threads` the size of the team that runs it; `on_gpu` the GPU
    kernel's StepPlan; `peer` a FlashInferStep, which then attends in place of it.
    """

    query_start: Tensor  # int32 [B + 1], cumulative
    context_len: Tensor  # int32 [B], tokens in the pages, the new ones included
    page_table: Tensor  # int32 [B, max_pages]
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    work: Tensor
    partial_rows: int
    threads: int
    on_gpu: Any = None
    peer: Any = None


def plan_attention(
    query_start: Tensor,
    context_len: Tensor,
    page_table: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_dtype: torch.dtype = torch.bfloat16,
    num_tokens: int | None = None,
    deterministic: bool = False,
) -> AttentionPlan:
    """Cut one step's attention into tasks. Cost: some tens of microseconds, once a step.

    query_start int32 [B + 1] from 0, context_len int32 [B] >= each query count, page_table int32 [B, max_pages]; contiguous, on the
    device where attention will run. num_heads is a multiple of num_kv_heads, head_dim a multiple of 8 from 16 to 256. GPUs want to know
    what pages hold, `kv_dtype`, and the last of query_start, `num_tokens`: reading it would make the host wait. `deterministic`: a query's
    bits depend on nothing but its own sequence, on GPUs too, at the price of slower steps with long contexts.
    """
    for name, value, ndim in (("query_start", query_start, 1), ("context_len", context_len, 1), ("page_table", page_table, 2)):
        if value.dtype != torch.int32 or value.ndim != ndim or not value.is_contiguous():
            raise ValueError(f"{name} must be a contiguous int32 tensor of {ndim} dimension(s), not {value.dtype} {tuple(value.shape)}")
    batch = context_len.shape[0]
    if query_start.shape[0] != batch + 1 or page_table.shape[0] != batch:
        raise ValueError(f"{batch} context lengths need {batch + 1} query starts and {batch} page rows")
    if num_heads % num_kv_heads or num_heads <= 0:
        raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
    if head_dim % 8 or not 16 <= head_dim <= 256:
        raise ValueError(f"head_dim must be a multiple of 8 from 16 to 256, not {head_dim}")
    work, partial_rows, threads, on_gpu = torch.empty(0, 0, dtype=torch.int64), 0, 1, None
    num_tokens = int(query_start[-1]) if num_tokens is None else num_tokens
    if is_gpu(query_start.device):
        on_gpu = _gpu_kernels().plan_step(
            query_start,
            context_len,
            num_tokens=num_tokens,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            kv_dtype=kv_dtype,
            deterministic=deterministic,
        )
    elif query_start.device.type == "cpu":
        from .cpu.attention_work import divide

        divided = divide(query_start.numpy(), context_len.numpy(), num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        work, partial_rows, threads = torch.from_numpy(divided.items), divided.partial_rows, divided.threads
    return AttentionPlan(
        query_start, context_len, page_table, num_tokens, num_heads, num_kv_heads, head_dim, work, partial_rows, threads, on_gpu
    )


@functools.cache
def _on_cpu() -> Callable[..., None]:
    """The CPU kernel, imported at the first call."""
    from .cpu.paged_attention import paged_attention as on_cpu

    return on_cpu


@functools.cache
def _gpu_kernels() -> Any:
    """The kernels for NVIDIA GPUs, imported at the first call."""
    from .gpu import paged_attention as on_gpu

    return on_gpu


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    kv_dtype: torch.dtype | None = None,
    out: Tensor,
) -> Tensor:
    """Attend (see the file's contract) and return `out`. q and out may hold more rows than the plan has tokens: those stay as they are.

    `kv_dtype` is what the pages hold: torch.int8, float8_e4m3fn or float8_e5m2 for codes; None, or their own dtype, for plain numbers.
    On the CPU q and out are float32, and a row's bits depend on its own query, position, keys and values alone: not on the thread
    count, on what else is in the batch, or on how the prompt was cut into chunks.
    """
    _check(q, plan, scale, sliding_window, soft_cap, out)
    check_pages(k_pages, v_pages, num_kv_heads=plan.num_kv_heads, head_dim=plan.head_dim, kv_dtype=kv_dtype)
    if plan.num_tokens == 0:
        return out
    if plan.peer is not None:
        plan.peer.attend(q, k_pages, v_pages, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap, out=out)
        return out
    kind = kv_dtype or k_pages.dtype
    if plan.on_gpu is not None and q.dtype in PLAIN_DTYPES[1:] and out.dtype == q.dtype and kind != torch.float32:
        _gpu_kernels().attend(
            q,
            k_pages,
            v_pages,
            kind,
            plan.on_gpu,
            plan.query_start,
            plan.context_len,
            plan.page_table,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            out=out,
        )
        return out
    if q.device.type == "cpu" and not is_gpu(q.device):
        _on_cpu()(
            q,
            k_pages,
            v_pages,
            kind,
            plan.page_table,
            plan.work,
            plan.partial_rows,
            plan.threads,
            scale,
            sliding_window,
            soft_cap,
            out,
        )
        return out
    return reference(q, k_pages, v_pages, plan, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap, kv_dtype=kv_dtype, out=out)


def _check(
    q: Tensor,
    plan: AttentionPlan,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    out: Tensor,
) -> None:
    rows, heads, dim = q.shape
    if rows < plan.num_tokens or heads != plan.num_heads or dim != plan.head_dim:
        raise ValueError(f"q is {tuple(q.shape)}; the plan has {plan.num_tokens} tokens, {plan.num_heads} heads of {plan.head_dim}")
    if out.shape[0] < plan.num_tokens or out.shape[1:] != q.shape[1:]:
        raise ValueError(f"out is {tuple(out.shape)} for a q of {tuple(q.shape)}")
    if q.stride()[1:] != (dim, 1) or out.stride()[1:] != (dim, 1):
        raise ValueError(f"the heads of q and out must be contiguous within a row; strides are {q.stride()} and {out.stride()}")
    if q.is_cpu and not is_gpu(q.device) and (q.dtype != torch.float32 or out.dtype != torch.float32):
        raise ValueError(f"on the CPU q and out are float32, not {q.dtype} and {out.dtype}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, not {sliding_window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be positive, not {soft_cap}")


def reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    kv_dtype: torch.dtype | None = None,
    out: Tensor,
) -> Tensor:
    """The same in plain float32 torch, one sequence at a time over gathered keys: what every kernel is held against. Any device."""
    page_size, kind = k_pages.shape[2], kv_dtype or k_pages.dtype
    starts = plan.query_start.tolist()
    for b, context in enumerate(plan.context_len.tolist()):
        first, last = starts[b], starts[b + 1]
        if first == last:
            continue
        pages = plan.page_table[b, : -(-context // page_size)].long()
        k, v = (
            _rows(x, pages, kind).transpose(0, 1).flatten(1, 2)[:, :context].repeat_interleave(plan.num_heads // plan.num_kv_heads, dim=0)
            for x in (k_pages, v_pages)
        )
        scores = q[first:last].float().transpose(0, 1) @ k.transpose(1, 2) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        own = torch.arange(context - (last - first), context, device=q.device)[:, None]
        key = torch.arange(context, device=q.device)[None, :]
        hidden = key > own
        if sliding_window is not None:
            hidden |= key <= own - sliding_window
        weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
        out[first:last] = (weights @ v).transpose(0, 1).to(out.dtype)
    return out


def _rows(pages: Tensor, wanted: Tensor, kind: torch.dtype) -> Tensor:
    """Some pages as float32 numbers."""
    if kind not in CODE_RANGE:
        return pages[wanted].float()
    codes, scales = split_rows(pages, kind)
    return codes[wanted].view(kind).float() * scales[wanted].unsqueeze(-1)
